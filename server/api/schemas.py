"""Request bodies, as OpenAI's, vLLM's and our own routes take them. pydantic only; unknown fields are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from adapters.composition import MAX_PARTS
from server.api.body import Body, Text
from server.api.forms import (
    CHAT,
    COMPLETION,
    GENERATING,
    PREDICT,
    RESPONSE_FORMAT,
    STRUCTURED_OUTPUTS,
    TOKEN_ID_KEYS,
    TOKENIZE,
    described,
)
from server.api.messages import Message, Tools
from server.composition import written
from server.engine.request import AS_MANY_AS_FIT, SamplingParams

MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_N = 16
MAX_BIASES = 1024
MAX_PATTERN = 10_000
MAX_CHOICES = 1024

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
PartName = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^*+]+$")]
Weight = Annotated[float, Field(allow_inf_nan=False)]
LanguageCode = Annotated[str, StringConstraints(min_length=1, max_length=64)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Biases = Annotated[
    dict[Annotated[int, Field(ge=0, lt=2**31, strict=False)], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES, json_schema_extra=TOKEN_ID_KEYS),
]


class StreamOptions(Body):
    include_usage: bool = False


class Sampling(Body):
    """How tokens are chosen: fields of the chat and completion routes and of predict's `parameters`."""

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31, description="0 or -1: all tokens")
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    logit_bias: Biases | None = Field(None, description="token id -> what is added to its logit before sampling")

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling_params(self, max_tokens: int, logprobs: int | None, choice: int) -> SamplingParams:
        """For the choice-th of `n` answers."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=None if self.seed is None else self.seed + choice,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((self.logit_bias or {}).items()),
            logprobs=logprobs,
        )


class JsonSchema(Body):
    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="it is always held to")


class ResponseFormat(Body):
    """OpenAI's."""

    model_config = ConfigDict(json_schema_extra=described(*RESPONSE_FORMAT))

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type: json_schema")
        return self

    @property
    def held_to(self) -> Any:
        """The schema of the answer; None: it is free."""
        if self.type == "json_object":
            return {"type": "object"}
        return None if self.json_schema is None else self.json_schema.json_schema


class StructuredOutputs(Body):
    """vLLM's."""

    model_config = ConfigDict(json_schema_extra=described(*STRUCTURED_OUTPUTS))

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: Annotated[str, StringConstraints(min_length=1, max_length=MAX_PATTERN)] | None = None
    choice: Annotated[list[StopString], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_schema, self.regex, self.choice)) != 1:
            raise ValueError("send one of json, regex and choice")
        return self


class Composable(Body):
    """A request for the base with one adapter, or with several as one."""

    model: ModelName
    adapters: Annotated[dict[PartName, Weight], Field(min_length=1, max_length=MAX_PARTS)] | None = Field(
        None, description="weights of adapters that are added up, each times its weight; model is the base then"
    )

    @property
    def served(self) -> str:
        """What is asked for, as one expression."""
        return self.model if self.adapters is None else written(self.adapters)


class Generating(Sampling, Composable):
    """What the chat and completion routes share."""

    model_config = ConfigDict(json_schema_extra=described(*GENERATING))

    n: int = Field(1, ge=1, le=MAX_N)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=256)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="lower goes first, where fairness allows")

    @model_validator(mode="after")
    def _one_structure(self) -> Generating:
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("send either response_format or structured_outputs")
        return self

    @model_validator(mode="after")
    def _stream_options_only_with_stream(self) -> Generating:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self


class ChatRequest(Generating, Tools):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(json_schema_extra=described(*CHAT))

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: send one")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> ChatRequest:
        """Of the output: that of calls, or another."""
        other = self.structured_outputs is not None or (self.response_format and self.response_format.type != "text")
        if other and self.must_call:
            raise ValueError("tool_choice wants a call: response_format and structured_outputs hold to something else")
        held = not self.several_calls or any(f.strict for f in self.callable)
        if self.structured_outputs is not None and self.offered and held:
            raise ValueError("structured_outputs hold the calls too: not with strict or parallel_tool_calls: false")
        return self

    def params(self, choice: int) -> SamplingParams:
        """For the choice-th of `n` answers."""
        max_tokens = self.max_completion_tokens or self.max_tokens or AS_MANY_AS_FIT
        return self.sampling_params(max_tokens, (self.top_logprobs or 0) if self.logprobs else None, choice)


class Translation(Body):
    """Of a translation, by the codes of the base's tokenizer."""

    src_lang: LanguageCode | None = Field(None, description="of the text; on bases with languages, as NLLB")
    tgt_lang: LanguageCode | None = Field(None, description="of the answer")


class CompletionRequest(Generating, Translation):
    """POST /v1/completions."""

    model_config = ConfigDict(json_schema_extra=described(*COMPLETION))

    prompt: Text | TokenIds | Annotated[list[Text | TokenIds], Field(min_length=1, fail_fast=True)]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = Field(False, description="the prompt before its completion, with its log-probabilities where asked")

    @model_validator(mode="after")
    def _something_to_answer(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 goes with echo: true")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return _as_list(self.prompt)

    def params(self, choice: int) -> SamplingParams:
        """For the choice-th of `n` answers to a prompt."""
        params = self.sampling_params(self.max_tokens, self.logprobs, choice)
        return replace(params, prompt_logprobs=self.logprobs) if self.echo else params


class TokenizeRequest(Body):
    """POST /tokenize, as vLLM's: a prompt, or messages through the base's chat template."""

    model_config = ConfigDict(json_schema_extra=described(*TOKENIZE))

    model: ModelName | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool = Field(True, description="of the tokenizer, around a prompt")
    add_generation_prompt: bool = Field(True, description="end messages where the assistant's answer begins")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two_forms(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        given = self.model_fields_set
        if ("add_special_tokens" if self.prompt is None else "add_generation_prompt") in given:
            raise ValueError("add_special_tokens is for a prompt, add_generation_prompt for messages")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize, as vLLM's."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class EmbeddingRequest(Composable):
    """POST /v1/embeddings."""

    input: Text | TokenIds | Annotated[list[Text | TokenIds], Field(min_length=1, fail_fast=True)]
    encoding_format: Literal["float", "base64"] = "float"
    user: Annotated[str, StringConstraints(max_length=256)] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return _as_list(self.input)


class ClassifyRequest(Body):
    """POST /v1/classify, as vLLM's."""

    model: ModelName
    input: Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)]

    @property
    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class Parameters(Sampling, Translation):
    """How a generating task of /v1/predict samples; greedy unless told otherwise."""

    temperature: float = Field(0.0, ge=0, le=2)
    max_tokens: int = Field(256, ge=1)


class PredictItem(Body):
    task: ModelName
    input: Text
    parameters: Parameters | None = None


class PredictRequest(Body):
    """POST /v1/predict: one task with inputs, or items with a task each."""

    model_config = ConfigDict(json_schema_extra=described(*PREDICT))

    task: ModelName | None = None
    inputs: Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)] | None = None
    parameters: Parameters | None = None
    items: Annotated[list[PredictItem], Field(min_length=1, fail_fast=True)] | None = None
    tokens: bool = Field(False, description="list the tokens with their labels too (TOKEN_CLS)")

    @model_validator(mode="after")
    def _one_of_two_forms(self) -> PredictRequest:
        single = self.task is not None and self.inputs is not None
        if self.items is not None and (self.task or self.inputs or self.parameters):
            raise ValueError("send either items, or task and inputs")
        if self.items is None and not single:
            raise ValueError("send items, or task and inputs")
        return self

    @property
    def all_items(self) -> list[PredictItem]:
        if self.items is not None:
            return self.items
        assert self.task is not None
        assert self.inputs is not None
        texts = [self.inputs] if isinstance(self.inputs, str) else self.inputs
        return [PredictItem(task=self.task, input=text, parameters=self.parameters) for text in texts]


class PutAdapter(Body):
    """PUT /v1/adapters/{name}: a checkpoint directory below the allowed root."""

    source: Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class Rollback(Body):
    """POST /v1/adapters/{name}/rollback."""

    digest: Annotated[str, StringConstraints(min_length=4, max_length=64, pattern="^[0-9a-f]+$")]


class Pin(Body):
    """POST /v1/adapters/{name}/pin."""

    pinned: bool


class LoadLoraAdapter(Body):
    """POST /v1/load_lora_adapter, as vLLM's."""

    lora_name: ModelName
    lora_path: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadLoraAdapter(Body):
    """POST /v1/unload_lora_adapter, as vLLM's."""

    lora_name: ModelName


def _as_list(value: str | list[int] | list[str | list[int]]) -> list[str | list[int]]:
    """One prompt (a string or token ids) or several, as several."""
    if isinstance(value, str):
        return [value]
    if value and isinstance(value[0], int):
        return [[i for i in value if isinstance(i, int)]]
    return [v for v in value if not isinstance(v, int)]

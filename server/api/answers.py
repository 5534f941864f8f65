"""What each route answers, for /openapi.json alone: no answer is checked against these models or converted by them.

The fuzzer of tests/fuzz.py holds the routes to them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Responses = dict[int | str, dict[str, Any]]
"""What FastAPI's `responses` takes."""

EVERYWHERE = (401, 403, 408, 413, 429, 500, 503)
"""On every route but /health and /ready, which ask for no key and have no limit."""
MEANING = {
    400: "Well-formed, but not servable",
    401: "No API key, or a wrong one",
    403: "The API key has no right to this",
    404: "Unknown model, adapter or version",
    408: "The body stopped coming",
    409: "In the way of what is served now",
    413: "The body is over its limit",
    415: "The body has another content type than these",
    422: "Malformed, or an adapter that is refused",
    429: "The waiting queue, or the caller's share of it, is full",
    500: "A fault of the server; its log has it under the request's id",
    503: "Starting, draining, or no room now",
}
RETRY_AFTER = {"Retry-After": {"description": "seconds", "required": True, "schema": {"type": "integer", "minimum": 1}}}
TEXT: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
"""A plain line; for a route with `response_class=Response`, which would else be said to answer JSON too."""

EVENTS: dict[str, Any] = {
    "content": {
        "text/event-stream": {
            "itemSchema": {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        }
    }
}


def errors(*statuses: int) -> Responses:
    """These errors, and those of every route."""
    return {status: _error(status) for status in sorted({*statuses, *EVERYWHERE})}


def probe(*statuses: int) -> Responses:
    """These errors of a route that asks for no key, and those of every body."""
    return {status: _error(status) for status in sorted({*statuses, 408, 413})}


def answer(model: Any, stream: bool = False, status: int = 200) -> Responses:
    """Success with JSON of this form (a model, or several); `stream`: or with server-sent events, when asked."""
    return {status: {"model": model, **(EVENTS if stream else {})}}


def _error(status: int) -> dict[str, Any]:
    return {
        "model": ErrorBody,
        "description": MEANING[status],
        **({"headers": RETRY_AFTER} if status in (429, 503) else {}),
    }


class Answer(BaseModel):
    """What all share: no other fields than these."""

    model_config = ConfigDict(extra="forbid")


class Error(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """Every error, as OpenAI's."""

    error: Error


class Status(Answer):
    status: str


class Version(Answer):
    version: str


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PromptUsage(Answer):
    prompt_tokens: int
    total_tokens: int


Finish = Literal["stop", "length"]


class TokenLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprobs]
    refusal: None


class CalledFunction(Answer):
    name: str
    arguments: Annotated[str, Field(description="a JSON object")]


class ToolCall(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: Annotated[str | None, Field(description="null: calls alone")]
    refusal: None
    tool_calls: list[ToolCall] = []


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish | Literal["tool_calls"]


class ChatAnswer(Answer):
    """OpenAI's chat.completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: Annotated[list[float | None], Field(description="null: the first of a prompt")]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class CompletionAnswer(Answer):
    """OpenAI's text_completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Embedding(Answer):
    object: Literal["embedding"]
    index: int
    embedding: Annotated[list[float] | str, Field(description="a string is base64 of little-endian fp32")]


class EmbeddingAnswer(Answer):
    """OpenAI's list of embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsage


class Classification(Answer):
    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class ClassifyAnswer(Answer):
    """vLLM's."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classification]
    usage: Usage


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class Models(Answer):
    object: Literal["list"]
    data: list[Model]


class PredictResult(BaseModel):
    """`type` fixes what else there is; one that failed has `error` instead."""

    task: str
    type: str | None = None
    digest: str | None = None
    usage: Usage | None = None
    error: Error | None = None


class PredictAnswer(Answer):
    id: str
    results: list[PredictResult]


class Tokenized(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer):
    prompt: str


class AdapterRow(Answer):
    """An adapter that is served; `update_refused` says why newer content under its name is not."""

    name: str
    task_type: str | None
    digest: str | None
    state: Literal["ready"]
    tier: Literal["disk", "host", "device"]
    rank: int
    bytes: int
    base: str
    labels: list[str]
    pinned: bool
    requests: int
    last_used: float | None
    loaded_in_s: float | None
    update_refused: list[str] = []


class RefusedRow(Answer):
    """What lies under this name is not served."""

    name: str
    state: Literal["refused"]
    reasons: list[str]


class AdapterRows(Answer):
    object: Literal["list"]
    data: list[AdapterRow | RefusedRow]
    has_more: bool


class StoredVersion(Answer):
    digest: str
    put_at: float
    bytes: int


class Adapted(Answer):
    rank: int
    scaling: Annotated[float, Field(description="the factor of B·A")]


class AdapterDetail(AdapterRow):
    """What `multilora inspect` tells, and the versions that are kept."""

    versions: list[StoredVersion]
    problem_type: Annotated[str | None, Field(description="what a classifier's outputs mean; null: it is none")]
    host_bytes: Annotated[int, Field(description="of host memory, while it is there")]
    slot_bytes: Annotated[int, Field(description="of the device's memory, while it has a slot; 0 on the CPU")]
    modules: Annotated[dict[str, Adapted], Field(description="by the layer's name in the base")]
    coverage: Annotated[dict[str, str], Field(description="where each tensor of the checkpoint went")]


class Removed(Answer):
    name: str
    digest: str | None
    freed_bytes: int

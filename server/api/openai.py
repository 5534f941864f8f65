"""OpenAI's routes: chat, completions, embeddings, models; and vLLM's classify."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from adapters.layout import GENERATING
from server.api.answers import (
    ChatAnswer,
    ClassifyAnswer,
    CompletionAnswer,
    EmbeddingAnswer,
    Model,
    Models,
    answer,
    errors,
)
from server.api.common import ModelPath, ServiceDep, adapter_headers, check_count, unless_gone
from server.api.completion import CompletionShape, completing
from server.api.errors import describe, error_body
from server.api.generation import Choice, Choices
from server.api.schemas import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    Composable,
    EmbeddingRequest,
    Generating,
    StructuredOutputs,
)
from server.api.tools import chat_delta, chat_message, prepare_chat
from server.context import current
from server.engine.grammar import Grammar, Grammars
from server.engine.request import CAUSAL_LM, FEATURE_EXTRACTION, SEQ_CLS, TokenLogprobs
from server.engine.tasks import Prompt
from server.generation import Delta, Form
from server.languages import Language
from server.service import Held, InvalidParameters, Service
from server.tools import ToolUse

router = APIRouter()


def _served(service: Service, body: Composable) -> str:
    """What is asked for. Raises InvalidParameters."""
    if body.adapters is not None and body.model != service.loaded.name:
        raise InvalidParameters(f"adapters are composed on the base: model must be {service.loaded.name!r} then")
    return body.served


@router.post("/v1/chat/completions", responses=answer(ChatAnswer, stream=True) | errors(400, 404, 422))
async def chat_completions(request: Request, body: ChatRequest, service: ServiceDep) -> Response:
    """One or several answers to a conversation, whole or streamed."""
    model = _served(service, body)
    service.check_model(model, CAUSAL_LM)
    check_count(service, body.n)
    async with service.hold(model, CAUSAL_LM, priority=body.priority) as held:
        prompt, tools = await asyncio.to_thread(prepare_chat, held.language.tasks.causal_lm, body)
        form = Form(await _grammar(held, body, tools), tools)
        choices = _begin(service, held, body, [prompt], form)
    return await _answer(request, body, held, choices, _Chat(held.language, body))


@router.post("/v1/completions", responses=answer(CompletionAnswer, stream=True) | errors(400, 404, 422))
async def completions(request: Request, body: CompletionRequest, service: ServiceDep) -> Response:
    """What follows one or several prompts, or is made of them on an encoder-decoder, whole or streamed."""
    model = _served(service, body)
    service.check_model(model, *GENERATING)
    check_count(service, body.n * len(body.prompts))
    async with service.hold(model, *GENERATING, priority=body.priority) as held:
        prepare, prepare_ids = completing(held, body)
        prompts = [await _prompt(service, prepare, p, prepare_ids) for p in body.prompts]
        form = Form(await _grammar(held, body))
        choices = _begin(service, held, body, prompts, form)
    return await _answer(request, body, held, choices, CompletionShape(held.language.decode, body, prompts))


@router.post("/v1/embeddings", responses=answer(EmbeddingAnswer) | errors(400, 404, 422))
async def embeddings(request: Request, body: EmbeddingRequest, service: ServiceDep) -> Response:
    """One normalised vector for each input."""
    model = _served(service, body)
    service.check_model(model, FEATURE_EXTRACTION)
    check_count(service, len(body.inputs))
    async with service.hold(model, FEATURE_EXTRACTION) as held:
        prepare = held.language.tasks.feature_extraction.prepare
        prompts = [await _prompt(service, prepare, text) for text in body.inputs]
        results = await unless_gone(request, _run_all(service, held, FEATURE_EXTRACTION, prompts))
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(values, body.encoding_format)}
        for i, values in enumerate(results)
    ]
    tokens = sum(len(p.token_ids) for p in prompts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    content = {"object": "list", "data": data, "model": body.model, "usage": usage}
    return JSONResponse(content, headers=adapter_headers(held))


@router.post("/v1/classify", responses=answer(ClassifyAnswer) | errors(400, 404, 422))
@router.post("/classify", responses=answer(ClassifyAnswer) | errors(400, 404, 422))
async def classify(request: Request, body: ClassifyRequest, service: ServiceDep) -> Response:
    """The label and the probabilities of each input, as vLLM answers."""
    service.check_model(body.model, SEQ_CLS)
    check_count(service, len(body.inputs))
    async with service.hold(body.model, SEQ_CLS) as held:
        task = held.language.tasks.sequence_classification
        prompts = [await service.prepare(task.prepare, text) for text in body.inputs]
        results = await unless_gone(request, _run_all(service, held, SEQ_CLS, prompts))
    assert held.version is not None
    data = []
    for index, values in enumerate(results):
        result = task.finish(values, held.version.info)
        probs = list(result["scores"].values())
        data.append({"index": index, "label": result["label"], "probs": probs, "num_classes": len(probs)})
    tokens = sum(len(p.token_ids) for p in prompts)
    content = {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }
    return JSONResponse(content, headers=adapter_headers(held))


@router.get("/v1/models", responses=answer(Models) | errors())
async def list_models(service: ServiceDep) -> dict[str, Any]:
    """The base model and every adapter."""
    names = [service.loaded.name, *(name for name, _ in service.registry.list())]
    return {"object": "list", "data": [_model(service, name) for name in names if current().caller.may_use(name)]}


@router.get("/v1/models/{model}", responses=answer(Model) | errors(404, 422))
async def get_model(model: ModelPath, service: ServiceDep) -> dict[str, Any]:
    """One of them."""
    service.look_up(model)
    return _model(service, model)


class _Chat:
    """The shapes of chat answers."""

    def __init__(self, language: Language, body: ChatRequest) -> None:
        self.language = language
        self.object = "chat.completion"
        self.chunk_object = "chat.completion.chunk"
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.logprobs = body.logprobs

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": chat_message(choice),
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "delta": chat_delta(delta),
            "logprobs": self._logprobs([delta.logprobs] if delta.logprobs else []),
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = []
        for entry in entries:
            one = _token_entry(self.language, entry.token_id, entry.logprob)
            top = [_token_entry(self.language, token, logprob) for token, logprob in entry.top]
            content.append({**one, "top_logprobs": top})
        return {"content": content, "refusal": None}


Shape = _Chat | CompletionShape


async def _grammar(held: Held, body: Generating, tools: ToolUse | None = None) -> Grammar | None:
    """What the output is to be held to; made in another thread, since it may take long. Raises InvalidGrammar."""
    free = tools is None or tools.grammar() is None
    if body.response_format is None and body.structured_outputs is None and free:
        return None
    return await asyncio.to_thread(_make_grammar, held.language.grammars, body, tools)


def _make_grammar(grammars: Grammars, body: Generating, tools: ToolUse | None) -> Grammar | None:
    schema = None if body.response_format is None else body.response_format.held_to
    if tools is not None and (held := tools.grammar(schema)) is not None:
        return grammars.of_lark(*held)
    if schema is not None:
        return grammars.of_schema(schema)
    match body.structured_outputs:
        case StructuredOutputs(regex=str(pattern)):
            return grammars.of_pattern(pattern)
        case StructuredOutputs(choice=list(texts)):
            return grammars.of_choice(texts)
        case StructuredOutputs(json_schema=schema):
            return grammars.of_schema(schema)
    return None


def _begin(
    service: Service,
    held: Held,
    body: ChatRequest | CompletionRequest,
    prompts: list[Prompt],
    form: Form,
) -> Choices:
    """Submit every choice of every prompt; if one is refused, none runs."""
    generations = []
    service.metrics.request_n.observe(body.n)
    try:
        for prompt in prompts:
            for choice in range(body.n):
                generations.append(service.generate(held, prompt, body.params(choice), body.stops, form.copy()))
    except Exception:
        for generation in generations:
            generation.close()
        raise
    return Choices(generations, len(prompts))


async def _answer(request: Request, body: Generating, held: Held, choices: Choices, shape: Shape) -> Response:
    headers = adapter_headers(held)
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(body.model, choices, shape, include_usage)
        return _EventStream(events, choices, headers)
    try:
        answers = await unless_gone(request, choices.collect())
    finally:
        choices.close()
    content = {
        **_envelope(shape.object, shape.id, body.model),
        "choices": [shape.choice(i, answer) for i, answer in enumerate(answers)],
        "usage": choices.usage(),
    }
    return JSONResponse(content, headers=headers)


class _EventStream(StreamingResponse):
    """Server-sent events; ends its choices also when the client left before the first event."""

    def __init__(self, events: AsyncIterator[str], choices: Choices, headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._choices = choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._choices.close()


async def _events(model: str, choices: Choices, shape: Shape, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events, ending in [DONE]."""
    envelope = _envelope(shape.chunk_object, shape.id, model)
    usage = {"usage": None} if include_usage else {}
    try:
        for index in range(len(choices.generations)):
            opening = shape.opening(index)
            if opening is not None:
                yield _event({**envelope, "choices": [opening], **usage})
        async for index, delta in choices.deltas():
            if delta.says_something:
                yield _event({**envelope, "choices": [shape.chunk(index, delta)], **usage})
        if include_usage:
            yield _event({**envelope, "choices": [], "usage": choices.usage()})
    except Exception as error:
        answer, message = describe(error)
        yield _event(error_body(message, answer.type, answer.code))
    finally:
        choices.close()
    yield "data: [DONE]\n\n"


async def _run_all(service: Service, held: Held, task: str, prompts: list[Prompt]) -> list[Any]:
    """All together; if one fails, the others are given up."""
    running = [asyncio.ensure_future(service.run(held, task, prompt)) for prompt in prompts]
    try:
        return await asyncio.gather(*running)
    finally:
        for each in running:
            each.cancel()


async def _prompt(
    service: Service,
    prepare: Callable[[str], Prompt],
    given: str | list[int],
    prepare_ids: Callable[[list[int]], Prompt] = Prompt,
) -> Prompt:
    """Text through `prepare`; token ids as they are. Raises InvalidPrompt."""
    return await service.prepare(prepare, given) if isinstance(given, str) else prepare_ids(given)


def _model(service: Service, name: str) -> dict[str, Any]:
    loaded = service.loaded
    is_base = name == loaded.name
    return {
        "id": name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "multilora",
        "root": loaded.logical_name if is_base else name,
        "parent": None if is_base else loaded.name,
        "max_model_len": service.max_model_len,
    }


def _envelope(kind: str, answer_id: str, model: str) -> dict[str, Any]:
    return {"id": answer_id, "object": kind, "created": int(time.time()), "model": model}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _token_entry(language: Language, token_id: int, logprob: float) -> dict[str, Any]:
    text = language.decode([token_id])
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _encoded(values: Any, encoding: str) -> list[float] | str:
    """Floats, or base64 of little-endian fp32 as OpenAI's client asks for."""
    vector = np.asarray(values, dtype="<f4")
    return base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()

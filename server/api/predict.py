"""POST /v1/predict: any task, one or many inputs, each with its own task, in one call and one batch."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from adapters.layout import GENERATING
from server.api.answers import PredictAnswer, answer, errors
from server.api.common import ServiceDep, check_count, unless_gone
from server.api.completion import check_no_languages
from server.api.errors import describe, error_body
from server.api.schemas import Parameters, PredictItem, PredictRequest
from server.engine.request import FEATURE_EXTRACTION, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS
from server.engine.tasks import Prompt
from server.service import Held, InvalidParameters, Service

router = APIRouter()


class _ItemFailed(Exception):
    """One item's error, as it stands in the results."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@router.post("/v1/predict", responses=answer(PredictAnswer) | errors(400, 404, 422))
async def predict(request: Request, body: PredictRequest, service: ServiceDep) -> Response:
    """Results in the order asked. A bad item has an `error` in its place; when all are bad, the first's status."""
    items = body.all_items
    check_count(service, len(items))
    results = await unless_gone(request, _all_served(service, items, body.tokens))
    failed = [result for result in results if isinstance(result, _ItemFailed)]
    if len(failed) == len(results):
        raise failed[0].error
    shown = [_shown(item, result) for item, result in zip(items, results, strict=True)]
    digests = {result.get("digest") for result in shown}
    headers = {}
    if len({item.task for item in items}) == 1 and (digest := next(filter(None, digests), None)):
        headers = {"x-adapter": items[0].task.partition("@")[0], "x-adapter-digest": digest}
    return JSONResponse({"id": f"predict-{uuid.uuid4().hex}", "results": shown}, headers=headers)


async def _all_served(service: Service, items: list[PredictItem], tokens: bool) -> list[dict[str, Any] | _ItemFailed]:
    """Each item, or why it failed; all items of one task by the same version."""
    async with AsyncExitStack() as stack:
        held: dict[str, Held | _ItemFailed] = {}
        for task in dict.fromkeys(item.task for item in items):
            try:
                held[task] = await stack.enter_async_context(service.hold(task))
            except Exception as error:
                held[task] = _ItemFailed(error)
        return await asyncio.gather(*(_served(service, held[item.task], item, tokens) for item in items))


def _shown(item: PredictItem, result: dict[str, Any] | _ItemFailed) -> dict[str, Any]:
    if isinstance(result, dict):
        return result
    answer, message = describe(result.error)
    return {"task": item.task, **error_body(message, answer.type, answer.code)}


async def _served(
    service: Service, held: Held | _ItemFailed, item: PredictItem, tokens: bool
) -> dict[str, Any] | _ItemFailed:
    if isinstance(held, _ItemFailed):
        return held
    try:
        if held.task in GENERATING:
            result = await _generated(service, held, item)
        elif item.parameters is not None:
            raise InvalidParameters(f"parameters are for tasks that generate; {item.task!r} is {held.task}")
        else:
            result = await _computed(service, held, item, tokens)
    except Exception as error:
        return _ItemFailed(error)
    digest = held.version.digest if held.version else None
    return {"task": item.task, "type": held.task, "digest": digest, **result}


async def _generated(service: Service, held: Held, item: PredictItem) -> dict[str, Any]:
    parameters = item.parameters or Parameters()
    tasks = held.language.tasks
    if held.task == SEQ_2_SEQ_LM:
        prepare = tasks.seq_2_seq_lm.prepare
        languages = partial(prepare, src_lang=parameters.src_lang, tgt_lang=parameters.tgt_lang)
        prompt = await service.prepare(languages, item.input)
    else:
        check_no_languages(held, parameters)
        prompt = await service.prepare(tasks.causal_lm.prepare_input, item.input)
    limit = min(parameters.max_tokens, max(1, service.room_for(held, prompt)))
    wanted = parameters.max_tokens if "max_tokens" in parameters.model_fields_set else limit
    params = parameters.sampling_params(wanted, None, 0)
    generation = service.generate(held, prompt, params, parameters.stops)
    text, reason = "", None
    try:
        async for delta in generation.deltas():
            text += delta.text
            reason = delta.finish_reason
    finally:
        generation.close()
    return {"text": text, "finish_reason": reason, "usage": _usage(prompt, generation.num_tokens)}


async def _computed(service: Service, held: Held, item: PredictItem, tokens: bool) -> dict[str, Any]:
    tasks = held.language.tasks
    prepare = {
        SEQ_CLS: tasks.sequence_classification.prepare,
        TOKEN_CLS: tasks.token_classification.prepare,
        FEATURE_EXTRACTION: tasks.feature_extraction.prepare,
    }[held.task]
    prompt = await service.prepare(prepare, item.input)
    values = await service.run(held, held.task, prompt)
    if held.task == FEATURE_EXTRACTION:
        result = tasks.feature_extraction.finish(values)
    else:
        assert held.version is not None
        if held.task == SEQ_CLS:
            result = tasks.sequence_classification.finish(values, held.version.info)
        else:
            result = tasks.token_classification.finish(values, prompt, held.version.info)
            if not tokens:
                del result["tokens"]
    return {**result, "usage": _usage(prompt, 0)}


def _usage(prompt: Prompt, completion: int) -> dict[str, int]:
    n = len(prompt.token_ids)
    return {"prompt_tokens": n, "completion_tokens": completion, "total_tokens": n + completion}

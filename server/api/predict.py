"""POST /v1/predict: any task, one or many inputs, each with its own task, in one call and one batch."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.api.common import ServiceDep, check_count, unless_gone
from server.api.errors import describe, error_body
from server.api.schemas import Parameters, PredictItem, PredictRequest
from server.engine.request import CAUSAL_LM, FEATURE_EXTRACTION, SEQ_CLS, TOKEN_CLS
from server.engine.tasks import Prompt
from server.service import InvalidParameters, Service

router = APIRouter()


class _ItemFailed(Exception):
    """One item's error, as it stands in the results."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@router.post("/v1/predict")
async def predict(request: Request, body: PredictRequest, service: ServiceDep) -> Response:
    """Results in the order asked. A bad item has an `error` in its place; when all are bad, the first's status."""
    items = body.all_items
    check_count(service, len(items))
    work = asyncio.gather(*(_served(service, item, body.tokens) for item in items))
    results = await unless_gone(request, _awaited(work))
    failed = [result for result in results if isinstance(result, _ItemFailed)]
    if len(failed) == len(results):
        raise failed[0].error
    names = {item.task for item in items}
    headers = {}
    if len(names) == 1:
        first = next(result for result in results if isinstance(result, dict))
        if first["digest"] is not None:
            headers = {"x-adapter": items[0].task, "x-adapter-digest": first["digest"]}
    shown = [_shown(item, result) for item, result in zip(items, results, strict=True)]
    return JSONResponse({"id": f"predict-{uuid.uuid4().hex}", "results": shown}, headers=headers)


async def _awaited(work: asyncio.Future[list[Any]]) -> list[Any]:
    return await work


def _shown(item: PredictItem, result: dict[str, Any] | _ItemFailed) -> dict[str, Any]:
    if isinstance(result, dict):
        return result
    answer, message = describe(result.error)
    return {"task": item.task, **error_body(message, answer.type, answer.code)}


async def _served(service: Service, item: PredictItem, tokens: bool) -> dict[str, Any] | _ItemFailed:
    try:
        task = service.task_of(item.task)
        if task == CAUSAL_LM:
            return await _generated(service, item)
        if item.parameters is not None:
            raise InvalidParameters(f"parameters are for tasks that generate; {item.task!r} is {task}")
        return await _computed(service, item, task, tokens)
    except Exception as error:
        return _ItemFailed(error)


async def _generated(service: Service, item: PredictItem) -> dict[str, Any]:
    parameters = item.parameters or Parameters()
    prompt = await service.prepare(service.tasks.causal_lm.prepare_input, item.input)
    limit = min(parameters.max_tokens, max(1, service.max_model_len - len(prompt.token_ids)))
    wanted = parameters.max_tokens if "max_tokens" in parameters.model_fields_set else limit
    params = parameters.sampling_params(wanted, None, 0)
    generation = service.generate(item.task, prompt, params, parameters.stops)
    text, reason = "", None
    try:
        async for delta in generation.deltas():
            text += delta.text
            reason = delta.finish_reason
    finally:
        generation.close()
    version = generation.version
    return {
        "task": item.task,
        "type": CAUSAL_LM,
        "digest": version.digest if version else None,
        "text": text,
        "finish_reason": reason,
        "usage": _usage(prompt, generation.num_tokens),
    }


async def _computed(service: Service, item: PredictItem, task: str, tokens: bool) -> dict[str, Any]:
    tasks = service.tasks
    prepare = {
        SEQ_CLS: tasks.sequence_classification.prepare,
        TOKEN_CLS: tasks.token_classification.prepare,
        FEATURE_EXTRACTION: tasks.feature_extraction.prepare,
    }[task]
    prompt = await service.prepare(prepare, item.input)
    values, version = await service.run(item.task, task, prompt)
    if task == FEATURE_EXTRACTION:
        result = tasks.feature_extraction.finish(values)
    else:
        assert version is not None
        if task == SEQ_CLS:
            result = tasks.sequence_classification.finish(values, version.adapter)
        else:
            result = tasks.token_classification.finish(values, prompt, version.adapter)
            if not tokens:
                del result["tokens"]
    digest = version.digest if version else None
    return {"task": item.task, "type": task, "digest": digest, **result, "usage": _usage(prompt, 0)}


def _usage(prompt: Prompt, completion: int) -> dict[str, int]:
    n = len(prompt.token_ids)
    return {"prompt_tokens": n, "completion_tokens": completion, "total_tokens": n + completion}

"""vLLM's routes that count: text or messages to token ids, and back. Every adapter has the base's tokenizer."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter

from server.api.common import ServiceDep
from server.api.schemas import DetokenizeRequest, TokenizeRequest
from server.engine.tasks import Prompt
from server.service import Service

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> dict[str, Any]:
    """The token ids that a prompt or a conversation has."""
    _check_model(service, body.model)
    ids = (await _prepared(service, body)).token_ids
    strings = service.loaded.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids, "token_strs": strings}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> dict[str, Any]:
    """The text of token ids, special tokens among it."""
    _check_model(service, body.model)
    service.check_token_ids(body.tokens)
    return {"prompt": await asyncio.to_thread(service.loaded.tokenizer.decode, body.tokens)}


async def _prepared(service: Service, body: TokenizeRequest) -> Prompt:
    causal_lm = service.tasks.causal_lm
    if body.messages is not None:
        messages = [message.plain() for message in body.messages]
        return await asyncio.to_thread(causal_lm.prepare_chat, messages, body.add_generation_prompt)
    if not body.prompt:
        return Prompt([])
    return await service.prepare(partial(causal_lm.prepare, special=body.add_special_tokens), body.prompt)


def _check_model(service: Service, model: str | None) -> None:
    """Raises AdapterNotFound, AdapterRefused, EngineNotReady."""
    if model not in (None, service.loaded.name):
        service.lifecycle.look_up(model)

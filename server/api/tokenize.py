"""vLLM's routes that count: text or messages to token ids, and back. By a model's tokenizer, else the base's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter

from server.api.answers import Detokenized, Tokenized, answer, errors
from server.api.common import ServiceDep
from server.api.schemas import DetokenizeRequest, TokenizeRequest
from server.languages import Language
from server.service import Service

router = APIRouter()


@router.post("/tokenize", responses=answer(Tokenized) | errors(400, 404, 422))
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> dict[str, Any]:
    """The token ids that a prompt or a conversation has."""
    async with _language(service, body.model) as language:
        ids = await _token_ids(language, body)
        strings = language.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids, "token_strs": strings}


@router.post("/detokenize", responses=answer(Detokenized) | errors(400, 404, 422))
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> dict[str, Any]:
    """The text of token ids, special tokens among it."""
    async with _language(service, body.model) as language:
        language.check_token_ids(body.tokens)
        return {"prompt": await asyncio.to_thread(language.decode, body.tokens)}


@asynccontextmanager
async def _language(service: Service, model: str | None) -> AsyncIterator[Language]:
    """The base's, which needs no name and is anybody's, or that of a model. Raises as `hold`."""
    if model is None:
        yield service.loaded.language
        return
    service.look_up(model)
    async with service.hold(model) as held:
        yield held.language


async def _token_ids(language: Language, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        messages = [message.plain() for message in body.messages]
        prepare = language.tasks.causal_lm.prepare_chat
        return (await asyncio.to_thread(prepare, messages, body.add_generation_prompt)).token_ids
    assert body.prompt is not None
    return await asyncio.to_thread(language.encode, body.prompt, body.add_special_tokens)

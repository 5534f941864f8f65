"""vLLM's routes that count: text or messages to token ids, and back. Every adapter has the base's tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter

from server.api.answers import Detokenized, Tokenized, answer, errors
from server.api.common import ServiceDep
from server.api.schemas import DetokenizeRequest, TokenizeRequest
from server.service import Service

router = APIRouter()


@router.post("/tokenize", responses=answer(Tokenized) | errors(400, 404, 422))
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> dict[str, Any]:
    """The token ids that a prompt or a conversation has."""
    _check_model(service, body.model)
    ids = await _token_ids(service, body)
    strings = service.loaded.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids, "token_strs": strings}


@router.post("/detokenize", responses=answer(Detokenized) | errors(400, 404, 422))
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> dict[str, Any]:
    """The text of token ids, special tokens among it."""
    _check_model(service, body.model)
    service.check_token_ids(body.tokens)
    return {"prompt": await asyncio.to_thread(service.loaded.decode, body.tokens)}


def _check_model(service: Service, model: str | None) -> None:
    """The base's tokenizer, which needs no name, is anybody's. Raises as `look_up`."""
    if model is not None:
        service.look_up(model)


async def _token_ids(service: Service, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        messages = [message.plain() for message in body.messages]
        prepare = service.tasks.causal_lm.prepare_chat
        return (await asyncio.to_thread(prepare, messages, body.add_generation_prompt)).token_ids
    assert body.prompt is not None
    if service.loaded.base.stacks is not None:  # whose tokenizer may stand on another request's language
        encode: Callable[..., list[int]] = service.tasks.seq_2_seq_lm.encode
    else:
        encode = partial(service.loaded.tokenizer.encode, verbose=False)
    return await asyncio.to_thread(partial(encode, add_special_tokens=body.add_special_tokens), body.prompt)

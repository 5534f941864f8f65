"""Streams: put together they are the whole answer, whatever is cut where; who leaves holds nothing up."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path
from typing import Any

import httpx
import openai

from server.engine.request import RequestOutput
from tests.support import Live, live_server, service_for
from tests.test_operations import metric

PROMPTS = 200
WORDS = ("the", "quick", "brown", "fox", "lazy dog", "naïve", "café", "日本語", "🙂", "Ωμέγα", "ß", "привет", "0123")
MODELS = ("chat-a", "chat-b", "tiny")
Texts = list[tuple[str, str | None]]
"""Of each choice its text and finish reason."""


def test_200_streams_are_the_whole_answers(live: Live) -> None:
    """Multi-byte text, stops that span chunks, three choices each, chat and completions, 8 at once."""
    seen = asyncio.run(_compare_all(live))
    texts = [text for whole, _, _ in seen for text, _ in whole]
    assert sum(not text.isascii() for text in texts) > PROMPTS, "multi-byte text is among it"
    assert sum(cut[0][1] == "stop" and cut[0] != whole[0] for whole, cut, _ in seen) > PROMPTS / 2, "stops are met"
    assert all(stop not in text for _, cut, stop in seen for text, _ in cut)


async def _compare_all(live: Live) -> list[tuple[Texts, Texts, str]]:
    limit = asyncio.Semaphore(8)
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:

        async def compare(number: int) -> tuple[Texts, Texts, str]:
            async with limit:
                return await _compare(client, number)

        return await asyncio.gather(*(compare(number) for number in range(PROMPTS)))


async def _compare(client: openai.AsyncOpenAI, number: int) -> tuple[Texts, Texts, str]:
    """The answer, the answer with a stop out of its middle, that stop."""
    rng = random.Random(number)
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
    options = {"model": MODELS[number % 3], "n": 3, "seed": number, "temperature": 1, "max_tokens": 24}
    whole = await _whole(client, number % 2, text, options)
    middle = len(whole[0][0]) // 2
    stop = whole[0][0][middle : middle + rng.randint(2, 4)] or "fox"
    cut = await _whole(client, number % 2, text, {**options, "stop": [stop, "never"]})
    assert await _streamed(client, number % 2, text, options) == whole
    assert await _streamed(client, number % 2, text, {**options, "stop": [stop, "never"]}) == cut
    return whole, cut, stop


async def _whole(client: openai.AsyncOpenAI, chat: int, text: str, options: dict[str, Any]) -> Texts:
    answer = await _ask(client, chat, text, options)
    return [((c.message.content if chat else c.text), c.finish_reason) for c in answer.choices]


async def _streamed(client: openai.AsyncOpenAI, chat: int, text: str, options: dict[str, Any]) -> Texts:
    texts: list[str] = [""] * 3
    reasons: list[str | None] = [None] * 3
    async for chunk in await _ask(client, chat, text, {**options, "stream": True}):
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "nothing follows the end"
            texts[choice.index] += (choice.delta.content or "") if chat else choice.text
            reasons[choice.index] = choice.finish_reason
    return list(zip(texts, reasons, strict=True))


async def _ask(client: openai.AsyncOpenAI, chat: int, text: str, options: dict[str, Any]) -> Any:
    if chat:
        return await client.chat.completions.create(messages=[{"role": "user", "content": text}], **options)
    return await client.completions.create(prompt=text, **options)


def test_who_leaves_frees_the_sequence_within_two_steps(base_location: dict[str, str], tiny_adapters: Path) -> None:
    service = service_for(base_location["tiny-llama"], "tiny", adapter_dir=str(tiny_adapters))
    allowed = threading.Semaphore(3)
    body = {"model": "chat-a", "prompt": "fox", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 2}

    def running(live: Live) -> tuple[float, float]:
        """Sequences that run, and pages in use."""
        return metric(live, "multilora:num_requests_running")[()], metric(live, "multilora:kv_cache_usage_perc")[()]

    with live_server(service) as live:
        engine = service.async_engine.engine
        step = engine.step

        def step_when_allowed() -> list[RequestOutput]:
            assert allowed.acquire(timeout=60)
            return step()

        engine.step = step_when_allowed  # type: ignore[method-assign]
        with httpx.stream("POST", f"{live.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            assert running(live)[0] == 2
            assert running(live)[1] > 0
        while metric(live, "multilora:request_success_total").get(("abort", "CAUSAL_LM"), 0) < 2:
            pass
        before = metric(live, "multilora:iteration_tokens_total_count")[()]
        for _ in range(2):
            allowed.release()
        while running(live) != (0, 0):
            pass
        assert metric(live, "multilora:iteration_tokens_total_count")[()] <= before + 2
        assert metric(live, "multilora:adapters")[()] == 5
        allowed.release(1000)

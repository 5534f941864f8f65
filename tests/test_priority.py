"""`priority` of a request: who waits longer than whom."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import httpx

from server.api.schemas import CompletionRequest
from server.engine.request import RequestOutput
from tests.support import live_server, service_for


def test_urgent_requests_overtake_those_that_wait(base_location: dict[str, str], tiny_adapters: Path) -> None:
    service = service_for(base_location["tiny-llama"], "tiny", adapter_dir=str(tiny_adapters), max_num_seqs=1)
    ended: list[int | None] = []

    async def ask(client: httpx.AsyncClient, priority: int | None, max_tokens: int) -> None:
        body = {"model": "chat-a", "prompt": "the fox", "max_tokens": max_tokens, "ignore_eos": True}
        given = {} if priority is None else {"priority": priority}
        (await client.post("/v1/completions", json=body | given)).raise_for_status()
        ended.append(priority)

    entered, gate = threading.Event(), threading.Event()

    def wait_and_step() -> list[RequestOutput]:
        """The first step waits until all requests are there."""
        entered.set()
        return step() if gate.wait(60) else []

    async def ask_all(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            tasks = []
            for number, priority in enumerate([0, 3, None, -2]):
                tasks.append(asyncio.create_task(ask(client, priority, 3)))
                while len(service.metrics.live) <= number or not entered.is_set():
                    await asyncio.sleep(0)
            gate.set()
            await asyncio.gather(*tasks)

    with live_server(service) as live:
        engine = service.async_engine.engine
        step = engine.step
        engine.step = wait_and_step  # type: ignore[method-assign]
        asyncio.run(ask_all(live.url))
    assert ended == [0, -2, None, 3]


def test_no_priority_is_the_middle_one() -> None:
    assert CompletionRequest(model="a", prompt="b").priority == 0

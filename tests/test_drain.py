"""What is cut off when a drain's time is over: told to go elsewhere where nothing was answered yet, else broken off."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from server.api.drain import Admission, Traffic

SCOPE = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": []}
START = {"type": "http.response.start", "status": 200, "headers": []}


async def cut_off(starts: bool, draining: bool) -> tuple[list[Any], Traffic]:
    """What a request was sent whose application never ends, cancelled as uvicorn does it."""
    sent: list[Any] = []
    reached = asyncio.Event()

    async def endless(_scope: Scope, _receive: Receive, send: Send) -> None:
        if starts:
            await send(START)
        reached.set()
        await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    traffic = Traffic()
    task = asyncio.create_task(Admission(endless, traffic)(SCOPE, receive, send))
    await reached.wait()
    traffic.draining = draining
    task.cancel()
    await task
    return sent, traffic


def test_before_its_answer_began_a_request_is_told_so() -> None:
    (start, body), traffic = asyncio.run(cut_off(starts=False, draining=True))
    assert start["status"] == 503
    assert b'"draining"' in body["body"]
    assert traffic.running == 0


def test_an_answer_that_began_breaks_off() -> None:
    sent, traffic = asyncio.run(cut_off(starts=True, draining=True))
    assert sent == [START]
    assert traffic.running == 0


def test_without_a_drain_a_request_that_is_cancelled_is_no_answer() -> None:
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cut_off(starts=False, draining=False))

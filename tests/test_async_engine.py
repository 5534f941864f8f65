"""The engine's thread and the event loop: leaving clients, stopping servers, and every sequence ending once."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from server.engine.async_engine import AsyncEngine, EngineNotReady, EngineState, QueueFull, SlowReader
from server.engine.engine import Engine
from server.engine.request import CAUSAL_LM, SamplingParams, Sequence
from tests.support import Live, Runner, live_server, service_for

ENDLESS = {"prompt": "fox", "max_tokens": 240, "ignore_eos": True}


def run_engine(location: str, work: Any, max_waiting: int = 100) -> None:
    """`work(async_engine, engine)` on a started engine."""
    built: list[Engine] = []

    def build() -> Engine:
        built.append(Runner(location).engine)
        return built[0]

    async def main() -> None:
        engine = AsyncEngine(build, max_waiting)
        with pytest.raises(EngineNotReady):
            _ = engine.engine
        engine.start()
        await engine.wait_started()
        try:
            await work(engine, built[0])
        finally:
            await engine.stop()
        built[0].scheduler.check_integrity()
        assert built[0].scheduler.unfinished() == []

    asyncio.run(main())


def sequence(engine: AsyncEngine, max_tokens: int) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Sequence(engine.next_id(), CAUSAL_LM, [5, 6, 7], None, params)


def test_outputs_come_in_order_and_end_once(base_location: dict[str, str]) -> None:
    async def work(engine: AsyncEngine, _: Engine) -> None:
        streams = [engine.submit(sequence(engine, n)) for n in (1, 5, 9)]
        for stream, n in zip(streams, (1, 5, 9), strict=True):
            outputs = [output async for output in stream.outputs()]
            assert [output.finish_reason for output in outputs] == [None] * (n - 1) + ["length"]
            assert [output.token_id for output in outputs] == stream.sequence.output_ids

    run_engine(base_location["tiny-llama"], work)


def test_stopping_fails_what_still_runs(base_location: dict[str, str]) -> None:
    async def work(engine: AsyncEngine, _: Engine) -> None:
        running = engine.submit(sequence(engine, 200))
        outputs = running.outputs()
        await anext(outputs)
        waiting = engine.submit(sequence(engine, 200))
        await engine.stop()
        for stream in (running, waiting):
            last = [output async for output in stream.outputs()][-1]
            assert last.finish_reason in ("error", "length")
            if last.finish_reason == "error":
                assert last.error == "the server is stopping"
        with pytest.raises(EngineNotReady, match="stopping"):
            engine.submit(sequence(engine, 1))

    run_engine(base_location["tiny-llama"], work)


def test_stopping_while_starting_ends_when_the_start_has(base_location: dict[str, str]) -> None:
    stopping = threading.Event()

    def build() -> Engine:
        assert stopping.wait(60)
        return Runner(base_location["tiny-llama"]).engine

    async def main() -> None:
        engine = AsyncEngine(build, 10)
        engine.start()
        stopped = asyncio.ensure_future(engine.stop())
        await asyncio.sleep(0)
        stopping.set()
        await asyncio.wait_for(stopped, 60)
        assert engine.state is EngineState.STOPPED

    asyncio.run(main())


def test_the_queue_has_a_limit(base_location: dict[str, str]) -> None:
    async def work(engine: AsyncEngine, _: Engine) -> None:
        engine.check_room(3)
        with pytest.raises(QueueFull):
            engine.check_room(4)

    run_engine(base_location["tiny-llama"], work, max_waiting=3)


def test_a_sequence_that_nobody_reads_is_ended(base_location: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.async_engine.MAX_UNREAD", 4)

    async def work(engine: AsyncEngine, _: Engine) -> None:
        unread, read = engine.submit(sequence(engine, 100)), engine.submit(sequence(engine, 100))
        outputs = [output async for output in read.outputs()]
        assert len(outputs) == 100
        assert outputs[-1].finish_reason == "length"
        assert read.cut is None
        assert isinstance(unread.cut, SlowReader)
        kept = [output async for output in unread.outputs()]
        assert [output.token_id for output in kept] == [*unread.sequence.output_ids[:4], None]
        assert kept[-1].error

    run_engine(base_location["tiny-llama"], work)


def test_a_failing_build_is_told(base_location: dict[str, str], caplog: Any) -> None:
    def build() -> Engine:
        raise MemoryError("no room for the base")

    async def main() -> None:
        engine = AsyncEngine(build, 10)
        engine.start()
        await engine.wait_started()
        assert engine.state is EngineState.FAILED
        with pytest.raises(EngineNotReady, match="no room for the base"):
            _ = engine.engine
        await engine.stop()

    asyncio.run(main())
    assert "could not start" in caplog.text


def test_what_fails_when_all_is_loaded_is_told(caplog: Any) -> None:
    built: Any = SimpleNamespace(registry=SimpleNamespace(host=SimpleNamespace()))

    def fail() -> None:
        raise OSError("no such thing here")

    async def main() -> None:
        engine = AsyncEngine(lambda: built, 10)
        engine.on_loaded = fail
        engine.start()
        await asyncio.wait_for(engine.wait_started(), 20)
        assert engine.state is EngineState.FAILED
        await engine.stop()

    asyncio.run(main())
    assert "the engine could not start: no such thing here" in caplog.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_sequences(live: Live, stream: bool) -> None:
    engine = live.service.async_engine
    body = {"model": "chat-a", "n": 3, "stream": stream, **ENDLESS}

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
            if stream:
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    await anext(answer.aiter_bytes())
            else:
                asked = asyncio.ensure_future(client.post("/v1/completions", json=body))
                while not engine.num_running and not asked.done():
                    await asyncio.sleep(0)
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(leave())
    version = live.service.registry.current("chat-a")
    # nothing tells from outside when the abort is done: ask the server until it is
    for _ in range(1000):
        if version.holders == 0:
            break
        assert httpx.get(f"{live.url}/health").status_code == 200
    assert version.holders == 0
    assert engine.num_running == 0


def test_many_clients_at_once_each_get_their_own_answer(live: Live) -> None:
    models = ["chat-a", "chat-b", "tiny"]

    async def ask_all() -> list[str]:
        async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:

            async def ask(i: int) -> str:
                body = {"model": models[i % 3], "prompt": [5 + i % 7, 6, 7], "temperature": 0, "max_tokens": 12}
                answer = await client.post("/v1/completions", json=body)
                return str(answer.json()["choices"][0]["text"])

            return await asyncio.gather(*(ask(i) for i in range(42)))

    together = asyncio.run(ask_all())
    for i in range(0, 42, 5):
        body = {"model": models[i % 3], "prompt": [5 + i % 7, 6, 7], "temperature": 0, "max_tokens": 12}
        alone = httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        assert together[i] == alone


def test_a_server_stops_while_requests_run(base_location: dict[str, str], tiny_adapters: Path) -> None:
    service = service_for(base_location["tiny-llama"], "tiny", adapter_dir=str(tiny_adapters))
    with live_server(service) as live:
        body = {"model": "chat-a", "stream": True, **ENDLESS}
        with httpx.stream("POST", f"{live.url}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_bytes())
    assert service.async_engine.state is EngineState.STOPPED

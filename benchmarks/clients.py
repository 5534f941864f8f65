"""Clients of a server's process: streamed completions with the times of their tokens, and loops of them.

Prompts are token ids, answers go on past their end, sampling is greedy: every request costs what its lengths say.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

import httpx

from benchmarks.common import Served

EVENT = b"data: {"


@dataclass
class Timed:
    """One request: when it was sent, and when each piece of its answer came, in time.perf_counter() seconds.

    A piece is a token's text, or that of two where the first ends within a character.
    """

    adapter: str
    sent_at: float
    pieces_at: list[float] = field(default_factory=list)

    @property
    def wait_s(self) -> float:
        """To its first token."""
        return self.pieces_at[0] - self.sent_at

    @property
    def taken_s(self) -> float:
        return self.pieces_at[-1] - self.sent_at

    def gaps(self, begin: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between one piece and the next, for those that came between two times."""
        return [b - a for a, b in pairwise(self.pieces_at) if begin <= a and b <= end]


def clients(server: Served, count: int) -> httpx.AsyncClient:
    """One for so many requests at once."""
    limits = httpx.Limits(max_connections=count, max_keepalive_connections=count)
    return httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits)


async def complete(
    client: httpx.AsyncClient, adapter: str, ids: Sequence[int], new_tokens: int, into: Timed | None = None
) -> Timed:
    """Ask, and read the stream to its end; `into` can be looked at meanwhile. Raises when it fails."""
    body = {
        "model": adapter, "prompt": list(ids), "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True,
    }  # fmt: skip
    timed = into or Timed(adapter, 0.0)
    timed.sent_at = time.perf_counter()
    last = b""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for chunk in answer.aiter_raw():
            timed.pieces_at += [time.perf_counter()] * chunk.count(EVENT)
            last = (last + chunk)[-32:]
    assert timed.pieces_at, "no token came"
    assert last.endswith(b"data: [DONE]\n\n"), f"the stream ends with {last!r}"
    return timed


def closed_loop(
    server: Served, at_once: int, adapters: Sequence[str], prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[Timed]:
    """One request for each of `adapters`, in this order, `at_once` at any time."""
    requests: Iterator[tuple[str, Sequence[int]]] = zip(adapters, prompts, strict=True)

    async def one_client(client: httpx.AsyncClient) -> list[Timed]:
        return [await complete(client, adapter, ids, new_tokens) for adapter, ids in requests]

    async def run() -> list[Timed]:
        async with clients(server, at_once) as client:
            return [*chain(*await asyncio.gather(*(one_client(client) for _ in range(at_once))))]

    answers = asyncio.run(run())
    assert len(answers) == len(adapters), "a request has no answer"
    return answers

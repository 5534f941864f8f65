"""Ten times more requests than the server can do: who is accepted, how long it takes, what is left afterwards.

Before: as many clients as have a place or may wait, one request after the other; that is all that the server can do.
During: requests come at ten times that rate, whether or not the earlier ones were answered. After: as before.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import httpx

from benchmarks.common import Served, Verdicts, arguments, introduce, served

ADAPTERS = Path("examples")
MODELS = ("translate-ui-fr", "smollm2")
RUNNING = WAITING = 16
TIMES = 10
NEW_TOKENS = 32
QUICK_S, BEFORE_S, DURING_S = 8.0, 20.0, 60.0


@dataclass
class Answered:
    """One request's answer."""

    status: int
    taken_s: float
    retry_after: str | None


@dataclass
class Period:
    """What came of the requests of one period."""

    answers: list[Answered]
    took_s: float

    @property
    def accepted(self) -> list[float]:
        """Seconds that each took."""
        return [answer.taken_s for answer in self.answers if answer.status == 200]

    @property
    def refused(self) -> list[Answered]:
        return [answer for answer in self.answers if answer.status == 429]

    @property
    def rate(self) -> float:
        """Requests served in a second."""
        return len(self.accepted) / self.took_s


async def ask(client: httpx.AsyncClient, number: int) -> Answered:
    rng = random.Random(number)
    body = {
        "model": MODELS[number % len(MODELS)], "prompt": [rng.randrange(100, 20_000) for _ in range(32)],
        "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    started = time.perf_counter()
    answer = await client.post("/v1/completions", json=body)
    return Answered(answer.status_code, time.perf_counter() - started, answer.headers.get("retry-after"))


async def closed_loop(client: httpx.AsyncClient, for_s: float) -> Period:
    """One request after the other, by as many as there are places."""
    started = time.perf_counter()

    async def one_client(first: int) -> list[Answered]:
        answers: list[Answered] = []
        while time.perf_counter() - started < for_s:
            answers.append(await ask(client, first + len(answers)))
        return answers

    answers = await asyncio.gather(*(one_client(number * 1000) for number in range(RUNNING + WAITING)))
    return Period([answer for each in answers for answer in each], time.perf_counter() - started)


async def open_loop(client: httpx.AsyncClient, for_s: float, rate: float) -> Period:
    """So many in a second, whatever becomes of them."""
    started = time.perf_counter()
    asked: list[asyncio.Task[Answered]] = []
    while (now := time.perf_counter() - started) < for_s:
        while len(asked) < now * rate:
            asked.append(asyncio.create_task(ask(client, len(asked))))
        await asyncio.sleep(1 / rate)
    took_s = time.perf_counter() - started
    return Period(list(await asyncio.gather(*asked)), took_s)


async def overload(server: Served, before_s: float, during_s: float) -> tuple[list[Period], list[int]]:
    """The three periods, and the server's resident kB before and at its highest during the second."""
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=httpx.Limits(max_connections=4096)) as client:
        await closed_loop(client, 3)
        before = await closed_loop(client, before_s)
        memory = [server.status_kb("VmRSS")]
        during = asyncio.create_task(open_loop(client, during_s, TIMES * before.rate))
        while not during.done():
            await asyncio.sleep(0.5)
            memory.append(server.status_kb("VmRSS"))
        after = await closed_loop(client, before_s)
    return [before, await during, after], memory


def late(seconds: Sequence[float]) -> float:
    """The 95th percentile."""
    return quantiles(seconds, n=20)[-1]


def main() -> None:
    options = arguments(__doc__).parse_args()
    introduce("overload")
    verdicts = Verdicts()
    flags = ("--max-num-seqs", str(RUNNING), "--max-waiting", str(WAITING), "--no-log-requests")
    spans = (QUICK_S, QUICK_S) if options.quick else (BEFORE_S, DURING_S)
    with served(ADAPTERS, *flags) as server:
        (before, during, after), memory = asyncio.run(overload(server, *spans))
    assert {answer.status for answer in before.answers + after.answers} == {200}
    assert {answer.status for answer in during.answers} == {200, 429}, "nothing but accepted and refused"
    waits = [answer.retry_after for answer in during.refused]
    assert all(wait is not None and int(wait) >= 1 for wait in waits)
    refusals = [answer.taken_s for answer in during.refused]
    offered = len(during.answers) / during.took_s / before.rate
    verdicts.told("requests a second before", before.rate)
    verdicts.at_least("offered during / served before", offered, 0.9 * TIMES)
    verdicts.told("share of them that was refused", len(refusals) / len(during.answers))
    note = f"{late(during.accepted):.2f} over {late(before.accepted):.2f} s"
    verdicts.at_most(
        "time of the accepted, 95th percentile, during / before",
        late(during.accepted) / late(before.accepted),
        1.25,
        note,
    )
    note = f"{median(refusals) * 1e3:.1f} ms, 95th percentile {late(refusals) * 1e3:.1f} ms"
    verdicts.at_most(
        "time of a refusal / of an accepted one (medians)", median(refusals) / median(during.accepted), 0.05, note
    )
    verdicts.at_least("served in a second during / before", during.rate / before.rate, 0.9)
    verdicts.at_least("served in a second after / before", after.rate / before.rate, 0.95)
    verdicts.at_most(
        "memory at its highest during / before", max(memory) / memory[0], 1.05, f"{memory[0] / 1024:.0f} MB before"
    )
    verdicts.summary()


if __name__ == "__main__":
    main()

"""Ten times more requests than the server can do: who is accepted, how long it takes, what is left afterwards.

Before: as many clients as have a place or may wait, one request after the other; that is all that the server can do,
with its queue as full as it will be. During: requests come at ten times that rate, whether or not the earlier ones were
answered. After: as before. Each period settles first, so that full batches are compared with full batches.

The clients share the server's processors, so they are as cheap as clients can be, and say what they took.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import mean, median, quantiles

import uvloop

from benchmarks.common import Served, Verdicts, arguments, introduce, served
from benchmarks.plain_client import Answered, PlainClient

ADAPTERS = Path("examples/smollm2")
MODELS = ("translate-fr", "smollm2")
RUNNING = WAITING = 16
TIMES = 10
PROMPT_TOKENS = NEW_TOKENS = 32
DIFFERENT = 1_000
"""Requests that are made beforehand; far more than are in the server at once."""
PAUSE_S = 0.1
SETTLE_S = 6.0
QUICK_S, BEFORE_S, DURING_S = 16.0, 30.0, 60.0


@dataclass
class Period:
    """What came of the requests of one period, and the part of it that is compared."""

    answers: list[Answered]
    began_at: float
    ended_at: float
    clients_s: float
    """Of a processor, taken by the clients."""

    def __post_init__(self) -> None:
        """Whole batches: from the last answer while it settled to the last one in time, for they come in bunches."""
        served = sorted((a for a in self.answers if a.status == 200), key=lambda a: a.ended_at)
        settling = [a for a in served if a.ended_at < self.began_at + SETTLE_S]
        assert settling, f"nothing was answered within {SETTLE_S:g} s"
        compared = [a for a in served[len(settling) :] if a.ended_at < self.ended_at]
        self.accepted = [a.taken_s for a in compared]
        """Seconds that each took of those that are compared."""
        self.rate = len(compared) / (compared[-1].ended_at - settling[-1].ended_at)
        """Requests served in a second."""

    @property
    def refused(self) -> list[Answered]:
        return [answer for answer in self.answers if answer.status == 429]

    @property
    def at_once(self) -> float:
        """Requests in the server, by Little's law."""
        return self.rate * mean(self.accepted)

    @property
    def clients_share(self) -> float:
        """Of one processor."""
        return self.clients_s / (self.ended_at - self.began_at)


class Load:
    """Asks one server, in one of two ways."""

    def __init__(self, client: PlainClient) -> None:
        self._client = client
        made = [client.request("/v1/completions", _body(number)) for number in range(DIFFERENT)]
        self._requests = cycle(made)

    async def closed_loop(self, for_s: float) -> Period:
        """One request after the other, by as many as there are places."""
        began_at, clients_s = time.perf_counter(), time.process_time()
        ended_at = began_at + for_s

        async def one_client() -> list[Answered]:
            answers: list[Answered] = []
            while time.perf_counter() < ended_at:
                answers.append(await self._client.ask(next(self._requests)))
                if answers[-1].status == 429:  # the engine has not yet taken those that wait
                    await asyncio.sleep(PAUSE_S)
            return answers

        each = await asyncio.gather(*(one_client() for _ in range(RUNNING + WAITING)))
        answers = [answer for answers in each for answer in answers]
        return Period(answers, began_at, ended_at, time.process_time() - clients_s)

    async def open_loop(self, for_s: float, rate: float) -> Period:
        """So many in a second, whatever becomes of them."""
        began_at, clients_s = time.perf_counter(), time.process_time()
        asked: list[asyncio.Task[Answered]] = []
        while (now := time.perf_counter() - began_at) < for_s:
            while len(asked) < now * rate:
                asked.append(asyncio.create_task(self._client.ask(next(self._requests))))
            await asyncio.sleep(1 / rate)
        answers = list(await asyncio.gather(*asked))
        return Period(answers, began_at, began_at + for_s, time.process_time() - clients_s)


def _body(number: int) -> bytes:
    rng = random.Random(number)
    return json.dumps({
        "model": MODELS[number % len(MODELS)], "prompt": [rng.randrange(100, 20_000) for _ in range(PROMPT_TOKENS)],
        "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
    }).encode()  # fmt: skip


async def overload(
    server: Served, keep: bool, before_s: float, during_s: float
) -> tuple[tuple[Period, Period, Period], list[int]]:
    """The three periods, and the server's resident kB before and at its highest during the second."""
    load = Load(PlainClient(server.url, keep))
    before = await load.closed_loop(before_s)
    memory = [server.status_kb("VmRSS")]
    asking = asyncio.create_task(load.open_loop(during_s, TIMES * before.rate))
    while not asking.done():
        await asyncio.sleep(0.5)
        memory.append(server.status_kb("VmRSS"))
    during = await asking
    return (before, during, await load.closed_loop(before_s)), memory


def late(seconds: Sequence[float]) -> float:
    """The 95th percentile."""
    return quantiles(seconds, n=20)[-1]


def judge(verdicts: Verdicts, before: Period, during: Period, after: Period) -> None:
    refusals = [answer.taken_s for answer in during.refused]
    offered = len(during.answers) / (during.ended_at - during.began_at) / before.rate
    verdicts.told("requests a second before", before.rate)
    verdicts.at_least("offered during / served before", offered, 0.9 * TIMES)
    verdicts.told("share of them that was refused", len(refusals) / len(during.answers))
    for name, period in (("before", before), ("during", during)):
        verdicts.told(f"in the server at once, {name}", period.at_once, f"of {RUNNING + WAITING}")
        verdicts.told(f"the clients' share of a processor, {name}", period.clients_share)
    for what, of in (("median", median), ("95th percentile", late)):
        note = f"{of(during.accepted):.2f} over {of(before.accepted):.2f} s"
        verdicts.at_most(
            f"time of the accepted, {what}, during / before", of(during.accepted) / of(before.accepted), 1.25, note
        )
    note = f"{median(refusals) * 1e3:.1f} ms, 95th percentile {late(refusals) * 1e3:.1f} ms"
    verdicts.at_most(
        "time of a refusal / of an accepted one (medians)", median(refusals) / median(during.accepted), 0.05, note
    )
    verdicts.at_least("served in a second during / before", during.rate / before.rate, 0.9)
    verdicts.at_least("served in a second after / before", after.rate / before.rate, 0.95)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--connect-each", action="store_true", help="a new connection for each request")
    options = parser.parse_args()
    introduce("overload")
    verdicts = Verdicts()
    flags = ("--max-num-seqs", str(RUNNING), "--max-waiting", str(WAITING), "--no-log-requests")
    spans = (QUICK_S, QUICK_S) if options.quick else (BEFORE_S, DURING_S)
    with served(ADAPTERS, *flags) as server:
        (before, during, after), memory = uvloop.run(overload(server, not options.connect_each, *spans))
    statuses = {answer.status for period in (before, during, after) for answer in period.answers}
    assert statuses == {200, 429}, "nothing but accepted and refused"
    assert all(answer.retry_after_s for answer in during.refused), "each is told when to come again"
    judge(verdicts, before, during, after)
    verdicts.at_most(
        "memory at its highest during / before", max(memory) / memory[0], 1.05, f"{memory[0] / 1024:.0f} MB before"
    )
    verdicts.summary()


if __name__ == "__main__":
    main()

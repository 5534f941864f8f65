"""Ten times more requests than the server can do: who is accepted, how long it takes, what is left afterwards.

Before: as many clients as have a place or may wait, one request after the other; that is all that the server can do.
During: requests come at ten times that rate, whether or not the earlier ones were answered. After: as before.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from urllib.parse import urlsplit

import uvloop

from benchmarks.common import Served, Verdicts, arguments, introduce, served

ADAPTERS = Path("examples/smollm2")
MODELS = ("translate-fr", "smollm2")
RUNNING = WAITING = 16
TIMES = 10
NEW_TOKENS = 32
PAUSE_S = 0.1
QUICK_S, BEFORE_S, DURING_S = 8.0, 20.0, 60.0


@dataclass
class Answered:
    """One request's answer."""

    status: int
    taken_s: float
    retry_after_s: int | None


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


async def ask(server: Served, number: int) -> Answered:
    """On a connection of its own, without a library between: clients must not be what is overloaded."""
    rng = random.Random(number)
    body = json.dumps({
        "model": MODELS[number % len(MODELS)], "prompt": [rng.randrange(100, 20_000) for _ in range(32)],
        "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
    }).encode()  # fmt: skip
    address = urlsplit(server.url)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address.netloc}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(head.encode() + body)
    answer = await reader.read()
    taken_s = time.perf_counter() - started
    writer.close()
    wait = re.search(rb"\r\nretry-after: (\d+)\r\n", answer, re.IGNORECASE)
    return Answered(int(answer[9:12]), taken_s, None if wait is None else int(wait[1]))


async def closed_loop(server: Served, for_s: float) -> Period:
    """One request after the other, by as many as there are places."""
    started = time.perf_counter()

    async def one_client(first: int) -> list[Answered]:
        answers: list[Answered] = []
        while time.perf_counter() - started < for_s:
            answer = await ask(server, first + len(answers))
            if answer.status == 429:  # all began at once
                await asyncio.sleep(PAUSE_S)
            else:
                answers.append(answer)
        return answers

    answers = await asyncio.gather(*(one_client(number * 1000) for number in range(RUNNING + WAITING)))
    return Period([answer for each in answers for answer in each], time.perf_counter() - started)


async def open_loop(server: Served, for_s: float, rate: float) -> Period:
    """So many in a second, whatever becomes of them."""
    started = time.perf_counter()
    asked: list[asyncio.Task[Answered]] = []
    while (now := time.perf_counter() - started) < for_s:
        while len(asked) < now * rate:
            asked.append(asyncio.create_task(ask(server, len(asked))))
        await asyncio.sleep(1 / rate)
    took_s = time.perf_counter() - started
    return Period(list(await asyncio.gather(*asked)), took_s)


async def overload(server: Served, before_s: float, during_s: float) -> tuple[list[Period], list[int]]:
    """The three periods, and the server's resident kB before and at its highest during the second."""
    await closed_loop(server, 3)
    before = await closed_loop(server, before_s)
    memory = [server.status_kb("VmRSS")]
    during = asyncio.create_task(open_loop(server, during_s, TIMES * before.rate))
    while not during.done():
        await asyncio.sleep(0.5)
        memory.append(server.status_kb("VmRSS"))
    after = await closed_loop(server, before_s)
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
        os.nice(19)  # clients stand elsewhere: here they take what the server leaves of the processors
        (before, during, after), memory = uvloop.run(overload(server, *spans))
    assert {answer.status for answer in before.answers + after.answers} == {200}
    assert {answer.status for answer in during.answers} == {200, 429}, "nothing but accepted and refused"
    assert all(answer.retry_after_s for answer in during.refused), "each is told when to come again"
    refusals = [answer.taken_s for answer in during.refused]
    offered = len(during.answers) / during.took_s / before.rate
    verdicts.told("requests a second before", before.rate)
    verdicts.at_least("offered during / served before", offered, 0.9 * TIMES)
    verdicts.told("share of them that was refused", len(refusals) / len(during.answers))
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
    verdicts.at_most(
        "memory at its highest during / before", max(memory) / memory[0], 1.05, f"{memory[0] / 1024:.0f} MB before"
    )
    verdicts.summary()


if __name__ == "__main__":
    main()

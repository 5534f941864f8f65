"""Kinds of task in one batch: 16 streams generate while short texts arrive to be classified, 50 a second.

    python -m benchmarks.mixed                          # about two minutes
    python -m benchmarks.mixed --tokens 25              # longer texts

Both through AsyncEngine, as the server drives it: SmolLM2-135M, the streams over four adapters, the texts over four
others, all of rank 16 on seven linears in fp16. Phases without and with arrivals in turns, each compared with the ones
before and after it.

latency   from submission to result, over the median time of a step in the same phase: a text that comes while a step
          runs waits for its end and is in the next.
slowed    tokens a second of the streams without arrivals over those with. The texts are work, too: at 50 a second and
          n tokens each they take a share 50 · n · 0.21 GFLOP of the machine's peak, whatever serves them; `unavoidable`
          is 1 / (1 − share), and where that is past the target no server on this machine reaches it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import time
from dataclasses import dataclass, field

from adapters.adapter import Adapter
from adapters.layout import BaseLayout
from benchmarks.common import Tokens, Verdicts, arguments, cut_prompts, introduce, make_adapter
from benchmarks.machine import Machine, base_needs
from server.bases import resolve_base
from server.config import ServerConfig
from server.engine.async_engine import AsyncEngine
from server.engine.base_model import load_base
from server.engine.engine import Engine
from server.engine.request import CAUSAL_LM, SEQ_CLS, RequestOutput, SamplingParams, Sequence

BASE = "smollm2"
STREAMS = 16
PROMPT = 64
ANSWER = 256
RATE = 50.0
ADAPTERS = 4


class TimedEngine(Engine):
    """Notes how long each step took, and what one token costs at peak."""

    def __init__(self) -> None:
        base = load_base(resolve_base(BASE).location)
        head = base.model.get_output_embeddings()  # type: ignore[operator]
        self.flop_per_token = base_needs(base.model)[0] - 2.0 * head.weight.numel()
        self.machine = Machine()
        super().__init__(ServerConfig(base=BASE, max_loras=2 * ADAPTERS), base, BASE)
        for name, adapter in _adapters(base.layout).items():
            self.registry.put(name, adapter)
        self.step_s: list[float] = []

    def step(self) -> list[RequestOutput]:
        started = time.perf_counter()
        outputs = super().step()
        self.step_s.append(time.perf_counter() - started)
        return outputs


def _adapters(layout: BaseLayout) -> dict[str, Adapter]:
    generating = {f"g{i}": make_adapter(layout, i) for i in range(ADAPTERS)}
    return generating | {f"c{i}": make_adapter(layout, i, SEQ_CLS) for i in range(ADAPTERS)}


@dataclass
class Phase:
    """What a few seconds gave."""

    tokens_per_s: float
    step_s: float
    """Median."""
    latencies_s: list[float] = field(default_factory=list)


class Load:
    """The streams and the texts. Event loop only."""

    def __init__(self, engine: AsyncEngine, prompts: Tokens, texts: Tokens) -> None:
        self._engine = engine
        self._prompts = prompts
        self._texts = itertools.cycle(texts)
        self._tokens = 0
        self._rng = random.Random(0)

    async def stream(self, index: int) -> None:
        """Generate for ever, one answer after the other; the first is cut, so that streams do not end together."""
        length = ANSWER * (index + 1) // STREAMS
        while True:
            params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
            sequence = self._sequence(CAUSAL_LM, self._prompts[index], f"g{index % ADAPTERS}", params)
            stream = self._engine.submit(sequence)
            try:
                async for _ in stream.outputs():
                    self._tokens += 1
            finally:
                stream.close()
            length = ANSWER

    async def warm_up(self) -> None:
        """Until every stream generates and texts of every adapter were classified."""
        await asyncio.gather(*(self._classify(i, 0.0) for i in range(2 * ADAPTERS)))
        while self._tokens < 4 * STREAMS:
            await asyncio.sleep(0.05)

    async def phase(self, duration_s: float, rate: float) -> Phase:
        """Texts arrive at random (Poisson), `rate` a second; 0: none."""
        engine = self._engine.engine
        assert isinstance(engine, TimedEngine)
        tokens, steps, started = self._tokens, len(engine.step_s), time.perf_counter()
        asked: list[asyncio.Task[float]] = []
        due = started
        while rate and (due := due + self._rng.expovariate(rate)) < started + duration_s:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            asked.append(asyncio.create_task(self._classify(len(asked), due)))
        await asyncio.sleep(max(0.0, started + duration_s - time.perf_counter()))
        rate_now = (self._tokens - tokens) / (time.perf_counter() - started)
        step_s = statistics.median(engine.step_s[steps:])
        return Phase(rate_now, step_s, list(await asyncio.gather(*asked)))

    async def _classify(self, number: int, due: float) -> float:
        stream = self._engine.submit(self._sequence(SEQ_CLS, next(self._texts), f"c{number % ADAPTERS}", None))
        async for output in stream.outputs():
            assert output.error is None
        return time.perf_counter() - due

    def _sequence(self, task: str, ids: list[int], name: str, params: SamplingParams | None) -> Sequence:
        return Sequence(self._engine.next_id(), task, ids, self._engine.engine.registry.acquire(name), params)


async def measure(length: int, options: argparse.Namespace, verdicts: Verdicts) -> None:
    location = resolve_base(BASE).location
    rng = random.Random(1)
    texts = cut_prompts(location, [rng.randint(length - length // 2, length + length // 2) for _ in range(100)])
    async_engine = AsyncEngine(TimedEngine, max_waiting=10_000)
    async_engine.start()
    await async_engine.wait_started()
    engine = async_engine.engine
    assert isinstance(engine, TimedEngine)
    load = Load(async_engine, cut_prompts(location, [PROMPT] * STREAMS), texts)
    streams = [asyncio.create_task(load.stream(i)) for i in range(STREAMS)]
    try:
        await load.warm_up()
        phases = [await load.phase(options.seconds, RATE * (i % 2)) for i in range(2 * options.rounds + 1)]
    finally:
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        await async_engine.stop()
    loaded = phases[1::2]
    steps = [latency / phase.step_s for phase in loaded for latency in phase.latencies_s]
    slowed = [
        (before.tokens_per_s + after.tokens_per_s) / 2 / phase.tokens_per_s
        for before, phase, after in zip(phases[0::2], loaded, phases[2::2], strict=False)
    ]
    share = RATE * statistics.mean(map(len, texts)) * engine.flop_per_token / engine.machine.peak()
    unavoidable = f"unavoidable {1 / (1 - share):.2f}" if share < 1 else "more than this machine can compute"
    spread = statistics.quantiles(steps, n=20)
    note = f"p95 {spread[18]:.1f}; a step takes {loaded[0].step_s * 1e3:.0f} ms, {phases[0].step_s * 1e3:.0f} without"
    verdicts.at_most(f"texts of {length} tokens: median latency in steps", statistics.median(steps), 2.0, note)
    verdicts.at_most(f"texts of {length} tokens: generation slowed", statistics.median(slowed), 1.3, unavoidable)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=None, help="of a text, half more or less (default 8 25)"
    )
    parser.add_argument("--seconds", type=float, default=0, help="of one phase (default 5, quick 3)")
    parser.add_argument("--rounds", type=int, default=0, help="phases with arrivals (default 5, quick 2)")
    options = parser.parse_args()
    options.seconds = options.seconds or (3.0 if options.quick else 5.0)
    options.rounds = options.rounds or (2 if options.quick else 5)
    introduce(f"{STREAMS} streams, and {RATE:.0f} texts a second to classify, in turns")
    verdicts = Verdicts()
    for length in options.tokens or ((8,) if options.quick else (8, 25)):
        asyncio.run(measure(length, options, verdicts))
    verdicts.summary()


if __name__ == "__main__":
    main()

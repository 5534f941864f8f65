"""The cost of one step, with LoRA and without, against its floor, quantised, and with many adapters resident.

    python -m benchmarks.steps                       # everything, about six minutes
    python -m benchmarks.steps --only decode prefill

decode    a step of 8, 32, 64 rows with n adapters over the same step of the base only. LoRA's own time over its floor
          (bytes of the distinct adapters at the bandwidth measured in the same round) counts too: 1.5 or less excuses
          a ratio that is missed only because the base has become faster.
prefill   a step of one or more whole prompts, 256 to 1,024 tokens, with 1 and 4 adapters over the base only.
floor     the base-only step over the larger of its products at peak and its weights at bandwidth, both measured anew
          in every round (best of torch, oneDNN and our own kernels; 1 GB read). Attention is not in the floor.
int8      a step with `--quantize int8` and `int8-dynamic` over the exact step, engines in turns; beside it the same
          with keys and values in fp32 (`--kv-cache-dtype float32`).
sampling  a step whose rows are drawn, with a temperature alone, top-p or top-k, over the same step that is greedy.
resident  the same batch with 1 … 1,000 adapters resident in slots. Of rank 4, so that a thousand fit into this
          machine's memory: what is measured is the cost of their number, not of their size.

Engine.step as the server calls it, SmolLM2-135M in fp32, random adapters on all seven linears, rank 16 in fp16 as
shipped ones are saved; the second column holds the same in fp32. Prompts of about 128 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from adapters.adapter import Adapter
from adapters.layout import BaseLayout
from benchmarks.common import (
    Verdicts,
    add_sequence,
    arguments,
    around,
    cut_prompts,
    in_turns,
    introduce,
    make_adapter,
    make_engine,
    ratio,
    seconds,
)
from benchmarks.machine import Machine, base_needs, factor_bytes
from server.bases import resolve_base
from server.config import ServerConfig
from server.engine.base_model import load_base
from server.engine.engine import Engine

BASE = "smollm2"
PROMPT = 128
DECODE = ((32, 1, 1.08), (32, 4, 1.08), (8, 8, 1.12), (32, 32, 1.25), (64, 64, 1.30))
"""Rows, distinct adapters, target."""
LORA_FLOOR = 1.5
PREFILL = ((1, 256, 1), (1, 1024, 1), (4, 256, 4))
"""Prompts, tokens each, adapters."""
FLOOR = ((1, 1.6), (8, 2.0), (32, 2.2))
QUANTIZE = ("int8", "int8-dynamic")
SAMPLING: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "top-k": {"temperature": 0.7, "top_k": 50},
}
RESIDENT_RANK = 4
RESIDENT_FREE_BYTES = 4 << 30
"""Left to the base, the cache and others."""
Names = Sequence[str | None]


class Rows:
    """Sequences of one engine that decode together, apart from its others."""

    def __init__(self, engine: Engine, names: Names, length: int = PROMPT, **sampling: Any) -> None:
        self._engine = engine
        self._scheduler = engine.scheduler
        prompts = cut_prompts(resolve_base(BASE).location, around(length, len(names)))
        self._sequences = [
            add_sequence(engine, i, ids, name, max_tokens=10_000, **sampling)
            for i, (ids, name) in enumerate(zip(prompts, names, strict=True))
        ]
        while not all(sequence.output_ids for sequence in self._sequences):
            engine.step()
        self._scheduler.running = []

    def step(self) -> float:
        """Seconds of one step of these rows only."""
        self._scheduler.running = self._sequences
        taken = seconds(self._engine.step)
        self._scheduler.running = []
        return taken

    def end(self) -> None:
        self._scheduler.running = self._sequences
        for sequence in list(self._sequences):
            self._engine.abort(sequence)


def spread(prefix: str, rows: int, adapters: int) -> list[str | None]:
    """Row i has adapter i modulo `adapters`; none: the base only."""
    return [f"{prefix}{i % adapters}" if adapters else None for i in range(rows)]


def both_dtypes(layout: BaseLayout, count: int, fp32: bool) -> dict[str, Adapter]:
    made = {f"h{i}": make_adapter(layout, i) for i in range(count)}
    if fp32:
        made |= {f"f{i}": make_adapter(layout, i, dtype=torch.float32) for i in range(count)}
    return made


def exact_engine(fp32: bool) -> Engine:
    count = max(adapters for _, adapters, _ in DECODE)
    return make_engine(
        BASE, lambda layout: both_dtypes(layout, count, fp32), max_loras=2 * count, kv_cache_bytes=4 << 30
    )


def decode(engine: Engine, machine: Machine, verdicts: Verdicts, rounds: int, fp32: bool) -> None:
    print("decode: step with LoRA / base only", flush=True)
    for rows in sorted({rows for rows, _, _ in DECODE}):
        cases = [(adapters, target) for r, adapters, target in DECODE if r == rows]
        groups = {"base": Rows(engine, spread("", rows, 0))}
        for adapters, _ in cases:
            for prefix in ("h", "f") if fp32 else ("h",):
                groups[f"{prefix}{adapters}"] = Rows(engine, spread(prefix, rows, adapters))
        variants: dict[str, Callable[[], float]] = {name: group.step for name, group in groups.items()}
        times = in_turns({**variants, "read": lambda: 1 / machine.bandwidth()}, rounds)
        for adapters, target in cases:
            name = f"h{adapters}"
            needed = factor_bytes(engine, spread("h", rows, adapters))
            own = [a - b for a, b in zip(times[name], times["base"], strict=True)]
            over_floor = statistics.median(
                t / (needed * per_byte) for t, per_byte in zip(own, times["read"], strict=True)
            )
            note = f"own time / floor {over_floor:.2f}"
            if fp32:
                note += f"; fp32 adapters {ratio(times[f'f{adapters}'], times['base']):.3f}"
            what = f"{rows} rows, {adapters} adapters"
            verdicts.at_most(what, ratio(times[name], times["base"]), target, note, over_floor <= LORA_FLOOR)
        for group in groups.values():
            group.end()


def prefill_step(engine: Engine, prompts: list[list[int]], names: Names) -> float:
    for i, (ids, name) in enumerate(zip(prompts, names, strict=True)):
        add_sequence(engine, i, ids, name)
    taken = seconds(engine.step)
    assert not engine.scheduler.unfinished(), "the prompts took more than one step"
    return taken


def prefill(engine: Engine, verdicts: Verdicts, rounds: int, fp32: bool) -> None:
    print("prefill: step with LoRA / base only", flush=True)
    for count, length, adapters in PREFILL:
        prompts = cut_prompts(resolve_base(BASE).location, [length] * count)
        kinds = {"base": spread("", count, 0), "h": spread("h", count, adapters)}
        if fp32:
            kinds["f"] = spread("f", count, adapters)
        times = in_turns(
            {k: functools.partial(prefill_step, engine, prompts, names) for k, names in kinds.items()}, rounds
        )
        note = f"fp32 adapters {ratio(times['f'], times['base']):.3f}" if fp32 else ""
        what = f"{count} × {length} tokens, {adapters} adapters"
        verdicts.at_most(what, ratio(times["h"], times["base"]), 1.10, note)


def floor(engine: Engine, machine: Machine, needs: tuple[float, float], verdicts: Verdicts, rounds: int) -> None:
    flop, weight_bytes = needs
    print(f"floor: base-only step / larger of products at peak ({machine.best_product}) and bytes at bandwidth")
    for rows, target in FLOOR:
        group = Rows(engine, spread("", rows, 0))
        times = in_turns(
            {
                "step": group.step,
                "flop": lambda: 1 / machine.peak(),
                "read": lambda: 1 / machine.bandwidth(),
            },
            rounds,
        )
        group.end()
        products = [rows * flop * t for t in times["flop"]]
        reads = [weight_bytes * t for t in times["read"]]
        floors = [max(pair) for pair in zip(products, reads, strict=True)]
        note = f"over products {ratio(times['step'], products):.2f}, over bytes {ratio(times['step'], reads):.2f}"
        verdicts.at_most(f"{rows} rows", ratio(times["step"], floors), target, note)


def int8(exact: Engine, verdicts: Verdicts, rounds: int) -> None:
    print("int8: step / exact step", flush=True)
    if "quantize" not in {field.name for field in dataclasses.fields(ServerConfig)}:
        print("  ServerConfig has no field `quantize` yet")
        return
    for mode in QUANTIZE:
        engine, wide = (
            make_engine(
                BASE, lambda layout: both_dtypes(layout, 4, False), max_loras=4, quantize=mode, kv_cache_dtype=pages
            )
            for pages in ("auto", "float32")
        )
        for rows, adapters in ((1, 0), (8, 0), (32, 0), (32, 4)):
            engines = {"exact": exact, mode: engine, "wide": wide}
            groups = {name: Rows(e, spread("h", rows, adapters)) for name, e in engines.items()}
            times = in_turns({name: group.step for name, group in groups.items()}, rounds)
            what = f"{mode}, {rows} rows, {adapters or 'no'} adapters"
            note = f"keys and values in fp32 {ratio(times['wide'], times['exact']):.3f}"
            verdicts.at_most(what, ratio(times[mode], times["exact"]), 0.5, note)
            for group in groups.values():
                group.end()
        prompts, names = cut_prompts(resolve_base(BASE).location, [256] * 4), spread("h", 4, 4)
        times = in_turns(
            {
                name: functools.partial(prefill_step, e, prompts, names)
                for name, e in (("exact", exact), (mode, engine))
            },
            rounds,
        )
        verdicts.told(f"{mode}, prefill of 4 × 256 tokens, 4 adapters", ratio(times[mode], times["exact"]))


def sampling(engine: Engine, verdicts: Verdicts, rounds: int) -> None:
    print("sampling: step / greedy step", flush=True)
    for rows in (1, 8, 32):
        names = spread("", rows, 0)
        groups = {"greedy": Rows(engine, names)}
        groups |= {what: Rows(engine, names, **fields) for what, fields in SAMPLING.items()}
        times = in_turns({what: group.step for what, group in groups.items()}, rounds)
        for what in SAMPLING:
            verdicts.told(f"{rows} rows, {what}", ratio(times[what], times["greedy"]))
        for group in groups.values():
            group.end()


def resident(verdicts: Verdicts, rounds: int, most: int) -> None:
    engine = make_engine(
        BASE, lambda _: {}, max_loras=most, max_cpu_loras=most, kv_cache_bytes=2 << 30, max_num_batched_tokens=2048
    )
    one = make_adapter(engine.base.layout, 0, rank=RESIDENT_RANK)
    fitting = int((_available_bytes() - RESIDENT_FREE_BYTES) // one.info.num_bytes)
    if fitting < most:
        print(f"  only {fitting} adapters fit into what memory is free")
    levels = [n for n in (1, 32, 100, 1000) if n <= min(most, fitting)]
    print(f"resident: the same 32 rows, {levels[0]} to {levels[-1]} adapters of rank {RESIDENT_RANK} resident in slots")
    first: dict[int, float] = {}
    known = 0
    for level in levels:
        while known < level:
            name = f"r{known}"
            engine.registry.put(name, make_adapter(engine.base.layout, known, rank=RESIDENT_RANK))
            add_sequence(engine, known, [1], name)  # into a slot
            engine.step()
            known += 1
        for mix in (1, 32):
            if mix > level:
                continue
            names = [f"r{(i % mix) * (level // mix)}" for i in range(32)]
            groups = {"base": Rows(engine, spread("", 32, 0)), "lora": Rows(engine, names)}
            times = in_turns({name: group.step for name, group in groups.items()}, rounds)
            for group in groups.values():
                group.end()
            now = ratio(times["lora"], times["base"])
            what = f"{mix} in the batch, {level} resident, over base only"
            if mix not in first:
                first[mix] = now
                verdicts.told(what, now)
            else:
                change = now / first[mix] - 1
                verdicts.at_most(f"{what}: change", change, 0.03, f"{now:.3f} after {first[mix]:.3f}")


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parts = ("decode", "prefill", "floor", "int8", "sampling", "resident")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="part", help=", ".join(parts))
    parser.add_argument("--rounds", type=int, default=0, help="rounds of each measurement (default 25, quick 7)")
    parser.add_argument("--resident", type=int, default=1000, help="adapters at most (quick: 100)")
    options = parser.parse_args()
    rounds = options.rounds or (7 if options.quick else 25)
    introduce("one step of SmolLM2-135M, ratios in one run")
    verdicts = Verdicts()
    if set(options.only) - {"resident"}:
        needs = base_needs(load_base(resolve_base(BASE).location).model)
        engine = exact_engine(fp32=not options.quick)
        machine = Machine()
        if "decode" in options.only:
            decode(engine, machine, verdicts, rounds, not options.quick)
        if "prefill" in options.only:
            prefill(engine, verdicts, max(5, rounds // 3), not options.quick)
        if "floor" in options.only:
            floor(engine, machine, needs, verdicts, rounds)
        if "int8" in options.only:
            int8(engine, verdicts, rounds)
        if "sampling" in options.only:
            sampling(engine, verdicts, rounds)
        del engine, machine
    if "resident" in options.only:
        resident(verdicts, 2 * rounds, min(options.resident, 100) if options.quick else options.resident)
    verdicts.summary()


if __name__ == "__main__":
    main()

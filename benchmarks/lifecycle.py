"""Adapters that come, change and go while SmolLM2-135M serves: what requests notice of it.

    python -m benchmarks.lifecycle                      # all parts, about half an hour
    python -m benchmarks.lifecycle loads churn          # some of them
    python -m benchmarks.lifecycle --quick

Each part has a server in a process of its own, or two that work in turns, with a store that is thrown away. Everything
on the disk was written just before, so it lies in the system's page cache.

swap    32 clients ask eight adapters (rank 8, all linears; two classify) while each is replaced 50 times by PUT; then
        every answer is compared with what the version in its header gives alone. The server's memory (RSS) afterwards
        over that before, which is taken after some replacements under the same load, when all are answered.
churn   2,000 adapters (rank 2 on q_proj and v_proj, 0.2 MB), 32 of them in host memory, 8 in slots; 32 clients, 64
        prompt tokens, 16 new ones. Tokens a second when requests go to 8 of them, and to 16, over those of a server
        with 8 adapters in all, in turns. Then requests over all by S-LoRA's generator, adapter = int(power(α) · N):
        the longest wait for a first token, over the mean time that a request takes.
loads   Milliseconds to the first token of a 5 MB adapter (rank 8, all linears) that lies on disk only, over those of
        the same one when it is in a slot. Then eight streams that fill the slots run while requests for a hundred
        others come, whose adapters are loaded and then wait for a slot: the median time between two tokens, over that
        before and after: first from their checkpoints, a second time, and then from the arena files that this left.
        `asked again` is the same with these adapters in host memory already: what the waiting
        requests themselves cost.
many    10,000 adapters (rank 1 on one linear, 3 kB) in the directory over none: seconds more to /ready, at the first
        start and at the next, which remembers them; and megabytes more, when all have been read once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import numpy as np
import torch
from safetensors.torch import save

from adapters.layout import BaseLayout
from benchmarks.clients import Timed, clients, closed_loop, complete
from benchmarks.common import (
    Served,
    Verdicts,
    arguments,
    cut_prompts,
    in_turns,
    introduce,
    random_pairs,
    ratio,
    save_adapter,
    served,
)
from benchmarks.hot_swap import CLIENTS, HotSwap, Question, Swapped
from server.bases import resolve_base
from server.engine.base_model import load_base
from server.engine.request import CAUSAL_LM, SEQ_CLS

BASE = "smollm2"
RANK = 8
PROMPT, NEW_TOKENS = 64, 16
SLOTS, IN_HOST = 8, 32
MB = 1e6
POLL_S = 0.1
ALPHAS = (0.1, 0.3, 1.0)
STREAMS, LOADS = 8, 100
QUIET_S = 3.0
STRENGTH = 5.0
"""Of the swapped adapters: the LoRA term is then half of the base's product, and every version says something else."""
CHURN_FLAGS = ("--max-loras", str(SLOTS), "--max-cpu-loras", str(IN_HOST), "--max-num-seqs", str(CLIENTS))


# Adapters on disk


def save_many(layout: BaseLayout, folder: Path, count: int, rank: int, targets: Sequence[str]) -> None:
    """`count` small checkpoints a0, a1, … for the linears whose names end so; written by the thousand in seconds.

    The file of one is written again for each, with its numbers moved on by the adapter's.
    """
    tensors = {}
    for name, pair in random_pairs(layout, 0, rank, torch.float16).items():
        if name.endswith(tuple(targets)):
            tensors[f"base_model.model.{layout.prefix}.{name}.lora_A.weight"] = pair.a
            tensors[f"base_model.model.{layout.prefix}.{name}.lora_B.weight"] = pair.b
    content = save(tensors)
    start = 8 + int.from_bytes(content[:8], "little")
    numbers = np.frombuffer(content[start:], np.float16)
    config = {"peft_type": "LORA", "task_type": CAUSAL_LM, "r": rank, "lora_alpha": 2 * rank,
              "target_modules": list(targets)}  # fmt: skip
    for i in range(count):
        directory = folder / f"a{i}"
        directory.mkdir(parents=True)
        (directory / "adapter_model.safetensors").write_bytes(content[:start] + np.roll(numbers, i).tobytes())
        (directory / "adapter_config.json").write_text(json.dumps(config))


def wait_until(reached: Callable[[], bool], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(POLL_S)


def on_disk(server: Served, count: int) -> list[str]:
    """Names of so many adapters that are not in memory."""
    answer = httpx.get(f"{server.url}/v1/adapters", params={"tier": "disk", "limit": 1000}, timeout=60)
    names = [row["name"] for row in answer.raise_for_status().json()["data"]]
    assert len(names) >= count, f"only {len(names)} are on disk alone"
    return names[:count]


def wait_until_read(server: Served, count: int) -> None:
    """Until each of so many adapters was read once; none may be refused."""
    wait_until(lambda: server.metric("lora_loads_total") >= count or server.metric("adapters") < count)
    assert server.metric("adapters") >= count, "some are refused"


# Parts


def swap(quick: bool, layout: BaseLayout, verdicts: Verdicts) -> None:
    warming, replacements = (3, 6) if quick else (10, 50)
    generating = [
        Question("chat", "Tell me about a lighthouse.", 16),
        Question("complete", "The history of the bicycle begins", 12),
        Question("complete", "On the way home she saw", 16),
    ]
    classifying = [Question("classify", text) for text in ("I like it a lot.", "It broke after a day.", "Fine.")]
    with tempfile.TemporaryDirectory() as folder:
        adapters = []
        for i in range(8):
            task = SEQ_CLS if i >= 6 else CAUSAL_LM
            save_adapter(layout, Path(folder) / f"a{i}", i, task, rank=RANK)
            questions = classifying if task == SEQ_CLS else generating
            adapters.append(Swapped.of(f"a{i}", Path(folder) / f"a{i}", questions, STRENGTH))
        flags = ("--max-loras", "8", "--keep-versions", str(warming + replacements + 1))
        with served(None, *flags) as server:
            load = HotSwap(server.url, adapters)
            load.run(warming)
            before, of_files = server.status_kb("VmRSS"), server.status_kb("RssFile")
            started = time.perf_counter()
            load.run(replacements)
            taken = time.perf_counter() - started
            after, of_files_then = server.status_kb("VmRSS"), server.status_kb("RssFile")
            in_host = server.metric("lora_host_bytes") / MB
            judgement = load.judge()
    bad = [*judgement.wrong, *judgement.untimely]
    note = f"{judgement.answers} answers, {judgement.late} by a version replaced meanwhile; {taken:.0f} s"
    for line in [*bad, *judgement.ambiguous][:5]:
        print("   ", line)
    verdicts.at_most("swap: answers that are not their version's own", len(bad), 0, note)
    verdicts.at_most("swap: answers that other versions give, too", len(judgement.ambiguous) / judgement.answers, 0.05)
    note = (
        f"{before / 1e3:.0f} MB, {after / 1e3:.0f} ({of_files / 1e3:.0f} and {of_files_then / 1e3:.0f} of it mapped "
        f"files); adapters in host memory {in_host:.0f}"
    )
    verdicts.at_most("swap: memory after over before, difference", abs(after / before - 1), 0.02, note)


def churn(quick: bool, layout: BaseLayout, verdicts: Verdicts) -> None:
    count, each, rounds, drawn = (300, 64, 2, 160) if quick else (2000, 160, 5, 480)
    rng = np.random.default_rng(0)
    location = resolve_base(BASE).location
    prompts = cut_prompts(location, [PROMPT] * max(each, drawn))

    def rate(server: Served, among: int) -> float:
        """Requests a second, over the first `among` adapters alike."""
        names = [f"a{i}" for i in rng.permutation(each) % among]
        started = time.perf_counter()
        closed_loop(server, CLIENTS, names, prompts[:each], NEW_TOKENS)
        return each / (time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as folder:
        for directory, number in (("many", count), ("few", SLOTS)):
            save_many(layout, Path(folder) / directory, number, 2, ["q_proj", "v_proj"])
        with served(Path(folder) / "few", *CHURN_FLAGS) as few, served(Path(folder) / "many", *CHURN_FLAGS) as many:
            wait_until_read(many, count)
            rates = in_turns(
                {
                    "few": lambda: rate(few, SLOTS),
                    "in": lambda: rate(many, SLOTS),
                    "out": lambda: rate(many, 2 * SLOTS),
                },
                rounds,
            )
            told = {name: f"{statistics.median(each):.1f}" for name, each in rates.items()}
            note = f"{told['in']} against {told['few']} requests/s"
            verdicts.at_least(f"churn: 8 of {count} used, over 8 in all", ratio(rates["in"], rates["few"]), 0.9, note)
            note = f"{told['out']} against {told['few']} requests/s"
            verdicts.at_least(f"churn: 16 of {count} used, over 8 in all", ratio(rates["out"], rates["few"]), 0.6, note)
            for alpha in ALPHAS:
                names = [f"a{int(x * count)}" for x in rng.power(alpha, drawn)]
                _tell_waits(alpha, many, names, prompts[:drawn], verdicts)


def _tell_waits(alpha: float, server: Served, names: list[str], prompts: list[list[int]], verdicts: Verdicts) -> None:
    loads, started = server.metric("lora_loads_total"), time.perf_counter()
    answers = closed_loop(server, CLIENTS, names, prompts, NEW_TOKENS)
    taken = time.perf_counter() - started
    waits = sorted(a.wait_s for a in answers)
    mean = statistics.mean(a.taken_s for a in answers)
    note = (
        f"{len(answers)} answers of {len(set(names))} adapters, {len(names) / taken:.1f}/s, "
        f"{server.metric('lora_loads_total') - loads:.0f} loads; first token after {statistics.median(waits):.2f} s, "
        f"p99 {waits[int(len(waits) * 0.99)]:.2f}, longest {waits[-1]:.2f}; a request takes {mean:.2f}"
    )
    verdicts.at_most(f"churn: α = {alpha:g}: longest wait over a request's mean time", waits[-1] / mean, 4, note)


def loads(quick: bool, layout: BaseLayout, verdicts: Verdicts) -> None:
    pairs, rounds = (12, 1) if quick else (80, 5)
    names = [*(f"s{i}" for i in range(STREAMS)), *(f"c{i}" for i in range(2 * LOADS))]
    prompts = cut_prompts(resolve_base(BASE).location, [PROMPT] * STREAMS)
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(names):
            save_adapter(layout, Path(folder) / name, seed, CAUSAL_LM, rank=RANK)
        size = (Path(folder) / "c0" / "adapter_model.safetensors").stat().st_size / MB
        flags = ("--max-loras", str(STREAMS), "--max-cpu-loras", str(STREAMS + LOADS))
        with served(Path(folder), *flags) as server:
            wait_until_read(server, len(names))
            for kind, count in (("checkpoints", 2), ("arena files", rounds)):  # in two rounds each is read once
                before = server.metric("lora_arena_loads_total")
                found = [asyncio.run(_Streams(server, prompts).load(on_disk(server, LOADS))) for _ in range(count)]
                share = (server.metric("lora_arena_loads_total") - before) / (count * LOADS)
                _tell_slowed(kind, share, found, verdicts)
            more, resident = _first_tokens(server, on_disk(server, pairs), prompts[0])
            note = f"{size:.1f} MB; {statistics.median(resident) * 1e3:.0f} ms when it is in a slot"
            verdicts.at_most("loads: ms more to the first token, from disk", more * 1e3, 100, note)


def _tell_slowed(kind: str, share: float, found: list[tuple[float, float, float]], verdicts: Verdicts) -> None:
    """share: of the loads, from arena files."""
    slowed, mean, again = (statistics.median(each) for each in zip(*found, strict=True))
    rounds = ", ".join(f"{each[0]:.2f}" for each in found)
    note = f"{share:.0%} from arena files; rounds {rounds}; the mean {mean:.2f}; asked again {again:.2f}"
    verdicts.at_most(f"loads: time between tokens during {LOADS} from {kind}, over without", slowed, 1.15, note)


def _first_tokens(server: Served, names: Sequence[str], ids: Sequence[int]) -> tuple[float, list[float]]:
    """Median seconds more from disk than from a slot; the seconds from a slot."""

    async def run() -> tuple[list[float], list[float]]:
        async with clients(server, 1) as client:
            waits: list[list[float]] = [[], []]
            for name in names:
                for kind in waits:
                    kind.append((await complete(client, name, ids, 2)).wait_s)
        return waits[0], waits[1]

    before = server.metric("lora_loads_total")
    first, second = asyncio.run(run())
    loaded = server.metric("lora_loads_total") - before
    assert loaded == len(names), f"{loaded} of {len(names)} were loaded"
    return statistics.median(a - b for a, b in zip(first, second, strict=True)), second


class _Streams:
    """Eight streams that fill all slots, and what else comes while they run."""

    def __init__(self, server: Served, prompts: Sequence[Sequence[int]]) -> None:
        self._server = server
        self._prompts = prompts
        self._timed = [Timed(f"s{i}", 0.0) for i in range(STREAMS)]

    async def load(self, names: Sequence[str]) -> tuple[float, float, float]:
        """The median and the mean time between tokens while they are loaded, and the median when they were, each over
        that without loads."""
        async with clients(self._server, STREAMS + LOADS + 1) as client:
            running = [
                asyncio.create_task(complete(client, t.adapter, ids, 4000, t))
                for t, ids in zip(self._timed, self._prompts, strict=True)
            ]
            while not all(len(t.pieces_at) > 20 for t in self._timed):
                await asyncio.sleep(POLL_S)
            before = await self._window(client, QUIET_S)
            during = await self._ask(client, names, await self._loaded(client) + len(names))
            between = await self._window(client, QUIET_S)
            again = await self._ask(client, names, None)
            after = await self._window(client, QUIET_S)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        median, mean = statistics.median, statistics.mean
        return (
            2 * median(during) / (median(before) + median(between)),
            2 * mean(during) / (mean(before) + mean(between)),
            2 * median(again) / (median(between) + median(after)),
        )

    async def _ask(self, client: httpx.AsyncClient, names: Sequence[str], loads: float | None) -> list[float]:
        """Gaps while requests for `names` wait: until so many loads were made in all, or for some seconds."""
        waiting = [asyncio.create_task(complete(client, name, self._prompts[0], 1)) for name in names]
        begin = time.perf_counter()
        if loads is None:
            gaps = await self._window(client, QUIET_S)
        else:
            while await self._loaded(client) < loads:
                await asyncio.sleep(POLL_S)
            gaps = self._gaps(begin)
        assert not any(task.done() for task in waiting), "a request found a slot, or failed"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return gaps

    async def _window(self, client: httpx.AsyncClient, length_s: float) -> list[float]:
        begin = time.perf_counter()
        while time.perf_counter() < begin + length_s:
            await self._loaded(client)  # as often as when it is waited for
            await asyncio.sleep(POLL_S)
        return self._gaps(begin)

    def _gaps(self, begin: float) -> list[float]:
        return [gap for timed in self._timed for gap in timed.gaps(begin)]

    async def _loaded(self, client: httpx.AsyncClient) -> float:
        text = (await client.get("/metrics")).text
        return float(text.partition("\nmultilora:lora_loads_total ")[2].split()[0])


def many(quick: bool, layout: BaseLayout, verdicts: Verdicts) -> None:
    count, rounds = (1000, 1) if quick else (10_000, 3)
    found: dict[str, list[tuple[float, float]]] = {"empty": [], "first": [], "next": []}
    with tempfile.TemporaryDirectory() as folder:
        full, empty, store = (Path(folder) / name for name in ("full", "empty", "store"))
        empty.mkdir()
        save_many(layout, full, count, 1, ["layers.0.self_attn.q_proj"])
        _start(empty, store / "warm", 0)  # the base's files come into the page cache
        for turn in range(rounds):
            found["empty"].append(_start(empty, store / f"empty{turn}", 0))
            found["first"].append(_start(full, store / f"{turn}", count))
            found["next"].append(_start(full, store / f"{turn}", 0))
    ready = {name: statistics.median(seconds for seconds, _ in each) for name, each in found.items()}
    memory = {name: statistics.median(resident for _, resident in each) for name, each in found.items()}
    for name, target in (("first", "the first start"), ("next", "the next start")):
        note = f"{ready[name]:.1f} s against {ready['empty']:.1f} with none"
        verdicts.at_most(f"many: s more to /ready, {target}", ready[name] - ready["empty"], 5, note)
        note = f"{memory[name]:.0f} MB against {memory['empty']:.0f} with none"
        verdicts.at_most(f"many: MB more, {target}", memory[name] - memory["empty"], 100, note)


def _start(directory: Path, store: Path, unread: int) -> tuple[float, float]:
    """Seconds to /ready, and megabytes when so many were read."""
    with served(directory, store_dir=store) as server:
        httpx.get(f"{server.url}/v1/models").raise_for_status()
        wait_until_read(server, unread)
        return server.ready_s, server.status_kb("VmRSS") / 1e3


PARTS = {"swap": swap, "churn": churn, "loads": loads, "many": many}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    introduce("adapters that come and go")
    layout = load_base(resolve_base(BASE).location).layout
    verdicts = Verdicts()
    for name in options.parts or PARTS:
        PARTS[name](options.quick, layout, verdicts)
    verdicts.summary()


if __name__ == "__main__":
    main()

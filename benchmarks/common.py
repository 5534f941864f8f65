"""What the benchmarks share: random adapters as shipped ones are, measuring in turns, verdicts, a server of its own.

The machines are shared and their speed drifts, so nothing here judges an absolute time: every figure is a ratio of
things measured one right after the other, many times, and the median of it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from adapters.adapter import Adapter, AdapterInfo, Head, LoraPair
from adapters.arena import build_arena
from adapters.config import LoraConfig
from adapters.kernels import load_library
from adapters.layout import BaseLayout
from server.bases import load_tokenizer, resolve_base
from server.config import ServerConfig
from server.engine import request
from server.engine.base_model import load_base
from server.engine.engine import Engine
from server.engine.request import SamplingParams

RANK = 16
LABELS = 3
B_SCALE = 0.02
"""Of B beside an A of 1/√d_in: the LoRA term is then about a tenth of the base's product, as in trained adapters."""
TEXT = (Path(__file__).parent / "prompts.txt").read_text()
Tokens = list[list[int]]


# Adapters and prompts


def random_pairs(layout: BaseLayout, seed: int, rank: int, dtype: torch.dtype) -> dict[str, LoraPair]:
    """Random factors for every linear layer of the base; in fp32 they fit into no 16 bits."""
    rng = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, shape in layout.linears.items():
        a = torch.randn(rank, shape.d_in, generator=rng) / math.sqrt(shape.d_in)
        b = torch.randn(shape.d_out, rank, generator=rng) * B_SCALE
        pairs[name] = LoraPair(a.to(dtype), b.to(dtype), 2.0)
    return pairs


def random_head(layout: BaseLayout, seed: int) -> Head:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(LABELS, layout.hidden_size, generator=rng) / math.sqrt(layout.hidden_size)
    return Head(weight, torch.randn(LABELS, generator=rng))


def targets(layout: BaseLayout) -> list[str]:
    """The linear layers by the last part of their names."""
    return sorted({name.rpartition(".")[2] for name in layout.linears})


def make_adapter(
    layout: BaseLayout, seed: int, task: str = request.CAUSAL_LM, rank: int = RANK, dtype: torch.dtype = torch.float16
) -> Adapter:
    """As `read_checkpoint` gives it, in memory of its own."""
    config = LoraConfig(rank, 2 * rank, tuple(targets(layout)), task)
    arena = build_arena(random_pairs(layout, seed, rank, dtype))
    head = random_head(layout, seed) if task == request.SEQ_CLS else None
    return Adapter(
        info=AdapterInfo(
            digest=f"{task} {rank} {dtype} {seed}",
            task_type=task,
            rank=rank,
            labels=tuple(map(str, range(LABELS))) if head else (),
            problem_type="single_label_classification",
            num_bytes=arena.memory.nbytes,
        ),
        config=config,
        pairs=arena.pairs,
        memory=arena.memory,
        head=head,
    )


def save_adapter(  # noqa: PLR0913, PLR0917
    layout: BaseLayout,
    directory: Path,
    seed: int,
    task: str,
    dtype: torch.dtype = torch.float16,
    rank: int = RANK,
) -> None:
    """A PEFT checkpoint with the weights of `make_adapter`."""
    inner = task == request.FEATURE_EXTRACTION or not layout.prefix
    prefix = "" if inner else f"{layout.prefix}."
    tensors: dict[str, Tensor] = {}
    for name, pair in random_pairs(layout, seed, rank, dtype).items():
        tensors[f"base_model.model.{prefix}{name}.lora_A.weight"] = pair.a
        tensors[f"base_model.model.{prefix}{name}.lora_B.weight"] = pair.b
    config = {"peft_type": "LORA", "task_type": task, "r": rank, "lora_alpha": 2 * rank,
              "target_modules": targets(layout), "modules_to_save": None}  # fmt: skip
    if task == request.SEQ_CLS:
        head = random_head(layout, seed)
        assert head.bias is not None
        tensors |= {"base_model.model.classifier.weight": head.weight, "base_model.model.classifier.bias": head.bias}
        config["modules_to_save"] = ["classifier"]
    directory.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))


def with_adapters(model: Any, folder: Path, count: int) -> Any:
    """peft's own, of a transformers model, with the checkpoints a0, a1, … in `folder`."""
    patched = PeftModel.from_pretrained(model, folder / "a0", adapter_name="a0")
    for i in range(1, count):
        patched.load_adapter(folder / f"a{i}", adapter_name=f"a{i}")
    return patched.eval()


def cut_prompts(location: str, lengths: Sequence[int]) -> Tokens:
    """Different prompts of these lengths, cut from prompts.txt."""
    ids = load_tokenizer(location)(TEXT, verbose=False)["input_ids"]
    while len(ids) < 2 * max(lengths):
        ids = ids + ids
    starts = [i * (len(ids) - max(lengths)) // len(lengths) for i in range(len(lengths))]
    return [ids[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def around(length: int, count: int) -> list[int]:
    """`count` lengths from a quarter less to a quarter more than `length`."""
    return [length * 3 // 4 + i * length // (2 * max(count - 1, 1)) for i in range(count)]


# The engine


def make_engine(base: str, adapters: Callable[[BaseLayout], Mapping[str, Adapter]], **settings: Any) -> Engine:
    """An engine in this thread, with its adapters registered."""
    model = load_base(resolve_base(base).location)
    engine = Engine(ServerConfig(base=base, **settings), model, base)
    for name, adapter in adapters(engine.base.layout).items():
        engine.registry.put(name, adapter)
    return engine


def add_sequence(
    engine: Engine, number: int, ids: list[int], name: str | None, max_tokens: int = 1, **sampling: Any
) -> request.Sequence:
    """Queue one request of the adapter's own task, or the base's; generation goes on past its end, and is greedy where
    `sampling` (fields of SamplingParams) says nothing else."""
    version = engine.registry.acquire(name) if name else None
    default = request.CAUSAL_LM if engine.base.causal else request.FEATURE_EXTRACTION
    task = version.info.task_type if version else default
    params = None
    if task == request.CAUSAL_LM:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **{"temperature": 0.0, **sampling})
    sequence = request.Sequence(number, task, ids, version, params, engine.base.eos_ids)
    engine.add(sequence)
    return sequence


# Measuring


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turns(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each variant measured in each round: A B C, B C A, … after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = variants[name]()
            if turn:
                times[name].append(taken)
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over the rounds of over / under."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


@dataclass
class Verdicts:
    """Figures with their targets, as they are printed; at the end, how many were missed."""

    missed: int = 0
    judged: int = 0

    def at_most(self, what: str, value: float, target: float, note: str = "", excused: bool = False) -> None:
        """excused: reached by another measure, which `note` tells."""
        self._line(what, value, f"≤ {target:g}", value <= target or excused, note)

    def at_least(self, what: str, value: float, target: float, note: str = "") -> None:
        self._line(what, value, f"≥ {target:g}", value >= target, note)

    def told(self, what: str, value: float, note: str = "") -> None:
        """A figure without a target."""
        print(f"  {what:<58} {value:8.2f}{'':>20} {note}", flush=True)

    def summary(self) -> None:
        print(f"{self.judged - self.missed} of {self.judged} targets reached", flush=True)

    def _line(self, what: str, value: float, target: str, reached: bool, note: str) -> None:
        self.judged += 1
        self.missed += not reached
        print(f"  {what:<58} {value:8.3f}  {target:<7} {'reached' if reached else 'MISSED ':<8}  {note}", flush=True)


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cases: a look, not a measurement")
    return parser


def introduce(title: str) -> None:
    """Quiet libraries, and a line about the machine."""
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")  # peft 0.21 on transformers 5.23
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    capability = torch.backends.cpu.get_cpu_capability()
    kernels = "our CPU kernels" if load_library() else "WITHOUT the CPU kernels"
    print(f"{title} ({platform.machine()}, {capability}, {torch.get_num_threads()} threads, {kernels})", flush=True)


# A server of its own


@dataclass
class Served:
    """`multilora serve` in a process of its own."""

    url: str
    process: subprocess.Popen[bytes]
    ready_s: float = 0.0
    """From its process's start to its being ready."""

    def status_kb(self, field: str) -> int:
        """A line of /proc/…/status, such as VmHWM, in kB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    def metric(self, name: str) -> float:
        """The sum of a metric's series, of a name without its prefix."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        series = [line for line in lines if re.match(rf"multilora:{name}[ {{]", line)]
        return sum(float(line.rpartition(" ")[2]) for line in series)


@contextmanager
def served(
    adapter_dir: Path | None, *flags: str, store_dir: Path | None = None, python: str = sys.executable
) -> Iterator[Served]:
    """Start, wait until ready, and end by its id. store_dir: where its store is kept, else it is thrown away.

    python: what runs it.
    """
    with ExitStack() as cleaning:
        store = store_dir or cleaning.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        yield cleaning.enter_context(_served(adapter_dir, python, "--store-dir", str(store), *flags))


@contextmanager
def _served(adapter_dir: Path | None, python: str, *flags: str) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "server", "serve", "--port", str(port), "--log-level", "warning", *flags]
    if adapter_dir is not None:
        command += ["--adapter-dir", str(adapter_dir)]
    started = time.monotonic()
    process = subprocess.Popen(command)
    running = Served(f"http://127.0.0.1:{port}", process)
    try:
        _wait_ready(running)
        running.ready_s = time.monotonic() - started
        yield running
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(running: Served, limit_s: float = 180.0) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if running.process.poll() is not None:
            raise RuntimeError(f"the server ended with status {running.process.returncode}")
        try:
            if httpx.get(f"{running.url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the server was not ready after {limit_s:.0f} s")

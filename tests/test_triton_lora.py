"""The Triton kernels equal the reference in Triton's interpreter, and compile for every GPU that they are meant for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.batch import NO_SLOT, LoraBatch, Segment
from adapters.kernels.contract import LoraTerm, LoraWeights
from adapters.kernels.reference import add_lora_reference
from tests.kernel_grid import POPULARITY, slots_of
from tests.triton_support import ARCHS, Case, compile_cases, interpreted

triton = pytest.importorskip("triton")

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
CPU = torch.device("cpu")
RANKS = [1, 64, 2, 0, 16, 5, 33]
# max |kernel − reference| / max |reference|, by the dtype of y: one last place, for the interpreter cuts bf16 off
TOLERANCE = {FP32: 1e-5, FP16: 2e-3, BF16: 1.6e-2}


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted("adapters.kernels.triton_kernels", "adapters.kernels.triton_lora") as module:
        yield module


def random_weights(
    d_in: int, d_out: int, pool: torch.dtype, ranks: Sequence[int] = RANKS, seed: int = 0
) -> LoraWeights:
    """Rank 0: no term. Every other slot has a bias."""
    rng = torch.Generator().manual_seed(seed + d_out)
    weights = LoraWeights(d_in, d_out, len(ranks))
    for slot, rank in enumerate(ranks):
        a = torch.randn(rank, d_in, generator=rng) / d_in**0.5
        b = torch.randn(rank, d_out, generator=rng)
        bias = torch.randn(d_out, generator=rng) if slot % 2 else None
        weights.set(slot, LoraTerm(a.to(pool), b.to(pool), 0.3 + slot, bias))
    return weights


def random_rows(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    rng = torch.Generator().manual_seed(tokens + width)
    return torch.randn(tokens, width, generator=rng).to(dtype)


def strided(rows: Tensor) -> Tensor:
    """The same values, as columns in the middle of a wider tensor."""
    wide = torch.full((len(rows), rows.shape[1] + 8), 7.0, dtype=rows.dtype)
    wide[:, 3:-5] = rows
    return wide[:, 3:-5]


def assert_equals_the_reference(
    kernel: Any, group: Sequence[LoraWeights], batch: LoraBatch, dtype: torch.dtype, stride: bool = False
) -> None:
    x = random_rows(batch.num_tokens, group[0].d_in, dtype)
    before = [random_rows(batch.num_tokens, weights.d_out, dtype) for weights in group]
    expected = [y.clone() for y in before]
    add_lora_reference(expected, x, group, batch)
    ys = [strided(y) if stride else y.clone() for y in before]
    x_given = strided(x) if stride else x.clone()
    kernel(ys, x_given, group, batch)

    assert torch.equal(x_given, x)
    slots = [NO_SLOT] * batch.num_tokens
    for slot, start, end in batch.segments:
        slots[start:end] = [slot] * (end - start)
    for y, base, reference, weights in zip(ys, before, expected, group, strict=True):
        touched = torch.tensor([s != NO_SLOT and weights.terms[s] is not None for s in slots], dtype=torch.bool)
        assert torch.equal(y[~touched], base[~touched]), "rows without a term must stay as they are, bit for bit"
        if stride and y._base is not None:
            assert bool((y._base[:, :3] == 7).all())
            assert bool((y._base[:, -5:] == 7).all())
        if touched.any():
            assert not torch.equal(reference[touched], base[touched])
            error = (y[touched].float() - reference[touched].float()).abs().max()
            assert error <= TOLERANCE[dtype] * reference[touched].float().abs().max()


# hundreds of segments of one token are hundreds of programs: seconds each in the interpreter, and 32 tokens say it
GRID = [(n, p) for n in (0, 1, 7, 32, 300) for p in POPULARITY if n < 300 or p not in ("distinct", "unsorted")]


@pytest.mark.parametrize(("tokens", "popularity"), GRID)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
def test_kernel_equals_the_reference(kernels: ModuleType, dtype: torch.dtype, tokens: int, popularity: str) -> None:
    batch = LoraBatch.of_slots(slots_of(popularity, tokens, len(RANKS)))
    assert_equals_the_reference(kernels.TritonLora(CPU, dtype, 64), [random_weights(48, 80, dtype)], batch, dtype)


@pytest.mark.parametrize(("x_dtype", "pool"), [(x, pool) for x, pool in product(TOLERANCE, TOLERANCE) if x != pool])
def test_activations_and_pool_of_different_dtypes(kernels: ModuleType, x_dtype: torch.dtype, pool: torch.dtype) -> None:
    batch = LoraBatch.of_slots(slots_of("zipf", 32, len(RANKS)))
    assert_equals_the_reference(kernels.TritonLora(CPU, pool, 64), [random_weights(48, 80, pool)], batch, x_dtype)


@pytest.mark.parametrize("popularity", ["distinct", "uniform", "skewed"])
@pytest.mark.parametrize("d_outs", [[200], [64, 130], [144, 48, 80], [24, 130, 8, 40]], ids=str)
def test_layers_that_share_x_and_rows_apart(kernels: ModuleType, d_outs: list[int], popularity: str) -> None:
    """d_in is split; each layer lacks a term in another slot; rows of x and y are not neighbours in memory."""
    assert kernels.split(576, 9, 128)[0] > 1
    group = [random_weights(576, d_out, FP16, [0 if s == i else r or 8 for s, r in enumerate(RANKS)])
             for i, d_out in enumerate(d_outs)]  # fmt: skip
    batch = LoraBatch.of_slots(slots_of(popularity, 32, len(RANKS)))
    assert_equals_the_reference(kernels.TritonLora(CPU, FP16, 64), group, batch, FP16, stride=True)


@pytest.mark.parametrize(
    "segments",
    [(), (Segment(3, 0, 6),), (Segment(1, 0, 0), Segment(4, 2, 5), Segment(1, 5, 5)), (Segment(0, 3, 3),)],
    ids=["no segment", "no term in the slot", "empty segments", "only an empty segment"],
)
def test_little_or_nothing_to_do(kernels: ModuleType, segments: tuple[Segment, ...]) -> None:
    kernel = kernels.TritonLora(CPU, FP32, 64)
    assert_equals_the_reference(kernel, [random_weights(48, 80, FP32)], LoraBatch(segments, 6), FP32)
    without = [random_weights(48, 80, FP32, [0] * len(RANKS))]
    assert_equals_the_reference(kernel, without, LoraBatch(segments, 6), FP32)


def test_slots_change_between_calls(kernels: ModuleType) -> None:
    """One kernel object, the same weights and batch objects, other terms; then larger and smaller batches."""
    kernel = kernels.TritonLora(CPU, FP32, 64)
    weights, other = random_weights(48, 80, FP32), random_weights(48, 80, FP32, [*reversed(RANKS)], seed=1)
    batch = LoraBatch.of_slots(slots_of("uniform", 32, len(RANKS)))
    assert_equals_the_reference(kernel, [weights], batch, FP32)
    address = kernel._tables[(weights,)].words.data_ptr()
    for slot in (0, 3, 1):
        weights.set(slot, other.terms[slot])
        assert_equals_the_reference(kernel, [weights], batch, FP32)
    weights.set(1, None)
    assert_equals_the_reference(kernel, [weights, other], batch, FP32)
    assert kernel._tables[(weights,)].words.data_ptr() == address
    for tokens in (90, 3):
        assert_equals_the_reference(
            kernel, [weights], LoraBatch.of_slots(slots_of("distinct", tokens, len(RANKS))), FP32
        )


def test_a_captured_launch_serves_other_batches_and_terms(kernels: ModuleType) -> None:
    """As a graph repeats it: the same launches, grids and addresses, with other blocks and tables in them."""
    kernel, tokens, max_loras = kernels.TritonLora(CPU, FP32, 64), 20, 3
    group = [LoraWeights(576, d_out, max_loras) for d_out in (48, 200)]
    blocks = torch.zeros(kernel.most_blocks(tokens, max_loras), 3, dtype=torch.int32)
    x = random_rows(tokens, 576, FP32)
    ys = [random_rows(tokens, weights.d_out, FP32) for weights in group]
    before = [y.clone() for y in ys]
    launched: list[Any] = []
    with pytest.MonkeyPatch.context() as patch, kernel.holding(blocks):
        for name in ("shrink_kernel", "expand_kernel"):
            patch.setattr(kernels, name, Recorded(getattr(kernels, name), launched))
        kernel(ys, x, group, LoraBatch.of_slots([0] * tokens))
    assert all(torch.equal(y, z) for y, z in zip(ys, before, strict=True)), "no slot holds anything yet"
    for seed, slots in enumerate(([0] * 20, [NO_SLOT] * 3 + [0] * 2 + [1] * 15, [NO_SLOT] * 20, [*range(3)])):
        batch = LoraBatch.of_slots(slots)
        for weights in group:
            for slot, term in enumerate(random_weights(576, weights.d_out, FP32, [5, 0, 64], seed).terms):
                weights.set((slot + seed) % max_loras, term)
        for y, z in zip(ys, before, strict=True):
            y.copy_(z)
        expected = [y.clone() for y in before]
        add_lora_reference(expected, x, group, batch)
        kernel.refresh()
        blocks.copy_(torch.tensor(kernel.blocks_of(batch, len(blocks))))
        for launch in launched:
            launch()
        for y, reference in zip(ys, expected, strict=True):
            assert float((y - reference).abs().max()) <= TOLERANCE[FP32] * float(reference.abs().max())


class Recorded:
    """Launches a kernel, and keeps what repeats that."""

    def __init__(self, kernel: Any, launched: list[Any]) -> None:
        self.kernel = kernel
        self.launched = launched

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            self.launched.append(lambda: self.kernel[grid](*args, **constants))
            self.launched[-1]()

        return launch


def test_graphs_take_terms_on_even_addresses_only(kernels: ModuleType) -> None:
    weights = LoraWeights(48, 80, 1)
    kernel = kernels.TritonLora(CPU, FP16, 8)
    batch = LoraBatch.of_slots([0])
    blocks = torch.zeros(kernel.most_blocks(1, 1), 3, dtype=torch.int32)
    with kernel.holding(blocks):
        kernel([random_rows(1, 80, FP16)], random_rows(1, 48, FP16), [weights], batch)
    kernel.refresh()
    memory = torch.randn(1 + 8 * (48 + 80)).to(FP16)
    weights.set(0, LoraTerm(memory[1:385].view(8, 48), memory[385:].view(8, 80), 0.5))
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        kernel.refresh()


def test_no_batch_takes_more_blocks_than_most(kernels: ModuleType) -> None:
    kernel = kernels.TritonLora
    for tokens, max_loras in product([1, 2, 15, 16, 17, 33, 64], [1, 3, 40]):
        counts = []
        for adapters in range(min(tokens, max_loras) + 1):  # one token for each adapter but the last
            slots = (
                [*range(adapters - 1), *[adapters - 1] * (tokens - adapters + 1)] if adapters else [NO_SLOT] * tokens
            )
            room = kernel.most_blocks(tokens, max_loras)
            counts.append(sum(end > start for _, start, end in kernel.blocks_of(LoraBatch.of_slots(slots), room)))
        assert max(counts) <= kernel.most_blocks(tokens, max_loras) <= tokens


def test_terms_that_lie_on_odd_addresses(kernels: ModuleType) -> None:
    weights = LoraWeights(48, 80, 1)
    memory = torch.randn(1 + 8 * (48 + 80)).to(FP16)
    weights.set(0, LoraTerm(memory[1:385].view(8, 48), memory[385:].view(8, 80), 0.5))
    kernel = kernels.TritonLora(CPU, FP16, 8)
    assert_equals_the_reference(kernel, [weights], LoraBatch.of_slots([0, 0, NO_SLOT, 0]), FP16)
    assert kernel._tables[(weights,)].alignment == 2


def test_the_same_bits_again_whatever_the_scratch_held(kernels: ModuleType) -> None:
    group = [random_weights(576, 80, FP16), random_weights(576, 48, FP16)]
    batch = LoraBatch.of_slots(slots_of("zipf", 32, len(RANKS)))
    x, kernel = random_rows(32, 576, FP16), kernels.TritonLora(CPU, FP16, 64)
    first = [random_rows(32, weights.d_out, FP16) for weights in group]
    again = [y.clone() for y in first]
    kernel(first, x, group, batch)
    kernel._scratch.fill_(float("nan"))
    kernel(again, x, group, batch)
    assert all(torch.equal(y, z) for y, z in zip(first, again, strict=True))


def test_what_the_kernels_cannot_do_is_refused(kernels: ModuleType) -> None:
    x, batch = random_rows(2, 48, FP16), LoraBatch.of_slots([1, 1])
    weights = random_weights(48, 80, FP16)
    y = random_rows(2, 80, FP16)
    with pytest.raises(ValueError, match=r"torch\.float16 of rank 1 .* take torch\.bfloat16 up to rank 64"):
        kernels.TritonLora(CPU, BF16, 64)([y], x, [weights], batch)
    with pytest.raises(ValueError, match=r"of rank 64 .* up to rank 32"):
        kernels.TritonLora(CPU, FP16, 32)([y], x, [weights], batch)
    with pytest.raises(ValueError, match="outputs of one dtype"):
        kernels.TritonLora(CPU, FP16, 64)([y, y.float()], x, [weights, weights], batch)


def test_splits_cover_the_input(kernels: ModuleType) -> None:
    for d_in, programs, block_k in product([1, 31, 48, 576, 1536, 4096, 14336], [1, 3, 96, 511, 5000], [32, 128]):
        splits, span = kernels.split(d_in, programs, block_k)
        assert span % block_k == 0
        assert (splits - 1) * span < d_in <= splits * span


class Launch:
    """Stands for a kernel and keeps what it was launched with."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.constants: dict[str, Any] = {}

    def __getitem__(self, grid: object) -> Launch:
        return self

    def __call__(self, *args: Any, **constants: Any) -> None:
        self.args, self.constants = args, constants


def launches(module: Any, x_dtype: torch.dtype, pool: torch.dtype, tokens: int) -> list[tuple[Any, Launch]]:
    """(kernel, what it would be launched with) for one segment of `tokens` tokens."""
    kernels = [module.shrink_kernel, module.expand_kernel]
    recorded = [Launch(), Launch()]
    with pytest.MonkeyPatch.context() as patch:
        for kernel, launch in zip(kernels, recorded, strict=True):
            patch.setattr(module, kernel.fn.__name__, launch)
        group = [random_weights(576, d_out, pool, [64]) for d_out in (576, 192, 192)]
        ys = [random_rows(tokens, weights.d_out, x_dtype) for weights in group]
        x, batch = random_rows(tokens, 576, x_dtype), LoraBatch.of_slots([0] * tokens)
        module.TritonLora(CPU, pool, 64)(ys, x, group, batch)
    return list(zip(kernels, recorded, strict=True))


def compile_all() -> None:
    """Every kernel as it would be launched × dtypes × GPU; prints a JSON list of what came out. Not interpreted."""
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    import adapters.kernels.triton_lora as module

    cases = []
    for (x, pool), tokens in product(product(TOLERANCE, TOLERANCE), [300, 7]):
        if tokens == 7 and x != pool:
            continue
        for kernel, launch in launches(module, x, pool, tokens):
            given = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.constants
            free = {p.name for p in kernel.params if p.do_not_specialize}
            signature = {n: "constexpr" if n in launch.constants else mangle_type(given[n]) for n in kernel.arg_names}
            aligned = {
                (i,): [["tt.divisibility", 16]]
                for i, n in enumerate(kernel.arg_names)
                if n not in launch.constants
                and n not in free
                and (given[n].data_ptr() if isinstance(given[n], Tensor) else given[n]) % 16 == 0
            }
            source = ASTSource(kernel, signature, launch.constants, aligned)
            for arch in ARCHS:
                known = {
                    "case": f"{kernel.fn.__name__} sm_{arch} {x} {pool} {tokens}",
                    "arch": f".target sm_{arch}",
                    "expected": kernel.fn.__name__ == "shrink_kernel" and x == pool != FP32,
                }
                cases.append(Case(source, arch, known))
    sys.stdout.write(json.dumps(compile_cases(cases, seen)))


def seen(compiled: Any) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    return {
        "cubin": compiled.asm["cubin"][:4].decode("latin1"),
        "target": next(line for line in ptx.splitlines() if line.startswith(".target")),
        "tensor_cores": "mma" in ptx,
        "tf32": "tf32" in ptx,
        "wide_loads": "ld.global.v4" in ptx,
    }


def test_kernels_compile_ahead_of_time(tmp_path: Path) -> None:
    """In a process of its own: here the kernels are the interpreter's."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from tests.test_triton_lora import compile_all; compile_all()"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 2 * 3 * (9 + 3)
    for result in results:
        case = result["case"]
        assert result["cubin"] == "\x7fELF", case
        assert result["target"].startswith(result["arch"]), case
        assert result["tensor_cores"] == result["expected"], case
        assert not result["tf32"], case
        assert result["wide_loads"], case

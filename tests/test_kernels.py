"""Every kernel equals the reference over dtype × ranks × tokens × popularity; the reference equals the formula."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import adapters.kernels
from adapters.batch import NO_SLOT, LoraBatch, Segment
from adapters.kernels import (
    KERNEL_NAMES,
    AddLora,
    KernelNotAvailable,
    LoraTerm,
    LoraWeights,
    NativeLora,
    add_lora_reference,
    add_lora_segments,
    choose_kernel,
)
from adapters.kernels.contract import POOL_DTYPES
from adapters.kernels.library import usable_targets
from tests.kernel_grid import POPULARITY, slots_of
from tests.native_support import library_of, torch_threads

D_IN, D_OUTS = 27, (40, 7, 83)
"""No multiples of a vector, and less than one; the layers are q, k and v of one input."""
RANKS = [1, 64, 2, 0, 16, 4, 8, 3, 5, 17]
MISSING = {(0, 4), (1, 1), (2, 8)}
"""(layer, slot): the slot's adapter has no term for this layer. Slot 3 has none at all."""
TOKENS = [0, 1, 2, 7, 32, 300]
TOLERANCE = 1e-5
"""max |kernel − reference| / max |reference|: all arithmetic is fp32, whatever the pool's dtype."""
POOLS = {"fp32": [torch.float32], "fp16": [torch.float16], "bf16": [torch.bfloat16], "mixed": [*POOL_DTYPES]}
CPU = torch.device("cpu")


def amid_nan(numbers: Tensor) -> Tensor:
    """The same numbers with NaN before and after them, so that one who uses those is seen."""
    room = torch.full((numbers.numel() + 128,), float("nan"), dtype=numbers.dtype)
    room[64:-64] = numbers.flatten()
    return room[64:-64].view(numbers.shape)


def term(rng: torch.Generator, rank: int, d_in: int, d_out: int, dtype: torch.dtype, with_bias: bool) -> LoraTerm:
    a, b = torch.randn(rank, d_in, generator=rng), torch.randn(rank, d_out, generator=rng)
    bias = amid_nan(torch.randn(d_out, generator=rng)) if with_bias else None
    return LoraTerm(amid_nan(a.to(dtype)), amid_nan(b.to(dtype)), 0.3 + rank / 100, bias)


@cache
def random_group(pool: str, with_bias: bool) -> list[LoraWeights]:
    """All slots of all layers; where there are biases, every other term has one."""
    group, rng = [], torch.Generator().manual_seed(0)
    for layer, d_out in enumerate(D_OUTS):
        weights = LoraWeights(D_IN, d_out, len(RANKS))
        for slot, rank in enumerate(RANKS):
            if rank and (layer, slot) not in MISSING:
                dtype = POOLS[pool][slot % len(POOLS[pool])]
                weights.set(slot, term(rng, rank, D_IN, d_out, dtype, with_bias and (slot + layer) % 2 == 1))
        group.append(weights)
    return group


def random_rows(tokens: int, *widths: int, dtype: torch.dtype = torch.float32, pad: int = 0) -> list[Tensor]:
    """[tokens, width] each; pad: so many NaN stand between the rows."""
    rng = torch.Generator().manual_seed(tokens)
    rows = []
    for width in widths:
        room = torch.full((tokens, width + pad), float("nan"), dtype=dtype)
        room[:, :width] = torch.randn(tokens, width, generator=rng).to(dtype)
        rows.append(room[:, :width])
    return rows


@cache
def expected_rows(pool: str, tokens: int, popularity: str, with_bias: bool) -> list[Tensor]:
    """By the reference."""
    x, *ys = random_rows(tokens, D_IN, *D_OUTS)
    add_lora_reference(
        ys, x, random_group(pool, with_bias), LoraBatch.of_slots(slots_of(popularity, tokens, len(RANKS)))
    )
    return ys


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max()) if expected.numel() else 0.0


def kernel_of(name: str) -> AddLora:
    if name in ("reference", "torch"):
        return {"reference": add_lora_reference, "torch": add_lora_segments}[name]
    return NativeLora(library_of(name))


NATIVE = usable_targets()
ALL = ["reference", "torch", *NATIVE]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The reference is thousands of tiny products: threads gain nothing and wait for one another on a busy machine."""
    with torch_threads(1):
        yield


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", ALL[1:])
def test_kernel_equals_the_reference(name: str, pool: str, tokens: int, popularity: str, with_bias: bool) -> None:
    """Groups of one to three layers; rows that stand apart in memory and rows that do not."""
    kernel, group, slots = kernel_of(name), random_group(pool, with_bias), slots_of(popularity, tokens, len(RANKS))
    batch, expected = LoraBatch.of_slots(slots), expected_rows(pool, tokens, popularity, with_bias)
    for count, pad in ((1, 0), (2, 5), (3, 0), (3, 37)):
        x, *before = random_rows(tokens, D_IN, *D_OUTS, pad=pad)
        x_before = x.clone()
        rooms = [torch.cat([y, torch.full((tokens, pad), 7.0)], dim=1) for y in before[:count]]
        ys = [room[:, :d_out] for room, d_out in zip(rooms, D_OUTS, strict=False)]
        kernel(ys, x, group[:count], batch)
        assert torch.equal(x, x_before)
        for layer, (y, room) in enumerate(zip(ys, rooms, strict=True)):
            terms = group[layer].terms
            untouched = torch.tensor([s == NO_SLOT or terms[s] is None for s in slots], dtype=torch.bool)
            assert torch.equal(y[untouched], before[layer][untouched]), "rows without a term must stay, bit for bit"
            assert bool((room[:, D_OUTS[layer] :] == 7.0).all()), "what stands between the rows is not the kernel's"
            got, reference = y[~untouched], expected[layer][~untouched]
            assert not len(reference) or not torch.equal(reference, before[layer][~untouched])
            assert relative_error(got, reference) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_rows_of_16_bits_are_computed_in_fp32_and_rounded_once(tokens: int, dtype: torch.dtype) -> None:
    group, batch = random_group("mixed", True), LoraBatch.of_slots(slots_of("uniform", tokens, len(RANKS)))
    x, *ys = random_rows(tokens, D_IN, *D_OUTS, dtype=dtype)
    expected = [y.float() for y in ys]
    add_lora_segments(ys, x, group, batch)
    add_lora_reference(expected, x.float(), group, batch)
    for y, reference in zip(ys, expected, strict=True):
        assert y.dtype == dtype
        assert bool(((y.float() - reference).abs() <= torch.finfo(dtype).eps * reference.abs() + 1e-4).all())


def formula(ys: Sequence[Tensor], x: Tensor, group: Sequence[LoraWeights], batch: LoraBatch) -> list[Tensor]:
    """y + scaling · (x Aᵀ) Bᵀ + bias in fp64."""
    results = []
    for y, weights in zip(ys, group, strict=True):
        result = y.double()
        for slot, start, end in batch.segments:
            found = weights.terms[slot]
            if found is not None:
                result[start:end] += found.scaling * (x[start:end].double() @ found.a.double().T) @ found.b.double()
                result[start:end] += 0.0 if found.bias is None else found.bias.double()
        results.append(result)
    return results


@pytest.mark.parametrize("rank", [rank for rank in RANKS if rank])
@pytest.mark.parametrize("name", ALL)
def test_every_kernel_is_the_plain_formula(name: str, rank: int) -> None:
    rng = torch.Generator().manual_seed(rank)
    weights = LoraWeights(D_IN, D_OUTS[0], 1)
    weights.set(0, term(rng, rank, D_IN, D_OUTS[0], torch.float32, with_bias=True))
    x, y = random_rows(5, D_IN, D_OUTS[0])
    batch = LoraBatch.of_slots([0] * 5)
    (expected,) = formula([y], x, [weights], batch)
    kernel_of(name)([y], x, [weights], batch)
    assert relative_error(y, expected) <= 1e-6


@cache
def real_group(d_in: int, d_outs: tuple[int, ...]) -> list[LoraWeights]:
    """Shapes of SmolLM2; every rank and dtype, biases in between."""
    group, rng = [], torch.Generator().manual_seed(d_in)
    for layer, d_out in enumerate(d_outs):
        weights = LoraWeights(d_in, d_out, len(RANKS))
        for slot, rank in enumerate(RANKS):
            if rank and not (layer == 1 and slot == 2):
                dtype = POOL_DTYPES[(slot + layer) % 3]
                weights.set(slot, term(rng, rank, d_in, d_out, dtype, with_bias=slot % 3 == 1))
        group.append(weights)
    return group


LENGTHS: dict[str, list[int]] = {
    "one each": [1] * 10,
    "one each, many": [1] * 40,
    "few": [2, 1],
    "around what counts as short": [7, 8, 9, 10, 8, 1],
    "one segment to the border": [128],
    "one segment over the border": [129],
    "borders inside": [100, 60, 3, 90, 30],
    "long beside short": [130, 1, 1, 1, 1, 8, 1],
    "short around the border": [*[5] * 25, 1, 1, 1, *[4] * 5],
    "a long one at the end": [1, 1, 1, 1, 300],
    "threads with nothing to do": [1, 2, 3],
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(
    ("d_in", "d_outs"), [(576, (576, 192, 192)), (576, (1536, 1536)), (1536, (576,)), (130, (33, 250))]
)
@pytest.mark.parametrize("name", NATIVE)
def test_work_that_is_cut_between_threads(
    name: str, d_in: int, d_outs: tuple[int, ...], lengths: list[int], threads: int
) -> None:
    """Base rows stand between the segments; slots in no order."""
    group, slots, start, segments = real_group(d_in, d_outs), random.Random(sum(lengths)), 1, []
    for length in lengths:
        segments.append(Segment(slots.randrange(len(RANKS)), start, start + length))
        start += length + slots.randrange(3)
    batch = LoraBatch(tuple(segments), start + 1)
    x, *ys = random_rows(start + 1, d_in, *d_outs, pad=3)
    expected = formula(ys, x, group, batch)
    with torch_threads(threads):
        kernel_of(name)(ys, x, group, batch)
    ends = [Segment(NO_SLOT, 0, 0), *segments, Segment(NO_SLOT, start + 1, start + 1)]
    between = [(a.end, b.start) for a, b in pairwise(ends)]
    for y, before, reference in zip(ys, random_rows(start + 1, d_in, *d_outs, pad=3)[1:], expected, strict=True):
        assert relative_error(y, reference) <= TOLERANCE
        assert all(torch.equal(y[a:b], before[a:b]) for a, b in between)


@pytest.mark.parametrize("name", NATIVE)
def test_a_call_after_a_larger_one_gives_the_same_bits(name: str) -> None:
    """Working memory that is left over from another call has no influence."""
    kernel, group = kernel_of(name), random_group("mixed", True)
    batch = LoraBatch.of_slots([5, 5, 8, NO_SLOT, 9])
    x, *fresh = random_rows(5, D_IN, *D_OUTS)
    kernel(fresh, x, group, batch)
    big_x, *big = random_rows(300, D_IN, *D_OUTS)
    kernel(big, big_x * float("nan"), group, LoraBatch.of_slots([1] * 300))
    x, *after = random_rows(5, D_IN, *D_OUTS)
    kernel(after, x, group, batch)
    assert all(torch.equal(a, b) for a, b in zip(after, fresh, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_nan_in_one_token_stays_there(name: str) -> None:
    group, slots = random_group("mixed", True), [1, 1, 1, 9, 9, NO_SLOT, *[4] * 12]
    batch = LoraBatch.of_slots(slots)
    x, *ys = random_rows(len(slots), D_IN, *D_OUTS)
    expected = formula(ys, x, group, batch)
    x[[1, 3, 5, 12]] = float("nan")
    kernel_of(name)(ys, x, group, batch)
    for layer, (y, reference) in enumerate(zip(ys, expected, strict=True)):
        for t, slot in enumerate(slots):
            if t in (1, 3, 12) and group[layer].terms[slot] is not None:
                assert bool(y[t].isnan().all())
            else:
                assert relative_error(y[t], reference[t]) <= TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_a_layer_without_adapter_in_a_slot_keeps_its_rows(name: str) -> None:
    """The slot's adapter has no term for this layer, whatever the slot held before."""
    weights, rng = LoraWeights(D_IN, D_OUTS[0], 2), torch.Generator().manual_seed(1)
    weights.set(1, term(rng, 4, D_IN, D_OUTS[0], torch.float16, with_bias=True))
    weights.set(1, None)
    x, y = random_rows(6, D_IN, D_OUTS[0])
    before = y.clone()
    kernel_of(name)([y], x, [weights], LoraBatch.of_slots([1] * 6))
    assert torch.equal(y, before)


@pytest.mark.parametrize("name", ALL)
def test_a_row_does_not_depend_on_its_neighbours_adapters(name: str) -> None:
    kernel, group = kernel_of(name), random_group("fp32", True)[:1]
    x, y = random_rows(9, D_IN, D_OUTS[0])
    alone, mixed = y.clone(), y.clone()
    kernel([alone[4:5]], x[4:5], group, LoraBatch.of_slots([5]))
    kernel([mixed], x, group, LoraBatch.of_slots([0, 0, 1, 2, 5, 4, 4, 6, NO_SLOT]))
    assert torch.equal(mixed[8], y[8])
    assert relative_error(mixed[4], alone[4]) <= TOLERANCE


def test_the_table_says_what_the_terms_say() -> None:
    weights, rng = LoraWeights(D_IN, 40, 3), torch.Generator().manual_seed(1)
    versions = [weights.version]
    for slot, dtype in enumerate(POOL_DTYPES):
        weights.set(slot, term(rng, slot + 1, D_IN, 40, dtype, with_bias=slot == 1))
        versions.append(weights.version)
    gain, shift = torch.ones(40), torch.zeros(40)
    weights.set(0, replace(term(rng, 1, D_IN, 40, POOL_DTYPES[0], with_bias=False), gain=gain, shift=shift))
    versions.append(weights.version)
    weights.set(2, LoraTerm(torch.zeros(0, D_IN), torch.zeros(0, 40), 1.0))
    versions.append(weights.version)
    assert versions == sorted(set(versions))
    assert weights.terms[2] is None
    for found, entry in zip(weights.terms, weights.table, strict=True):
        if found is None:
            assert entry.tobytes() == bytes(weights.table.dtype.itemsize)
        else:
            for name in ("a", "b", "bias", "gain", "shift"):
                part = getattr(found, name)
                assert entry[name] == (0 if part is None else part.data_ptr())
            assert (entry["rank"], POOL_DTYPES[entry["dtype"]]) == (len(found.a), found.a.dtype)
            assert abs(entry["scaling"] - found.scaling) < 1e-7


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("fault", ["x in bf16", "y in fp16", "x by columns", "y by columns"])
def test_rows_that_the_compiled_kernels_do_not_take_are_refused(name: str, fault: str) -> None:
    x, y = random_rows(4, D_IN, D_OUTS[0])
    if fault.startswith("x"):
        x = x.bfloat16() if "bf16" in fault else x.T.contiguous().T
    else:
        y = y.half() if "fp16" in fault else y.T.contiguous().T
    with pytest.raises(RuntimeError, match="fp32 rows that are contiguous"):
        kernel_of(name)([y], x, random_group("fp32", False)[:1], LoraBatch.of_slots([0] * 4))


def test_the_kernel_is_chosen_by_name_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(name: str, dtype: torch.dtype = torch.float32) -> object:
        return choose_kernel(name, CPU, dtype, 64)

    assert KERNEL_NAMES == ("auto", "native", "triton", "torch", "reference")
    assert chosen("reference") is add_lora_reference
    assert chosen("torch") is add_lora_segments
    monkeypatch.setattr(adapters.kernels, "load_library", lambda: library_of(NATIVE[0]) if NATIVE else None)
    if NATIVE:
        assert isinstance(chosen("auto"), NativeLora)
        assert isinstance(chosen("native"), NativeLora)
    assert chosen("auto", torch.bfloat16) is add_lora_segments
    for name, dtype in (("triton", torch.float32), ("native", torch.bfloat16)):
        with pytest.raises(KernelNotAvailable, match=f"kernel {name} needs"):
            chosen(name, dtype)
    monkeypatch.setattr(adapters.kernels, "load_library", lambda: None)
    assert chosen("auto") is add_lora_segments
    with pytest.raises(KernelNotAvailable, match="multilora build-kernels"):
        chosen("native")

"""Arena: `auto` loses nothing, the other dtypes round as torch does, and everything lies as kernels read it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from adapters.adapter import LoraPair
from adapters.arena import POOL_DTYPES, Arena, build_arena
from adapters.errors import InvalidAdapter
from adapters.memory import ALIGNMENT
from tests.adapters_support import random_pair

DTYPES = [dtype for dtype in POOL_DTYPES.values() if dtype is not None]
SPECIAL = [0.0, -0.0, 1.0, 65504.0, 6e-8, 1e-30, 3e38, -1e-40, 0.1, 1 / 3]


def pair_of(a: torch.dtype, b: torch.dtype, grid: torch.dtype = torch.float32, d_in: int = 24) -> LoraPair:
    """Random factors held in `a` and `b`, of numbers that `grid` has; those of bf16 are too small for fp16."""
    pair, factor = random_pair(1, d_in, 10, 3, scaling=0.7), 2.0**-30 if grid is torch.bfloat16 else 1.0
    return LoraPair((pair.a * factor).to(grid).to(a), (pair.b * factor).to(grid).to(b), pair.scaling)


def mixed(fp16: float, bf16: float) -> LoraPair:
    return LoraPair(torch.full((2, 8), fp16).half(), torch.full((6, 2), bf16).bfloat16(), 1.0)


def only(arena: Arena) -> LoraPair:
    (pair,) = arena.pairs.values()
    return pair


@pytest.mark.parametrize(
    ("pair", "held"),
    [
        pytest.param(pair_of(torch.float16, torch.float16), torch.float16, id="fp16 as saved"),
        pytest.param(pair_of(torch.bfloat16, torch.bfloat16), torch.bfloat16, id="bf16 as saved"),
        pytest.param(pair_of(torch.float32, torch.float32), torch.float32, id="fp32 that fits nowhere"),
        pytest.param(pair_of(torch.float32, torch.float32, torch.float16), torch.float16, id="fp32 that fits fp16"),
        pytest.param(pair_of(torch.float32, torch.float32, torch.bfloat16), torch.bfloat16, id="fp32 that fits bf16"),
        pytest.param(mixed(1 + 2.0**-10, 2.0**-40), torch.float32, id="mixed, neither holds both"),
        pytest.param(mixed(1.0, 2.0**-40), torch.bfloat16, id="mixed, bf16 holds both"),
        pytest.param(pair_of(torch.float16, torch.bfloat16), torch.float16, id="mixed, fp16 holds both"),
        pytest.param(pair_of(torch.float16, torch.float32), torch.float32, id="mixed with fp32"),
        pytest.param(
            pair_of(torch.bfloat16, torch.float32, torch.bfloat16), torch.bfloat16, id="bf16 with fp32 that fits"
        ),
        pytest.param(
            pair_of(torch.float32, torch.float16, torch.float16), torch.float16, id="fp16 with fp32 that fits"
        ),
    ],
)
def test_auto_takes_the_narrowest_dtype_that_loses_nothing(pair: LoraPair, held: torch.dtype) -> None:
    placed = only(build_arena({"layer": pair}))
    assert placed.a.dtype == placed.b.dtype == held
    assert torch.equal(placed.a.float(), pair.a.float())
    assert torch.equal(placed.b.float(), pair.b.float())


@pytest.mark.parametrize(
    ("value", "held"),
    [
        (65504.0, torch.float16),  # the largest of fp16
        (65536.0, torch.bfloat16),  # over it, and would be infinite
        (65504.0 + 1 / 64, torch.float32),
        (5.960464477539063e-08, torch.float16),  # the smallest of fp16
        (1e-30, torch.float32),
        (2.0**-126, torch.bfloat16),
        (1 + 2.0**-10, torch.float16),
        (1 + 2.0**-7, torch.float16),
        (2.0**20 + 2.0**13, torch.bfloat16),
        (1 + 2.0**-11, torch.float32),
    ],
)
@pytest.mark.parametrize("factor", ["a", "b"])
def test_one_number_decides_whether_a_dtype_fits(factor: str, value: float, held: torch.dtype) -> None:
    a, b = torch.ones(2, 8), torch.ones(6, 2)
    (a if factor == "a" else b)[1, 1] = value
    placed = only(build_arena({"layer": LoraPair(a, b, 1.0)}))
    assert placed.a.dtype == held
    assert torch.equal(placed.a.float(), a)
    assert torch.equal(placed.b.float(), b)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("held", DTYPES)
def test_an_explicit_dtype_rounds_as_torch_does(saved: torch.dtype, held: torch.dtype) -> None:
    """To the nearest, ties to even: numbers half way between two of bf16 and of fp16 are among these."""
    rng = torch.Generator().manual_seed(2)
    ties = torch.arange(1, 65).float() * (1 + 2.0**-9)
    halves = (torch.arange(256) + 0.5) / 2**11 + 1.0  # between neighbours of fp16 above 1
    bf16_halves = (torch.arange(64) + 0.5) / 2**7 + 1.0
    values = torch.cat([torch.randn(2000, generator=rng), ties, halves, bf16_halves, torch.tensor(SPECIAL)])
    values = values.to(saved)
    values = values[values.float().abs() <= torch.finfo(held).max]
    a = values[: len(values) // 2 * 2].view(2, -1)
    placed = only(build_arena({"layer": LoraPair(a, a.T.contiguous(), 1.0)}, held))
    assert placed.a.dtype == placed.b.dtype == held
    assert torch.equal(bits(placed.a), bits(a.to(held)))
    assert torch.equal(bits(placed.b.T), bits(a.to(held)))


@pytest.mark.parametrize(("value", "held"), [(1e5, torch.float16), (-1e5, torch.float16), (3.4e38, torch.bfloat16)])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_numbers_that_an_explicit_dtype_cannot_hold_are_refused(factor: str, value: float, held: torch.dtype) -> None:
    a, b = torch.ones(2, 8), torch.ones(6, 2)
    (a if factor == "a" else b)[1, 1] = value
    with pytest.raises(InvalidAdapter, match=f"beyond {held}"):
        build_arena({"layer": LoraPair(a, b, 1.0)}, held)


@pytest.mark.parametrize("pool_dtype", [None, *DTYPES])
def test_factors_lie_contiguous_aligned_and_apart(pool_dtype: torch.dtype | None) -> None:
    pairs = {
        "odd": random_pair(1, 7, 5, 3),
        "fp16": pair_of(torch.float16, torch.float16, d_in=33),
        "strided": LoraPair(torch.randn(6, 8)[::2], torch.randn(3, 5).T, 1.0),
        "bf16": pair_of(torch.bfloat16, torch.bfloat16),
        "biased": random_pair(2, 9, 11, 1, bias=True),
    }
    arena = build_arena(pairs, pool_dtype)
    first, last = arena.memory.data_ptr(), arena.memory.data_ptr() + len(arena.memory)
    places = []
    for name, pair in arena.pairs.items():
        for factor, shape in ((pair.a, pairs[name].a.shape), (pair.b.T, pairs[name].b.T.shape)):
            assert factor.shape == shape
            assert factor.is_contiguous()
            assert factor.data_ptr() % ALIGNMENT == 0
            places.append((factor.data_ptr(), factor.data_ptr() + factor.nbytes))
        wanted = pool_dtype or pair.a.dtype
        assert torch.equal(pair.a, pairs[name].a.to(wanted))
        assert torch.equal(pair.b, pairs[name].b.to(wanted))
        assert pair.scaling == pairs[name].scaling
    places.sort()
    assert first <= places[0][0]
    assert places[-1][1] <= last
    assert all(end <= start for (_, end), (start, _) in pairwise(places))
    bias, expected = arena.pairs["biased"].bias, pairs["biased"].bias
    assert bias is not None
    assert expected is not None
    assert torch.equal(bias, expected)


def test_the_arena_does_not_follow_its_sources() -> None:
    pair = random_pair(1, 8, 6, 2)
    before = LoraPair(pair.a.clone(), pair.b.clone(), pair.scaling)
    placed = only(build_arena({"layer": pair}))
    pair.a.zero_()
    pair.b.zero_()
    assert torch.equal(placed.a, before.a)
    assert torch.equal(placed.b, before.b)


def test_an_adapter_without_factors_has_an_empty_arena() -> None:
    assert build_arena({}).pairs == {}


def test_several_large_adapters_do_not_share_memory() -> None:
    arenas = [build_arena({"layer": random_pair(seed, 4096, 64, 64)}) for seed in range(2)]
    assert len({arena.memory.untyped_storage().data_ptr() for arena in arenas}) == 2

"""Pages of float16 and bfloat16: each number rounded once, and attention over them a plain softmax in fp64."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adapters.kernels.contract import POOL_DTYPES
from adapters.kernels.library import Library
from server.engine.attention import Rule, Span
from server.engine.native_attention import NativeAttention
from server.engine.native_cross_attention import NativeCrossAttention
from tests import test_cross_attention as cross
from tests.native_support import torch_threads
from tests.test_attention import (
    CPU,
    NUM_BLOCKS,
    RULES,
    SHAPES,
    TOLERANCE,
    Driver,
    Heads,
    Row,
    angles,
    attended,
    bias_of,
    mixed_steps,
    oracle,
    rotated,
    rotated_width,
)

NARROW = POOL_DTYPES[1:]


def driver_of(library: Library, dtype: torch.dtype, rule: Rule, block_size: int = 16, turned: float = 0.0) -> Driver:
    backend = NativeAttention(library, NUM_BLOCKS, block_size)
    backend.hold_in(dtype)
    return Driver(backend, rule, block_size, turned)


def kept(backend: NativeAttention, pages: Sequence[int], count: int, v_d: int, layer: int = 0) -> tuple[Tensor, Tensor]:
    """What `pages` hold of the first `count` tokens: keys [count, kv_heads, d], values [count, kv_heads, v_d]."""
    state = backend._layers[layer]
    assert state.keys is not None
    assert state.values is not None
    keys = state.keys[list(pages)].permute(0, 3, 1, 2).flatten(0, 1)
    values = state.values[list(pages)].permute(0, 2, 1, 3).flatten(0, 1)
    return keys[:count], values[:count, :, :v_d]


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to nearest even; what is finite stays finite."""
    most = torch.finfo(dtype).max
    return torch.where(x.isfinite(), x.clamp(-most, most), x).to(dtype)


def check(driver: Driver, rows: Sequence[Row]) -> None:
    """That pages hold what was given, rounded once, and that attention is over what they hold."""
    assert isinstance(driver.backend, NativeAttention)
    for row in rows:
        if row.pages is None:
            expected = oracle(row, driver.rule, driver.turned)
        else:
            k, v = kept(driver.backend, row.pages, row.done, row.shape.v_d)
            assert torch.equal(v, nearest(row.v[: row.done], v.dtype))
            given, q = row.k[: row.done].double(), row.q[: row.done].double()
            if driver.turned:
                rope = angles(torch.arange(row.done), rotated_width(row.shape, driver.turned))
                given, q = rotated(given, rope), rotated(q, rope)
            # The rotation is in fp32, whose own rounding may decide between two neighbours.
            rounding = torch.finfo(k.dtype).eps / 2 * given.abs()
            assert ((k.double() - given).abs() <= 1.001 * rounding + 1e-6).all()
            expected = attended(q, k.double(), v.double(), driver.rule)
        assert (row.out - expected).abs().max() <= TOLERANCE * expected.abs().max()


def check_sources(driver: cross.Driver, sources: Sequence[cross.Source]) -> None:
    """As `check`, of attention over sources."""
    assert isinstance(driver.cross, NativeCrossAttention)
    for source in sources:
        k, v = kept(driver.cross._pages, source.pages, source.length, source.shape.v_d)
        assert torch.equal(k, nearest(source.k, k.dtype))
        assert torch.equal(v, nearest(source.v, v.dtype))
        source.k, source.v = k.float(), v.float()
    driver.check(sources)


@pytest.mark.parametrize("turned", [0.0, 1.0], ids=["", "rope"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_a_mixture_of_everything(library: Library, dtype: torch.dtype, shape: Heads, rule: Rule, turned: float) -> None:
    if rule.scale > 1:
        rule = replace(rule, scale=rule.scale / shape.d)
    driver = driver_of(library, dtype, rule, turned=turned)
    check(driver, mixed_steps(driver, shape))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", NARROW)
def test_biases_by_distance(library: Library, dtype: torch.dtype, shape: Heads, window: int | None) -> None:
    driver = driver_of(library, dtype, Rule(0.25, True, window, bias=bias_of(shape.heads, 6, 9)))
    check(driver, mixed_steps(driver, shape))


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("shape", [Heads(9, 3, 64, 64), Heads(16, 1, 20, 20), Heads(2, 2, 16, 16)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", NARROW)
def test_long_contexts(library: Library, dtype: torch.dtype, shape: Heads, block_size: int, threads: int) -> None:
    driver = driver_of(library, dtype, RULES["causal"], block_size)
    a, b, c = (driver.cached(shape, length, seed) for seed, length in enumerate((620, 257, 320)))
    alone = Row(shape, 300, 9)
    with torch_threads(threads):
        driver.step([(a, 7), (b, 250)])
        driver.step([(a, 250), (b, 7), (c, 257)])
        driver.step([(alone, 300), (a, 1), (c, 30)])
        driver.step([(a, 362), (c, 33)])
    check(driver, [a, b, c, alone])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", NARROW)
def test_random_schedules(library: Library, dtype: torch.dtype, seed: int) -> None:
    """Pages pass from sequences that ended to new ones, and one is computed again from its beginning."""
    rng = random.Random(seed)
    shape = Heads(*rng.choice([(4, 4), (9, 3), (16, 1), (6, 2)]), rng.choice([8, 16, 18]), rng.choice([4, 16, 20]))
    block_size = rng.choice([16, 32])
    rule = Rule(0.2, True, rng.choice([None, 1, 7, 33]), rng.choice([None, 3.0]))
    driver = driver_of(library, dtype, rule, block_size, rng.random() < 0.5)
    rows: list[Row] = []
    ended = 0
    for step in range(25):
        while len(rows) < 5:
            rows.append(driver.cached(shape, rng.randrange(1, 90), 100 * step + len(rows)))
        chosen = rng.sample(rows, rng.randrange(1, 6))
        driver.step([(row, min(row.length - row.done, rng.choice([1, 1, 2, 5, 16, 31]))) for row in chosen])
        for row in [row for row in chosen if row.done == row.length]:
            check(driver, [row])
            rows.remove(row)
            driver.end(row)
            ended += 1
        preempted = rng.choice(rows) if rows and step % 5 == 4 else None
        if preempted:
            check(driver, [preempted] if preempted.done else [])
            driver.end(preempted)
            rows[rows.index(preempted)] = driver.cached(shape, preempted.length, preempted.seed)
    assert ended > 5
    check(driver, [row for row in rows if row.done])


@pytest.mark.parametrize("dtype", NARROW)
def test_a_prompt_in_chunks_gives_what_it_gives_at_once(library: Library, dtype: torch.dtype) -> None:
    results = []
    for chunks in ((120,), (1,) * 120, (50, 1, 40, 29)):
        driver = driver_of(library, dtype, RULES["causal"], turned=1.0)
        row = driver.cached(Heads(9, 3, 64, 64), 120, 1)
        for count in chunks:
            driver.step([(row, count)])
        results.append(row.out)
    for other in results[1:]:
        assert (other - results[0]).abs().max() <= TOLERANCE * results[0].abs().max()


def all_kinds_of_numbers() -> Tensor:
    """[n, 2, 64] Random bits (so all magnitudes), halves between two neighbours, the ends of the ranges."""
    bits = torch.randint(-(2**31), 2**31, (40_000,), generator=torch.Generator().manual_seed(0)).int()
    ties = (torch.arange(0, 2**15, dtype=torch.int32) * 2 + 1) << torch.tensor([[15], [12]], dtype=torch.int32)
    of_half = torch.arange(1, 2**15, 2).float() * 2.0**-25  # between neighbours of the smallest in fp16
    ends = [most * factor for most in (65504.0, 65520.0, 3.3895314e38) for factor in (1.0, 1.0000001, 0.9999999, 1.004)]
    x = torch.cat([bits.view(torch.float32), ties.flatten().view(torch.float32), of_half, torch.tensor(ends)])
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])
    return torch.cat([x, torch.zeros(-len(x) % 128)]).view(-1, 2, 64)


@pytest.mark.parametrize("dtype", NARROW)
def test_numbers_are_rounded_to_nearest_even_and_stay_finite_where_they_are(
    library: Library, dtype: torch.dtype
) -> None:
    x = all_kinds_of_numbers()
    backend = NativeAttention(library, -(-len(x) // 16), 16)
    backend.hold_in(dtype)
    pages = list(range(backend.num_blocks))
    backend.keep(0, x, x, backend.context([Span(0, len(x), 0, pages)], CPU))
    expected = nearest(x, dtype)
    assert expected.isfinite().sum() == x.isfinite().sum()
    for got in kept(backend, pages, len(x), 64):
        nan = expected.isnan()
        assert torch.equal(got.isnan(), nan)
        assert torch.equal(got[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("dtype", NARROW)
def test_what_is_not_finite_stays_so_and_in_its_sequence(
    library: Library, dtype: torch.dtype, part: str, fault: float
) -> None:
    driver = driver_of(library, dtype, RULES["causal"])
    good, bad = (driver.cached(Heads(), 40, seed) for seed in range(2))
    getattr(bad, part)[3] = fault
    driver.step([(bad, 5), (good, 20)])
    driver.step([(good, 1), (bad, 1)])
    driver.step([(bad, 20), (good, 3)])
    check(driver, [good])
    assert not bad.out[3].isfinite().all()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("dtype", NARROW)
def test_what_an_earlier_sequence_left_in_pages_does_not_leak(
    library: Library, dtype: torch.dtype, garbage: float
) -> None:
    driver, shape = driver_of(library, dtype, RULES["causal"]), Heads(6, 2, 16, 12)
    earlier = driver.cached(shape, 64, 0)
    earlier.k.fill_(garbage)
    earlier.v.fill_(garbage)
    driver.step([(earlier, 64)])
    driver.end(earlier)
    later = [driver.cached(shape, length, 1 + i) for i, length in enumerate((21, 3, 16))]
    assert {page for row in later for page in row.pages or ()} == set(earlier.pages or ())
    for _ in range(2):
        driver.step([(row, 1) for row in later])
    driver.step([(row, row.length - 3) for row in later if row.length > 3])
    driver.step([(row, 1) for row in later])
    check(driver, later)


@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_another_dtype_starts_anew_with_other_bytes(library: Library, dtype: torch.dtype) -> None:
    driver = driver_of(library, torch.float32, RULES["causal"])
    before = driver.cached(Heads(), 20, 0)
    driver.step([(before, 20)])
    assert isinstance(driver.backend, NativeAttention)
    driver.backend.hold_in(dtype)
    assert driver.backend.bytes_per_block == 0
    after = driver.cached(Heads(), 20, 1)
    driver.step([(after, 20)])
    assert driver.backend.bytes_per_block == dtype.itemsize * 16 * 2 * (16 + 16)
    check(driver, [after])
    driver.backend.resize(200)
    assert driver.backend.page_dtype == dtype


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", NARROW)
def test_attention_over_sources(library: Library, dtype: torch.dtype, block_size: int, shape: Heads) -> None:
    attention = NativeCrossAttention(library, cross.NUM_BLOCKS, block_size)
    attention.hold_in(dtype)
    driver = cross.Driver(attention, block_size)
    a, b, c = (driver.source(shape, length, seed) for seed, length in enumerate((1, 37, 270)))
    driver.step([(a, 1), (b, 40), (c, 3)], [a, b, c])
    driver.step([(a, 60), (c, 1), (b, 1)])
    check_sources(driver, [a, b, c])

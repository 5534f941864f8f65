"""Attention of decoders over sources in pages is a plain softmax in fp64, by torch and by the compiled kernels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from server.engine.attention import Rule, Span
from server.engine.cross_attention import CrossAttention, Look, TorchCrossAttention
from server.engine.native_cross_attention import NativeCrossAttention
from tests.native_support import library_of, torch_threads
from tests.test_attention import BACKENDS, SHAPES, TOLERANCE, Heads

CPU = torch.device("cpu")
NUM_BLOCKS = 100
RULE = Rule(0.3, causal=False)


def cross_attention(name: str, block_size: int = 16) -> CrossAttention:
    if name == "torch":
        return TorchCrossAttention(NUM_BLOCKS, block_size)
    return NativeCrossAttention(library_of(name), NUM_BLOCKS, block_size)


@dataclass
class Source:
    """Its keys and values, and the queries of a target."""

    shape: Heads
    length: int
    seed: int
    pages: list[int]
    done: int = 0
    got: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = torch.Generator().manual_seed(self.seed)
        self.k = torch.randn(self.length, self.shape.kv_heads, self.shape.d, generator=rng)
        self.v = torch.randn(self.length, self.shape.kv_heads, self.shape.v_d, generator=rng)
        self.q = torch.randn(200, self.shape.heads, self.shape.d, generator=rng)

    def expected(self) -> Tensor:
        """softmax(q kᵀ · scale) v in fp64"""
        shared = self.shape.heads // self.shape.kv_heads
        q, k, v = (t.double() for t in (self.q[: self.done], self.k, self.v))
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        return torch.einsum("hts,shd->thd", (torch.einsum("thd,shd->hts", q, k) * RULE.scale).softmax(-1), v)


class Driver:
    """Gives it packed rows of targets, and of new sources, their pages shuffled."""

    def __init__(self, cross: CrossAttention, block_size: int = 16) -> None:
        self.cross = cross
        self.block_size = block_size
        self.spare = 1
        """Pages of each sequence beyond those of its source."""
        self.free = list(range(NUM_BLOCKS))
        random.Random(3).shuffle(self.free)

    def source(self, shape: Heads, length: int, seed: int) -> Source:
        pages = [self.free.pop() for _ in range(-(-length // self.block_size) + self.spare)]
        self.cross.clear(pages)
        return Source(shape, length, seed, pages)

    def step(self, targets: Sequence[tuple[Source, int]], new: Sequence[Source] = (), layer: int = 0) -> None:
        """So many next tokens of each target, and `new` sources to be stored."""
        looks, sources, start, place = [], [], 0, 0
        for source, count in targets:
            looks.append(Look(start, start + count, source.pages, source.length))
            start += count
        for source in new:
            sources.append(Span(place, place + source.length, 0, source.pages))
            place += source.length
        q = torch.cat([source.q[source.done : source.done + count] for source, count in targets])
        shape = targets[0][0].shape
        k = torch.cat([source.k for source in new]) if new else torch.full((1, shape.kv_heads, shape.d), torch.nan)
        v = torch.cat([source.v for source in new]) if new else torch.full((1, shape.kv_heads, shape.v_d), torch.nan)
        out = self.cross.attend(layer, q, k, v, RULE, self.cross.context(looks, sources, CPU))
        for (source, count), look in zip(targets, looks, strict=True):
            source.got.append(out[look.start : look.end])
            source.done += count

    def check(self, sources: Sequence[Source]) -> None:
        for source in sources:
            expected = source.expected()
            assert (torch.cat(source.got) - expected).abs().max() <= TOLERANCE * expected.abs().max(), source.length


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("name", BACKENDS)
def test_targets_longer_and_shorter_than_their_sources(name: str, block_size: int, shape: Heads) -> None:
    driver = Driver(cross_attention(name, block_size), block_size)
    a, b, c, d, e = (driver.source(shape, length, seed) for seed, length in enumerate((1, 16, 37, 270, 5)))
    driver.step([(a, 1), (b, 40), (c, 3)], [a, b, c])
    driver.step([(a, 60), (d, 1), (b, 1), (c, 1)], [d])
    driver.step([(d, 7), (a, 1), (c, 1)])
    driver.step([(e, 2), (a, 1), (b, 1), (c, 1), (d, 1)], [e])
    driver.step([(d, 13), (e, 1), (c, 80)])
    driver.check([a, b, c, d, e])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", BACKENDS)
def test_many_targets_decode_together(name: str, threads: int) -> None:
    driver, shape, rng = Driver(cross_attention(name)), Heads(9, 3, 20, 12), random.Random(0)
    sources = [driver.source(shape, rng.randrange(1, 60), seed) for seed in range(20)]
    with torch_threads(threads):
        driver.step([(source, 1) for source in sources], sources)
        for _ in range(3):
            rng.shuffle(sources)
            driver.step([(source, 1) for source in sources])
    driver.check(sources)


@pytest.mark.parametrize("name", BACKENDS)
def test_layers_have_pages_of_their_own_and_their_own_shape(name: str) -> None:
    cross = cross_attention(name)
    assert cross.bytes_per_block == 0
    shapes = [Heads(), Heads(4, 4, 32, 32), Heads(6, 1, 8, 16)]
    drivers = [Driver(cross) for _ in shapes]  # the same pages in each
    sources = [driver.source(shape, 20, i) for i, (driver, shape) in enumerate(zip(drivers, shapes, strict=True))]
    for new in (True, False):
        for layer, (driver, source) in enumerate(zip(drivers, sources, strict=True)):
            driver.step([(source, 3)], [source] if new else [], layer)
    for driver, source in zip(drivers, sources, strict=True):
        driver.check([source])
    assert cross.bytes_per_block == 4 * 16 * sum(s.kv_heads * (s.d + s.v_d) for s in shapes)
    cross.resize(NUM_BLOCKS)
    driver = Driver(cross)
    again = driver.source(Heads(2, 2, 8, 8), 20, 9)
    driver.step([(again, 1)], [again])
    driver.check([again])


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("name", BACKENDS)
def test_what_an_earlier_source_left_in_pages_does_not_leak(name: str, garbage: float) -> None:
    driver, shape = Driver(cross_attention(name)), Heads()
    earlier = driver.source(shape, 79, 0)
    earlier.k.fill_(garbage)
    earlier.v.fill_(garbage)
    driver.step([(earlier, 1)], [earlier])
    driver.free += earlier.pages
    later = [driver.source(shape, length, 1 + seed) for seed, length in enumerate((17, 3))]
    assert {page for source in later for page in source.pages} <= set(earlier.pages)
    driver.step([(source, 1) for source in later], later)
    driver.step([(source, 5) for source in later])
    driver.step([(source, 1) for source in later])
    driver.check(later)


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("name", BACKENDS)
def test_nan_in_one_source_stays_there(name: str, part: str) -> None:
    driver, shape = Driver(cross_attention(name)), Heads()
    good, bad = (driver.source(shape, length, length) for length in (20, 25))
    getattr(bad, part)[:3] = float("nan")
    driver.step([(bad, 1), (good, 1)], [bad, good])
    driver.step([(good, 4), (bad, 4)])
    driver.step([(bad, 1), (good, 1)])
    driver.check([good])

"""Runs the CPU kernels, compiled with sanitizers, over buffers that end where the numbers end. See test_sanitizers.py.

    LD_PRELOAD=libasan.so python -m tests.sanitized OBJECT [faults]

faults: each of `FAULTS` in a process of its own, to see that it is found. Results are compared as well, so that the
work is known to be done.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.batch import NO_SLOT, LoraBatch
from adapters.dora import rescale
from adapters.kernels import LoraTerm, LoraWeights, NativeLora, add_lora_segments
from adapters.kernels.contract import POOL_DTYPES
from adapters.kernels.library import GELU_TANH, SILU, Library
from adapters.memory import LargePages
from adapters.products import NativeProducts
from server.engine import native_attention
from server.engine.attention import RelativeBias, Rule
from server.engine.native_cross_attention import NativeCrossAttention
from tests import test_cross_attention as cross
from tests import test_decoder_stack as stacked
from tests import test_native_sampling as sampling
from tests import test_rounded_pages as rounded
from tests.test_attention import Driver, Heads, Row, bias_of
from tests.test_fused import model_of

RANKS = (1, 3, 4, 5, 8, 9, 17, 0)
DIMENSIONS = [(1, (1,)), (5, (7, 40)), (16, (33,)), (27, (16, 1, 65)), (65, (96, 31))]
TOKENS = (1, 2, 7, 8, 9, 16, 17, 131)
SHAPES = [Heads(4, 2, 16, 16), Heads(16, 1, 20, 20), Heads(9, 3, 6, 10), Heads(1, 1, 2, 3), Heads(2, 2, 10, 33)]
RULES = [
    Rule(0.3, causal=True),
    Rule(0.3, causal=True, window=5),
    Rule(0.3, causal=True, softcap=2.0),
    Rule(0.3, causal=False),
    Rule(0.3, causal=False, window=3),
]


class ExactMemory(LargePages):
    """Each piece is an allocation of its own, exactly as large as asked."""

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype)


def exact(tensor: Tensor) -> Tensor:
    """In memory of its own."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def apart(rows: Tensor, pad: int) -> Tensor:
    """Rows with `pad` numbers between them, and none after the last."""
    count, width = rows.shape
    room = torch.empty(max((count - 1) * (width + pad) + width, 0))
    return room.as_strided((count, width), (width + pad, 1)).copy_(rows)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max() + 1e-6


def group_of(d_in: int, d_outs: tuple[int, ...]) -> list[LoraWeights]:
    group = []
    for layer, d_out in enumerate(d_outs):
        weights = LoraWeights(d_in, d_out, len(RANKS))
        for slot, rank in enumerate(RANKS):
            dtype = POOL_DTYPES[(slot + layer) % 3]
            a, b = torch.randn(rank, d_in).to(dtype), torch.randn(rank, d_out).to(dtype)
            bias = torch.randn(d_out) if slot % 2 else None
            gain, shift = (exact(torch.rand(d_out) + 0.5) if slot % 4 == 2 else None for _ in range(2))
            weights.set(slot, LoraTerm(exact(a), exact(b), 0.5, bias, gain, shift))
        group.append(weights)
    return group


def batches(tokens: int) -> list[LoraBatch]:
    """One adapter for all, one for each token, and runs with base rows in between."""
    slots = range(NO_SLOT, len(RANKS))
    runs = sorted(random.Random(tokens).choices(slots, k=tokens))
    return [LoraBatch.of_slots(s) for s in ([6] * tokens, [t % len(RANKS) for t in range(tokens)], runs)]


def check_lora(library: Library) -> None:
    kernel = NativeLora(library)
    for d_in, d_outs in DIMENSIONS:
        group = group_of(d_in, d_outs)
        for tokens, pad in product(TOKENS, (0, 3)):
            for batch in batches(tokens):
                x, ys = apart(torch.randn(tokens, d_in), pad), [apart(torch.randn(tokens, d), pad) for d in d_outs]
                expected = [y.clone() for y in ys]
                kernel(ys, x, group, batch)
                add_lora_segments(expected, x, group, batch)
                for y, reference in zip(ys, expected, strict=True):
                    close(y, reference)


def check_products(library: Library) -> None:
    for quantize in ("", "int8", "int8-dynamic"):
        for (d_in, d_outs), dtype in product(DIMENSIONS, POOL_DTYPES):
            linears = [nn.Linear(d_in, d_out, bias=i != 1) for i, d_out in enumerate(d_outs)]
            for linear in linears:
                linear.requires_grad_(False)
                linear.weight.copy_(linear.weight.to(dtype))
            group = group_of(d_in, d_outs)
            products = NativeProducts(library, linears, group, ExactMemory(), quantize)
            for tokens in TOKENS:
                for batch in (None, *batches(tokens)):
                    x = exact(torch.randn(tokens, d_in))
                    expected = [F.linear(x, linear.weight, linear.bias) for linear in linears]
                    if batch is not None:
                        add_lora_segments(expected, x, group, batch)
                        for y, weights in zip(expected, group, strict=True):
                            rescale(y, weights, batch)
                    for y, reference in zip(products.compute(x, batch), expected, strict=True):
                        if quantize:  # a shift may leave little of what was rounded
                            assert (y - reference).abs().max() <= 0.05 * max(1.0, float(reference.abs().max()))
                        else:
                            close(y, reference)
                products.compute(exact(torch.full((tokens, d_in), float("nan"))), None)


def check_attention(library: Library) -> None:
    for shape, bare, turned, ends in product(SHAPES, RULES, (0.0, 1.0), (None, (0, 0), (6, 9), (40, 40))):
        if bare.softcap is not None and ends:
            continue
        check_attention_of(library, shape, bare, turned, ends, torch.float32)
    for shape, turned, dtype in product(SHAPES, (0.5, 1.0), POOL_DTYPES[1:]):
        check_attention_of(library, shape, RULES[0], turned, (6, 9), dtype)
    long = Row(SHAPES[0], 300, 3)
    driver = Driver(native_attention.NativeAttention(library, 1, 16), RULES[0])
    driver.step([(long, 300)])
    driver.check([long])


def check_attention_of(
    library: Library, shape: Heads, bare: Rule, turned: float, ends: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    rule = bare if ends is None else replace(bare, bias=bias_of(shape.heads, *ends))
    for block_size in (16, 32):
        # As many pages as are needed, so that the last one is next to the end of memory.
        lengths = (37, 16, 1, 20) if rule.causal else ()
        num_blocks = sum(-(-length // block_size) for length in lengths)
        backend = native_attention.NativeAttention(library, num_blocks, block_size)
        backend.hold_in(dtype)
        driver = Driver(backend, rule, block_size, turned)
        driver.free = list(range(num_blocks))
        random.Random(1).shuffle(driver.free)
        rows = [driver.cached(shape, length, length) for length in lengths]
        alone = [Row(shape, length, length) for length in (1, 5, 33)]
        driver.step([(row, row.length) for row in alone])
        if rows:
            driver.step([(rows[0], 7), (rows[1], 15), (rows[2], 1)])
            driver.step([(rows[0], 29), (rows[1], 1), (rows[3], 19)])
            driver.step([(rows[0], 1), (rows[3], 1)])
        rounded.check(driver, [*rows, *alone])


def check_cross_attention(library: Library) -> None:
    for shape, block_size, dtype in product(SHAPES, (16, 32), POOL_DTYPES):
        lengths = (37, 16, 1)
        num_blocks = sum(-(-length // block_size) for length in lengths)
        attention = NativeCrossAttention(library, num_blocks, block_size)
        attention.hold_in(dtype)
        driver = cross.Driver(attention, block_size)
        driver.spare, driver.free = 0, list(range(num_blocks))
        random.Random(1).shuffle(driver.free)
        a, b, c = (driver.source(shape, length, length) for length in lengths)
        driver.step([(a, 1), (b, 40)], [a, b])
        driver.step([(c, 13), (a, 5), (b, 1)], [c])
        driver.step([(a, 1), (b, 1), (c, 1)])
        rounded.check_sources(driver, [a, b, c])


def check_small(library: Library) -> None:
    for d, rows in product((1, 7, 16, 33, 100), (1, 3)):
        x, weight, y = exact(torch.randn(rows, d)), exact(torch.randn(d)), torch.empty(rows, d)
        library.rms_norm(x.data_ptr(), weight.data_ptr(), 1e-5, y.data_ptr(), rows, d)
        close(y, weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())
    for count, (kind, function) in product(
        (1, 7, 16, 33, 40_000), ((SILU, F.silu), (GELU_TANH, lambda x: F.gelu(x, approximate="tanh")))
    ):
        gate, up, y = exact(9 * torch.randn(count)), exact(torch.randn(count)), torch.empty(count)
        library.gated(gate.data_ptr(), up.data_ptr(), count, y.data_ptr(), 1, count, kind)
        close(y, function(gate) * up)


def check_sampling(library: Library) -> None:
    for n, kind in product((1, 7, 256, 300, 3000), ("random", "equal", "forbidden")):
        rules = [replace(rule, uniform=u) for rule in sampling.RULES.values() for u in (0.0, 0.5, 1 - 2**-53)]
        x = exact(sampling.numbers(kind, n).repeat(len(rules) + 1, 1))
        *drawn, greedy = sampling.draw(library, x, [*rules, sampling.Rule(temperature=0.0)])
        assert greedy == int(x[0].argmax())
        for rule, token in zip(rules, drawn, strict=True):
            assert token in sampling.acceptable(x[0], rule)


def check_decoder(library: Library) -> None:
    for kind, options in (
        ("LlamaConfig", {"attention_bias": True}),
        ("LlamaConfig", {"hidden_size": 24, "intermediate_size": 36}),
        ("Qwen3Config", {"head_dim": 40}),
        ("Gemma2Config", {"head_dim": 24}),
        ("Phi3Config", {"partial_rotary_factor": 0.5, "intermediate_size": 36}),
    ):
        engine = stacked.engine_with(library, model_of(kind, options))
        stacked.write_adapters(engine)
        engine.cache.resize(16)
        for cached in (False, True):
            together, alone = stacked.both(engine, [19, 2, 13], [1, NO_SLOT, 2], cached)
            close(together, alone, 1e-5)


def read_past_a_row(library: Library) -> None:
    x, y = torch.ones(33), torch.empty(34)
    library.gated(x.data_ptr(), x.data_ptr(), 34, y.data_ptr(), 1, 34, SILU)


def write_past_a_row(library: Library) -> None:
    x, y = torch.ones(34), torch.empty(33)
    library.rms_norm(x.data_ptr(), x.data_ptr(), 1e-5, y.data_ptr(), 1, 34)


def claim_a_larger_rank(library: Library) -> None:
    group = group_of(27, (40,))
    group[0].table["rank"][2] += 1
    NativeLora(library)([torch.ones(1, 40)], torch.ones(1, 27), group, LoraBatch.of_slots([2]))


def claim_more_inputs(library: Library) -> None:
    products: Any = NativeProducts(library, [nn.Linear(27, 40).requires_grad_(False)], [], ExactMemory())
    products._layers[0].d_in = 28
    products.compute(torch.ones(1, 27), None)


def name_a_page_that_is_not_there(library: Library) -> None:
    driver = Driver(native_attention.NativeAttention(library, 2, 16), RULES[0])
    driver.free = [2]
    driver.step([(driver.cached(SHAPES[0], 5, 0), 5)])


def claim_a_longer_source(library: Library) -> None:
    driver = cross.Driver(NativeCrossAttention(library, 1, 16))
    driver.spare, driver.free = 0, [0]
    source = driver.source(SHAPES[0], 16, 0)
    driver.step([(source, 1)], [source])
    source.pages, source.length = [0, 1], 17
    driver.step([(source, 1)])


def claim_more_biases(library: Library) -> None:
    bias = bias_of(SHAPES[0].heads, 2, 2)
    cut = RelativeBias(bias.table[: SHAPES[0].heads - 1].clone(), bias.before)
    row = Row(SHAPES[0], 5, 0)
    Driver(native_attention.NativeAttention(library, 1, 16), Rule(0.3, False, bias=cut)).step([(row, 5)])


FAULTS: dict[str, Callable[[Library], None]] = {
    function.__name__: function
    for function in (
        read_past_a_row, write_past_a_row, claim_a_larger_rank, claim_more_inputs, name_a_page_that_is_not_there,
        claim_a_longer_source, claim_more_biases,
    )
}  # fmt: skip


CHECKS = (
    check_small, check_sampling, check_lora, check_products, check_attention, check_cross_attention, check_decoder,
)  # fmt: skip


def told(fault: Callable[[Library], None], library: Library) -> str:
    """What a process says that computes this and does not end well; "" where it does. No parallel region has run in
    this one: OpenMP's threads are not there after a fork."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with open(reading, encoding="utf-8") as output:
            text = output.read()
        return text if os.waitpid(child, 0)[1] else ""
    os.dup2(writing, sys.stderr.fileno())
    status = 1
    try:
        fault(library)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:  # nothing of the parent's may end with it
        os._exit(status)


def main(file: str, what: str = "") -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    library = Library(Path(file))
    setattr(native_attention, "lazy_zeros", lambda shape, dtype, device: torch.zeros(shape, dtype=dtype))  # noqa: B010
    if what == "faults":
        sys.stdout.write(json.dumps({name: told(fault, library) for name, fault in FAULTS.items()}))
        return
    for check in CHECKS:
        check(library)
    sys.stdout.write("clean\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

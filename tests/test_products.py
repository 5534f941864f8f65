"""The CPU kernels' products are F.linear's, whatever the rows and the form of W, alone and with the LoRA term."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapters.products
from adapters.batch import NO_SLOT, LoraBatch
from adapters.dora import rescale
from adapters.kernels import LoraTerm, LoraWeights, add_lora_reference
from adapters.kernels.contract import POOL_DTYPES
from adapters.kernels.library import Library
from adapters.memory import LargePages
from adapters.products import (
    NativeEmbedding,
    NativeLinear,
    NativeProducts,
    PlainProducts,
    can_pack_natively,
    exact_form,
)
from tests.native_support import torch_threads

ROWS = [*range(1, 41), 127, 128, 129, 300]
SHAPES = [(27, (40,)), (64, (7, 96, 33)), (130, (31, 1)), (5, (64, 32)), (576, (200, 192))]
FORMS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = 1e-5
ROWS_FOR_TILES = 8
"""native/linear.h"""


def linears_of(d_in: int, d_outs: tuple[int, ...], form: str = "fp32", bias: bool = True) -> list[nn.Linear]:
    """Every second one has a bias; weights are numbers that `form` has."""
    torch.manual_seed(d_in)
    linears = [nn.Linear(d_in, d_out, bias=bias and i % 2 == 0) for i, d_out in enumerate(d_outs)]
    for linear in linears:
        linear.requires_grad_(False)
        linear.weight.copy_(linear.weight.to(FORMS[form]).float())
    return linears


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def rows_of(count: int, d_in: int) -> Tensor:
    return torch.randn(1, count, d_in, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("d_in", "d_outs"), SHAPES)
def test_products_are_the_plain_ones(
    library: Library, d_in: int, d_outs: tuple[int, ...], form: str, threads: int
) -> None:
    linears = linears_of(d_in, d_outs, form)
    products = NativeProducts(library, linears, [], LargePages())
    for count in ROWS:
        x = rows_of(count, d_in)
        with torch_threads(threads):
            ys = products.compute(x, None)
        for y, linear in zip(ys, linears, strict=True):
            expected = F.linear(
                x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()
            )
            assert y.shape == (1, count, linear.out_features)
            assert y.is_contiguous()
            assert error(y, expected) <= TOLERANCE, count


@pytest.mark.parametrize("form", ["fp16", "bf16"])
@pytest.mark.parametrize(("d_in", "d_outs"), SHAPES)
def test_weights_packed_in_16_bits_give_what_they_give_in_fp32(
    library: Library, monkeypatch: pytest.MonkeyPatch, d_in: int, d_outs: tuple[int, ...], form: str
) -> None:
    """Tiles sum in another order, nearer to the exact product than fp32 is: with that they are compared."""
    linears = linears_of(d_in, d_outs, form)
    assert {POOL_DTYPES[exact_form(linear.weight)] for linear in linears} == {FORMS[form]}
    narrow = NativeProducts(library, linears, [], LargePages())
    monkeypatch.setattr(adapters.products, "exact_form", lambda _: POOL_DTYPES.index(torch.float32))
    wide = NativeProducts(library, linears, [], LargePages())
    for count in ROWS:
        x = rows_of(count, d_in)
        by_tiles = library.has_tiles and form == "bf16" and count >= ROWS_FOR_TILES
        for linear, a, b in zip(linears, narrow.compute(x, None), wide.compute(x, None), strict=True):
            bias = None if linear.bias is None else linear.bias.double()
            assert error(a, F.linear(x.double(), linear.weight.double(), bias) if by_tiles else b) <= 1e-6


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ([1.0, 65504.0, -0.0, 6.103515625e-05, 5.960464477539063e-08, 1 + 2.0**-10], torch.float16),
        ([1.0, 3.3895313892515355e38, 2.0**-126, -(2.0**-130), 1.9921875], torch.bfloat16),
        ([1.0, 65504.0, 2.0**100, 1 + 2.0**-10], torch.float32),
        ([0.1, 1.0], torch.float32),
        ([0.0], torch.bfloat16),
    ],
)
def test_extreme_weights_are_held_exactly(library: Library, values: list[float], form: torch.dtype) -> None:
    linear = nn.Linear(3, 50, bias=False).requires_grad_(False)
    linear.weight.zero_()
    linear.weight.view(-1)[: len(values)] = torch.tensor(values)
    assert POOL_DTYPES[exact_form(linear.weight)] == form
    y = NativeLinear(library, linear, LargePages())(torch.eye(3))
    assert torch.equal(y, linear.weight.T)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("d_in", "d_out"), [(27, 40), (64, 7), (576, 200)])
def test_an_embedding_reads_the_rows_of_a_packed_head(library: Library, d_in: int, d_out: int, form: str) -> None:
    (linear,) = linears_of(d_in, (d_out,), form, bias=False)
    embedding = NativeEmbedding(NativeLinear(library, linear, LargePages()).panels(), d_out, d_in)
    assert (embedding.num_embeddings, embedding.embedding_dim) == (d_out, d_in)
    for ids in (torch.arange(d_out)[None], torch.randint(d_out, (2, 3)), torch.tensor([d_out - 1])):
        rows = embedding(ids)
        assert torch.equal(rows, F.embedding(ids, linear.weight))
        assert rows.is_contiguous()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 27), (1, 4, 27), (2, 3, 27), (1, 0, 27), (0, 27)])
def test_a_native_layer_takes_any_leading_dimensions(library: Library, shape: tuple[int, ...], bias: bool) -> None:
    (linear,) = linears_of(27, (40,), bias=bias)
    layer = NativeLinear(library, linear, LargePages())
    x = torch.randn(shape)
    assert (layer.in_features, layer.out_features) == (27, 40)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)


def test_rows_that_are_not_contiguous_are_taken_as_they_read(library: Library) -> None:
    (linear,) = linears_of(27, (40,))
    layer = NativeLinear(library, linear, LargePages())
    for x in (torch.randn(27, 5).T, torch.randn(5, 54)[:, ::2], torch.randn(5, 60)[:, :27], torch.randn(10, 27)[::2]):
        torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)


def test_a_layer_keeps_what_it_points_at(library: Library) -> None:
    """The linear layer, its bias and the chunk of memory may be let go by all others."""
    (linear,) = linears_of(27, (40,))
    x = torch.randn(3, 27)
    expected = linear(x)
    layer = NativeLinear(library, linear, LargePages(1 << 12))
    del linear
    scribble = [torch.full((40,), float("nan")) for _ in range(100)]
    assert len(scribble) == 100
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_nan_in_one_row_stays_there(library: Library) -> None:
    linears = linears_of(64, (7, 96, 33))
    products = NativeProducts(library, linears, [], LargePages())
    for count in (1, 2, 7, 14, 30):
        x = rows_of(count, 64)
        clean = products.compute(x, None)
        x[0, count // 2] = float("nan")
        rows = [row for row in range(count) if row != count // 2]
        for y, before in zip(products.compute(x, None), clean, strict=True):
            assert bool(y[0, count // 2].isnan().all())
            assert torch.equal(y[0, rows], before[0, rows])


@cache
def weights_of(d_in: int, d_outs: tuple[int, ...]) -> list[LoraWeights]:
    """Six slots with ranks and dtypes mixed; slot 2 has no term in the first layer."""
    group, rng = [], torch.Generator().manual_seed(d_in)
    for layer, d_out in enumerate(d_outs):
        weights = LoraWeights(d_in, d_out, 6)
        for slot, rank in enumerate((1, 3, 8, 17, 64, 16)):
            if (layer, slot) != (0, 2):
                dtype = POOL_DTYPES[(slot + layer) % 3]
                a, b = (torch.randn(rank, width, generator=rng).to(dtype) for width in (d_in, d_out))
                bias = torch.randn(d_out, generator=rng) if slot % 2 else None
                weights.set(slot, LoraTerm(a, b, 0.5, bias))
        group.append(weights)
    return group


SLOTS: dict[str, Callable[[random.Random, int], list[int]]] = {
    "unsorted": lambda rng, n: rng.choices(range(NO_SLOT, 6), k=n),
    "sorted": lambda rng, n: sorted(rng.choices(range(NO_SLOT, 6), k=n)),
    "identical": lambda rng, n: [4] * n,
    "base only": lambda rng, n: [NO_SLOT] * n,
}


@cache
def reference_terms(d_in: int, d_outs: tuple[int, ...], count: int, popularity: str) -> tuple[LoraBatch, list[Tensor]]:
    """A batch, and what the reference adds to zeros."""
    batch = LoraBatch.of_slots(SLOTS[popularity](random.Random(d_in), count))
    terms = [torch.zeros(count, d_out) for d_out in d_outs]
    add_lora_reference(terms, rows_of(count, d_in)[0], weights_of(d_in, d_outs), batch)
    return batch, terms


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("d_in", "d_outs"), SHAPES)
def test_with_a_batch_they_are_the_plain_products_and_the_lora_term(
    library: Library, d_in: int, d_outs: tuple[int, ...], form: str, threads: int
) -> None:
    linears = linears_of(d_in, d_outs, form)
    products, plain = NativeProducts(library, linears, weights_of(d_in, d_outs), LargePages()), PlainProducts(linears)
    for count, popularity in product((1, 2, 7, 9, 15, 16, 17, 40, 129, 300), SLOTS):
        x = rows_of(count, d_in)
        batch, terms = reference_terms(d_in, d_outs, count, popularity)
        expected = [y[0] + term for y, term in zip(plain.compute(x, None), terms, strict=True)]
        with torch_threads(threads):
            ys = products.compute(x, batch)
        for y, reference in zip(ys, expected, strict=True):
            assert error(y[0], reference) <= TOLERANCE


def test_base_rows_are_those_of_a_batch_without_adapters_bit_for_bit(library: Library) -> None:
    linears, weights = linears_of(64, (7, 96, 33)), weights_of(64, (7, 96, 33))
    products = NativeProducts(library, linears, weights, LargePages())
    slots = [NO_SLOT, 4, 4, NO_SLOT, 1, *[3] * 9, NO_SLOT]
    x = rows_of(len(slots), 64)
    base = [t for t, slot in enumerate(slots) if slot == NO_SLOT]
    alone = products.compute(x, None)
    for y, before in zip(products.compute(x, LoraBatch.of_slots(slots)), alone, strict=True):
        assert torch.equal(y[0, base], before[0, base])
        assert not torch.equal(y, before)


def test_terms_that_are_set_later_are_used(library: Library) -> None:
    (linear,) = linears_of(27, (40,))
    weights = LoraWeights(27, 40, 1)
    products, batch, x = (
        NativeProducts(library, [linear], [weights], LargePages()),
        LoraBatch.of_slots([0] * 3),
        torch.randn(3, 27),
    )
    weights.set(0, LoraTerm(torch.randn(2, 27), torch.randn(2, 40), 1.0))
    expected = linear(x)
    add_lora_reference([expected], x, [weights], batch)
    assert error(products.compute(x, batch)[0], expected) <= TOLERANCE
    weights.set(0, None)
    assert error(products.compute(x, batch)[0], linear(x)) <= TOLERANCE


def test_what_can_be_packed() -> None:
    class Special(nn.Linear):
        pass

    assert can_pack_natively(nn.Linear(4, 4))
    assert not can_pack_natively(nn.Linear(4, 4, dtype=torch.bfloat16))
    assert not can_pack_natively(nn.Linear(4, 4, device="meta"))
    assert not can_pack_natively(Special(4, 4))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("d_in", "d_outs"), SHAPES)
def test_gains_rescale_all_that_their_tokens_get(
    library: Library, d_in: int, d_outs: tuple[int, ...], threads: int
) -> None:
    linears, rng = linears_of(d_in, d_outs), torch.Generator().manual_seed(d_in)
    group = weights_of.__wrapped__(d_in, d_outs)  # not those of other tests
    for weights, slot in product(group, (1, 3, 4)):
        gain, shift = torch.randn(2, weights.d_out, generator=rng)
        term = weights.terms[slot]
        assert term is not None
        weights.set(slot, replace(term, bias=None, gain=gain, shift=None if slot == 3 else shift))
    products, plain = NativeProducts(library, linears, group, LargePages()), PlainProducts(linears)
    for count, popularity in product((1, 7, 17, 40, 129), SLOTS):
        x = rows_of(count, d_in)
        batch = LoraBatch.of_slots(SLOTS[popularity](random.Random(d_in), count))
        expected = [y[0] for y in plain.compute(x, None)]
        add_lora_reference(expected, x[0], group, batch)
        for y, weights in zip(expected, group, strict=True):
            rescale(y, weights, batch)
        with torch_threads(threads):
            ys = products.compute(x, batch)
        for y, reference in zip(ys, expected, strict=True):
            assert error(y[0], reference) <= TOLERANCE


# 8 bits, opt-in: not the base's numbers, but exactly those that the quantisation says

GROUP = 64
"""Inputs that share a scale (native/int8.h)."""


STEPS_OF_8_BITS, STEPS_OF_16_BITS = 127, 127 * 256


def in_steps(rows: Tensor, steps: int = STEPS_OF_8_BITS) -> Tensor:
    """Each row in groups of inputs, to the nearest of `steps` in either direction of the group's largest; in fp64."""
    count, width = rows.shape
    groups = F.pad(rows, (0, -width % GROUP)).view(count, -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / steps
    places = (groups / scale).nan_to_num(0.0).round()
    return (places.double() * scale.double()).view(count, -1)[:, :width]


def inputs_seen(x: Tensor, quantize: str) -> Tensor:
    """x: [rows, d_in] as the products take it."""
    return in_steps(x, STEPS_OF_8_BITS if quantize == "int8-dynamic" else STEPS_OF_16_BITS)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("quantize", ["int8", "int8-dynamic"])
@pytest.mark.parametrize(("d_in", "d_outs"), SHAPES)
def test_quantised_products_are_those_of_the_quantised_numbers(
    library: Library, d_in: int, d_outs: tuple[int, ...], quantize: str, threads: int
) -> None:
    """A number half way between two steps may go either way, so that inputs may be off by one step: much of 8 bits."""
    dynamic = quantize == "int8-dynamic"
    linears = linears_of(d_in, d_outs)
    linears[0].weight[0] = 0.0
    products = NativeProducts(library, linears, weights_of(d_in, d_outs), LargePages(), quantize)
    for count in (1, 2, 3, 6, 7, 8, 9, 12, 13, 40, 129):
        x = rows_of(count, d_in)
        batch, terms = reference_terms(d_in, d_outs, count, "unsorted")
        seen = inputs_seen(x[0], quantize)
        with torch_threads(threads):
            ys, adapted = products.compute(x, None), products.compute(x, batch)
        for linear, y, with_terms, term in zip(linears, ys, adapted, terms, strict=True):
            bias = None if linear.bias is None else linear.bias.double()
            assert error(y[0], F.linear(seen, in_steps(linear.weight), bias)) <= (1e-3 if dynamic else TOLERANCE)
            assert error(y[0], F.linear(x[0].double(), linear.weight.double(), bias)) <= 0.05
            assert error(with_terms[0], y[0] + term) <= TOLERANCE


@pytest.mark.parametrize(("outlier", "part"), [(1.0, 100), (100.0, 20)])
def test_inputs_beside_8_bit_weights_are_as_good_as_exact(library: Library, outlier: float, part: int) -> None:
    """Of 16 bits at least: a hundredth of what the weights' rounding does, a twentieth beside a large one."""
    (linear,) = linears_of(576, (200,), bias=False)
    products = NativeProducts(library, [linear], [], LargePages(), "int8")
    x = rows_of(20, 576)
    x[..., 70] *= outlier
    (y,) = products.compute(x, None)
    rounded = F.linear(x[0].double(), in_steps(linear.weight))
    by_weights = (rounded - F.linear(x[0].double(), linear.weight.double())).abs().max()
    assert (y[0] - rounded).abs().max() <= by_weights / part


@pytest.mark.parametrize("step", [127, 127 * 256, 126 * 256 + 128, 127 * 256 - 129, 128, 1])
@pytest.mark.parametrize("signs", list(product((1.0, -1.0), repeat=2)))
def test_sums_of_the_largest_numbers_in_8_bits(library: Library, signs: tuple[float, float], step: int) -> None:
    """All weights of one size, all inputs but one of a group too, `step` in 16 bits: either part is at its bounds."""
    (linear,) = linears_of(192, (33,), bias=False)
    linear.weight.fill_(signs[0])
    x = torch.full((1, 13, 192), signs[1] * step / STEPS_OF_16_BITS)
    x[..., ::GROUP] = signs[1]
    for quantize in ("int8", "int8-dynamic"):
        (y,) = NativeProducts(library, [linear], [], LargePages(), quantize).compute(x, None)
        expected = F.linear(inputs_seen(x[0], quantize), linear.weight.double())
        torch.testing.assert_close(y[0].double(), expected, rtol=1e-6, atol=0)


def check_fault_in_a_row(products: NativeProducts, count: int, place: int, fault: float | Tensor) -> None:
    """That it is seen in all of its row's outputs, and in no other row's; of 130 inputs."""
    x = rows_of(count, 130)
    clean = products.compute(x, None)
    x[0, count // 2, place] = fault
    others = [row for row in range(count) if row != count // 2]
    for y, before in zip(products.compute(x, None), clean, strict=True):
        assert not bool(y[0, count // 2].isfinite().any())
        assert torch.equal(y[0, others], before[0, others])


@pytest.mark.parametrize("quantize", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_in_a_row_is_not_hidden_by_8_bits(library: Library, quantize: str, fault: float) -> None:
    """And stays in that row."""
    products = NativeProducts(library, linears_of(130, (31, 40)), [], LargePages(), quantize)
    for count, place in product((1, 5, 20), (0, 63, 64, 129)):
        check_fault_in_a_row(products, count, place, fault)


@pytest.mark.parametrize("scale", [1e-30, 1e20])
@pytest.mark.parametrize("quantize", ["int8", "int8-dynamic"])
def test_8_bits_serve_small_and_large_numbers(library: Library, quantize: str, scale: float) -> None:
    (linear,) = linears_of(64, (33,), bias=False)
    products = NativeProducts(library, [linear], [], LargePages(), quantize)
    x = rows_of(4, 64) * scale
    (y,) = products.compute(x, None)
    expected = F.linear(x[0].double(), linear.weight.double())
    assert error(y[0], expected) <= 0.05

"""Products by AMX tiles: as near to the exact ones as those in fp32, whatever the rows, with and without adapters. With
8-bit weights they are the same numbers as without tiles."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapters.products
from adapters.kernels.build import built_file
from adapters.kernels.contract import POOL_DTYPES
from adapters.kernels.library import Layer, Library, usable_targets
from adapters.memory import LargePages
from adapters.products import QUANTIZED, NativeProducts
from tests.native_support import library_of, torch_threads
from tests.test_products import check_fault_in_a_row, error, linears_of, reference_terms, rows_of, weights_of

TARGET = "avx512amx"
FLUSHED = 2.0**-126
"""Tiles take smaller numbers for zero."""


@pytest.fixture(scope="module")
def tiles() -> Library:
    if TARGET not in usable_targets():
        pytest.skip("the processor has no AMX")
    library = library_of(TARGET)
    if not library.has_tiles:
        pytest.skip("the system does not let this process use AMX")
    return library


def exact(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("d_in", "d_outs"), [(1, (1,)), (31, (40, 33)), (65, (7, 96, 32)), (130, (31, 64))])
def test_every_number_of_rows(tiles: Library, d_in: int, d_outs: tuple[int, ...], threads: int) -> None:
    linears = linears_of(d_in, d_outs, "bf16")
    products = NativeProducts(tiles, linears, [], LargePages())
    for count in range(1, 301):
        x = rows_of(count, d_in)
        with torch_threads(threads):
            ys = products.compute(x, None)
        for y, linear in zip(ys, linears, strict=True):
            assert error(y, exact(x, linear)) <= 2e-6, count


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("popularity", ["unsorted", "sorted", "identical"])
def test_with_adapters_and_every_number_of_rows(tiles: Library, popularity: str, threads: int) -> None:
    d_in, d_outs = 65, (7, 96)
    linears = linears_of(d_in, d_outs, "bf16")
    products = NativeProducts(tiles, linears, weights_of(d_in, d_outs), LargePages())
    for count in (*range(1, 65), *range(65, 301, 7)):
        x = rows_of(count, d_in)
        batch, terms = reference_terms(d_in, d_outs, count, popularity)
        with torch_threads(threads):
            ys = products.compute(x, batch)
        for y, linear, term in zip(ys, linears, terms, strict=True):
            assert error(y[0], exact(x[0], linear) + term) <= 1e-5, count


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize(("d_in", "d_outs"), [(31, (40, 33)), (64, (7,)), (130, (31, 64)), (576, (96,))])
def test_in_8_bits_tiles_give_the_same_as_without_them(
    tiles: Library, d_in: int, d_outs: tuple[int, ...], form: str, threads: int
) -> None:
    linears = linears_of(d_in, d_outs, "fp32")
    by_tiles, without = (
        NativeProducts(library, linears, [], LargePages(), form) for library in (tiles, library_of("avx512vnni"))
    )
    for count in (*range(1, 140), 144, 145, 192, 257, 300):
        x = rows_of(count, d_in)
        with torch_threads(threads):
            for y, expected in zip(by_tiles.compute(x, None), without.compute(x, None), strict=True):
                assert torch.equal(y, expected), count


def ill_scaled(x: Tensor) -> Tensor:
    """Between 1e-20 and 1e20."""
    return x * 10 ** (40 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 20)


def cancelling(x: Tensor) -> Tensor:
    """Neighbours that nearly take each other away, under weights that are the same in pairs."""
    y = x.clone()
    y[:, 1::2] = -x[:, ::2] * (1 + 2.0**-18)
    return y


INPUTS = {"random": lambda x: x, "ill-scaled": ill_scaled, "cancelling": cancelling, "tiny": lambda x: x * 1e-25}


@pytest.mark.parametrize("count", [8, 16, 33, 140])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("d_in", [64, 576, 1536])
def test_the_error_is_no_larger_than_in_fp32(
    tiles: Library, monkeypatch: pytest.MonkeyPatch, d_in: int, kind: str, count: int
) -> None:
    """Against products in double precision: root mean squares of errors, each over the sum of its terms' sizes."""
    (linear,) = linears_of(d_in, (96,), "bf16", bias=False)
    linear.weight[:, 1::2] = linear.weight[:, ::2]
    by_tiles = NativeProducts(tiles, [linear], [], LargePages())
    monkeypatch.setattr(adapters.products, "exact_form", lambda _: POOL_DTYPES.index(torch.float32))
    in_fp32 = NativeProducts(tiles, [linear], [], LargePages())
    x = INPUTS[kind](rows_of(count, d_in)[0])
    expected = exact(x, linear)
    size = F.linear(x.double().abs(), linear.weight.double().abs())
    off, off_in_fp32 = (
        float(((products.compute(x, None)[0] - expected) / size).square().mean().sqrt())
        for products in (by_tiles, in_fp32)
    )
    assert 0 < off <= off_in_fp32


def test_numbers_too_small_for_tiles_are_taken_for_zero(tiles: Library) -> None:
    (linear,) = linears_of(64, (96,), "bf16", bias=False)
    products = NativeProducts(tiles, [linear], [], LargePages())
    for scale in (1e-33, 1e-36, 1e-38, 1e-42):
        x = rows_of(20, 64)[0] * scale
        off = (products.compute(x, None)[0] - exact(x, linear)).abs()
        assert off.max() <= 64 * 4 * FLUSHED


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF])
def test_what_is_not_finite_stays_in_its_row_and_is_not_hidden(tiles: Library, bits: int) -> None:
    """Infinities, and numbers that are none, also by their last bits alone."""
    fault = torch.tensor([bits], dtype=torch.uint32).view(torch.float32)
    products = NativeProducts(tiles, linears_of(130, (31, 40), "bf16"), [], LargePages())
    for count in (8, 17, 40, 130):
        for place in (0, 63, 129):
            check_fault_in_a_row(products, count, place, fault)


def test_large_numbers_do_not_overflow_in_parts(tiles: Library) -> None:
    """Rounded to bf16 the largest would be infinite."""
    (linear,) = linears_of(64, (33,), "bf16", bias=False)
    linear.weight.fill_(2.0**-10)
    x = torch.full((9, 64), torch.finfo(torch.float32).max)
    (y,) = NativeProducts(tiles, [linear], [], LargePages()).compute(x, None)
    assert error(y, exact(x, linear)) <= 1e-6


@pytest.mark.parametrize("count", [8, 31, 129])
def test_rows_may_lie_apart(tiles: Library, count: int) -> None:
    """Nothing between them is read as theirs, or written."""
    (linear,) = linears_of(65, (40,), "bf16")
    packed = tiles.pack(linear.weight, POOL_DTYPES.index(torch.bfloat16), LargePages())
    x, y = torch.full((count, 70), float("nan")), torch.full((count, 43), 7.0)
    x[:, :65] = rows_of(count, 65)[0]
    layer = Layer(
        packed=packed.data_ptr(), bias=linear.bias.data_ptr(), d_in=65, d_out=40, y=y.data_ptr(), y_stride=43,
        dtype=POOL_DTYPES.index(torch.bfloat16),
    )  # fmt: skip
    tiles.linear(ctypes.addressof(layer), 1, x.data_ptr(), 70, count, None, 0)
    assert error(y[:, :40], exact(x[:, :65], linear)) <= 2e-6
    assert bool((y[:, 40:] == 7).all())


def test_layers_in_other_forms_may_share_the_input(tiles: Library) -> None:
    linears = [*linears_of(65, (40,), "fp16"), *linears_of(65, (33,), "bf16"), *linears_of(65, (7,), "fp32")]
    products = NativeProducts(tiles, linears, [], LargePages())
    x = rows_of(50, 65)
    for y, linear in zip(products.compute(x, None), linears, strict=True):
        assert error(y, exact(x, linear)) <= 2e-6


REFUSED = """
import ctypes, sys
class Stack(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))
memory = ctypes.create_string_buffer(8192)  # too small for a signal's frame with tiles: the system refuses them
stack = Stack(ctypes.addressof(memory), 0, len(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
from pathlib import Path
import torch
from adapters.kernels.library import Library
from adapters.memory import LargePages
from adapters.products import QUANTIZED, NativeProducts
from tests.test_products import linears_of, rows_of, error
library = Library(Path(sys.argv[1]))
assert not library.has_tiles
linears, x = linears_of(65, (40,), "bf16"), rows_of(40, 65)
for quantize, most in {"": 1e-5, **dict.fromkeys(QUANTIZED, 0.05)}.items():
    (y,) = NativeProducts(library, linears, [], LargePages(), quantize).compute(x, None)
    assert error(y, linears[0](x)) <= most, quantize
print("computed")
"""


@pytest.mark.usefixtures("tiles")
def test_without_leave_to_use_tiles_products_are_computed_all_the_same() -> None:
    command = [sys.executable, "-c", REFUSED, str(built_file(TARGET))]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert (result.stdout, result.returncode) == ("computed\n", 0), result.stderr[-2000:]

"""Memory that costs nothing until it is used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from adapters.memory import lazy_zeros

CPU = torch.device("cpu")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5, 2)])
def test_zeros_of_any_shape_that_can_be_written(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = lazy_zeros(shape, dtype, CPU)
    assert torch.equal(tensor, torch.zeros(shape, dtype=dtype))
    assert tensor.data_ptr() % 64 == 0
    tensor += 1
    assert torch.equal(tensor, torch.ones(shape, dtype=dtype))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_what_is_touched_is_paid_for() -> None:
    before = resident_bytes()
    tensor = lazy_zeros((1024, 1 << 18), torch.float32, CPU)
    assert tensor.nbytes == 1 << 30
    assert resident_bytes() - before < 1 << 27
    tensor[5] = 1.0
    assert resident_bytes() - before < 1 << 27
    assert float(tensor[5].sum()) == 1 << 18

"""Memory that costs nothing until it is used."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like torch.zeros; but on the CPU the system gives each page only when it is first touched.

    torch.zeros fills what it allocates, so that a cache sized for the worst day is paid for at start.
    """
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)

"""Memory that costs nothing until it is used."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

ALIGNMENT_BYTES = 64


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like torch.zeros; but on the CPU the system gives each page only when it is first touched.

    torch.zeros fills what it allocates, so that a cache sized for the worst day is paid for at start.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = prod(shape) * dtype.itemsize
    block = np.zeros(size + ALIGNMENT_BYTES, dtype=np.uint8)  # calloc
    start = -block.ctypes.data % ALIGNMENT_BYTES
    return torch.from_numpy(block[start : start + size]).view(dtype).view(shape)

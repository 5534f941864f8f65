"""Memory that costs nothing until it is used, and memory in large pages."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like torch.zeros; but on the CPU the system gives each page only when it is first touched.

    torch.zeros fills what it allocates, so that a cache sized for the worst day is paid for at start.
    """
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


class LargePages:
    """Hands out host memory from chunks for which the system is asked to use large pages.

    Weights that are read from end to end at every step cross a 4 KB page's border all the time; each is a look-up.
    What is handed out lives as long as any tensor of its chunk.
    """

    def __init__(self, chunk_bytes: int = 64 << 20) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """[count] numbers, zero, aligned for vectors."""
        size = -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if self._used + size > len(self._chunk):
            self._chunk = self._map(max(size, self._chunk_bytes))
            self._used = 0
        start = self._used
        self._used += size
        return self._chunk[start : start + count * dtype.itemsize].view(dtype)

    def _map(self, size: int) -> Tensor:
        memory = mmap.mmap(-1, max(size, mmap.PAGESIZE))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)

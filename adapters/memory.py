"""Memory that costs nothing until it is used, and memory in large pages."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor, nn

LARGE_BYTES = 2 << 20
"""Less than a large page gains nothing from one."""
ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like torch.zeros; but on the CPU the system gives each page only when it is first touched.

    torch.zeros fills what it allocates, so that a cache sized for the worst day is paid for at start.
    """
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(_map(size), dtype=dtype, count=prod(shape)).view(shape)


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
            self._chunk = torch.frombuffer(_map(max(size, self._chunk_bytes)), dtype=torch.uint8)
            self._used = 0
        start = self._used
        self._used += size
        return self._chunk[start : start + count * dtype.itemsize].view(dtype)


@torch.no_grad()
def leave_files(model: nn.Module) -> None:
    """Copy what is left of a model's weights, so that the mapping of its whole checkpoint can go."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _map(size: int) -> mmap.mmap:
    """Anonymous memory, zero, for which the system is asked to use large pages."""
    size = max(size, mmap.PAGESIZE)
    if not hasattr(mmap, "MAP_PRIVATE"):  # not a Unix system
        return mmap.mmap(-1, size)
    # Python's default is memory to be shared with children, for which Linux gives no large pages.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= LARGE_BYTES:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory

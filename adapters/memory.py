"""Memory that costs nothing until it is used, memory in large pages, and mapped files that are let go."""

from __future__ import annotations

import ctypes
import mmap
import sys
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

LARGE_BYTES = 2 << 20
"""Less than a large page gains nothing from one."""
ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like torch.zeros; but on the CPU the system gives each page only when it is first touched.

    torch.zeros fills what it allocates, so that a cache sized for the worst day is paid for at start. In small pages:
    of each layer's keys and values a large one would take 2 MB for the first token.
    """
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(_map(size, large=False), dtype=dtype, count=prod(shape)).view(shape)


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
            self._chunk = torch.frombuffer(_map(max(size, self._chunk_bytes), large=True), dtype=torch.uint8)
            self._used = 0
        start = self._used
        self._used += size
        return self._chunk[start : start + count * dtype.itemsize].view(dtype)


class MappedFiles:
    """The files that are mapped, and not written to, when this is made, as a checkpoint is by safetensors.

    What was read of them stays in this process's memory as long as anything of the whole file is used, unless it is let
    go of. Linux only; elsewhere there are none. `smaps`: tells them, see proc_pid_smaps(5).
    """

    def __init__(self, smaps: Path = Path("/proc/self/smaps")) -> None:
        self._ranges: list[tuple[int, int]] = []
        for line in smaps.read_text().splitlines() if sys.platform == "linux" else ():
            words = line.split()
            if not words[0].endswith(":"):  # a mapping: first-last, rights, offset, device, inode (0: no file), path
                first, last = (int(address, 16) for address in words[0].split("-"))
                of_file = words[4] != "0"
            elif words[0] == "Anonymous:" and words[1] == "0" and of_file:
                self._ranges.append((first, last))

    def leave(self, tensor: Tensor) -> None:
        """Let go of the pages that `tensor` fills, where it lies in one of the files and has not been written to since.

        A matrix may lie transposed. Nothing is lost: a page that is touched again is read again.
        """
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        whole = tensor.is_contiguous() or (tensor.dim() == 2 and tensor.T.is_contiguous())
        if not whole or not any(first <= start and end <= last for first, last in self._ranges):
            return
        start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


@torch.no_grad()
def leave_files(model: nn.Module) -> None:
    """Copy what is left of a model's weights, so that the mapping of its whole checkpoint can go."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _map(size: int, large: bool) -> mmap.mmap:
    """Anonymous memory, zero; large: the system is asked to use large pages."""
    size = max(size, mmap.PAGESIZE)
    if not hasattr(mmap, "MAP_PRIVATE"):  # not a Unix system
        return mmap.mmap(-1, size)
    # Python's default is memory to be shared with children, for which Linux gives no large pages.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if large and hasattr(mmap, "MADV_HUGEPAGE") and size >= LARGE_BYTES:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory

"""Memory that costs nothing until it is used, memory in large pages, and memory that is let go."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

LARGE_BYTES = 2 << 20
"""Less than a large page gains nothing from one."""
ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""
SMAPS = Path("/proc/self/smaps")


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


class Mapping(NamedTuple):
    """A range of this process's addresses."""

    first: int
    last: int
    rights: str
    """As `r-xp`."""
    file: str
    """Path of the file that is mapped; empty: of none."""
    private_bytes: int
    """Of memory that this process holds for itself here, swapped out or not: what was written to."""

    @property
    def unwritten(self) -> bool:
        """Whether all of it stands in a file."""
        return bool(self.file) and not self.private_bytes


class MappedFiles:
    """The files that are mapped, and not written to, when this is made, as a checkpoint is by safetensors.

    What was read of them stays in this process's memory as long as anything of the whole file is used, unless it is let
    go of. Linux only; elsewhere there are none. `smaps`: tells them, see proc_pid_smaps(5).
    """

    def __init__(self, smaps: Path = SMAPS) -> None:
        self._ranges = [(mapping.first, mapping.last) for mapping in _mappings(smaps) if mapping.unwritten]

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
            _let_go(start, end)


def give_back() -> None:
    """Give the system what nothing uses now: blocks that malloc keeps, and pages that only loading libraries read.

    Loading one reads tables of it that are never looked at again; a page that is, is taken from the system's cache.
    Linux only, malloc's with glibc only; elsewhere nothing happens. Any thread.
    """
    before = set(_mappings(SMAPS))  # a library that another thread loads lies mapped whole before its data do
    mappings = [mapping for mapping in _mappings(SMAPS) if mapping in before]
    libraries = {mapping.file for mapping in mappings if "x" in mapping.rights}  # which nobody unloads meanwhile
    for mapping in mappings:
        if mapping.unwritten and mapping.file in libraries and "w" not in mapping.rights:
            _let_go(mapping.first, mapping.last)
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


@torch.no_grad()
def leave_files(model: nn.Module) -> None:
    """Copy what is left of a model's weights, so that the mapping of its whole checkpoint can go."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _mappings(smaps: Path) -> Iterator[Mapping]:
    """All of this process's, as far as the system tells. Linux only; elsewhere none."""
    try:
        told = smaps.read_bytes() if sys.platform == "linux" else b""
    except OSError:  # no /proc, or one that is kept from us
        return
    head: list[str] = []
    anonymous = 0
    for line in told.decode("utf-8", "surrogateescape").split("\n"):  # names may hold any other byte
        words = line.split(maxsplit=5)
        if not words:
            continue
        if not words[0].endswith(":"):  # first-last, rights, offset, device, inode (0: no file), path
            head = words
        elif words[0] == "Anonymous:":
            anonymous = int(words[1])
        elif words[0] == "Swap:":  # stands after it
            first, last = (int(address, 16) for address in head[0].split("-"))
            file = head[5] if head[4] != "0" else ""
            yield Mapping(first, last, head[1], file, (anonymous + int(words[1])) * 1024)


def _let_go(start: int, end: int) -> None:
    """Addresses of pages."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


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

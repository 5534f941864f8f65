"""ArenaFiles: arenas of versions that this process has read before, a file each: to read one again is one copy.

A file holds the bytes of an arena and, after them, where each number lies (arena_map.py). It lives no longer than the
process that wrote it: for that process base, dtypes, limits and code are the same as when it was written, so that a
version's digest says all, and nothing need be found whole after a crash. Knows nothing of checkpoints or of tiers.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.adapter import Adapter, AdapterInfo
from adapters.arena import empty_arena
from adapters.arena_map import can_be_mapped, map_arena, read_map

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Written:
    """What was written for one version."""

    arena_bytes: int
    map_bytes: int
    crc32: int

    @property
    def num_bytes(self) -> int:
        return self.arena_bytes + self.map_bytes


class ArenaFiles:
    """At most `max_bytes` of them, the least recently used one makes room. Any thread may call any method.

    A file that is damaged, shortened or gone is never served: the size and a CRC-32 of all bytes are those that were
    written, at every reading, or there is no such file from then on. That is against faults of the disk and accidents;
    who may write here on purpose may write to the store too. When the disk takes no more, nothing is written.
    """

    def __init__(self, directory: Path, max_bytes: int, spare_bytes: int = 0, pinned: bool = False) -> None:
        """directory: exists, is empty, and nobody else's. spare_bytes: of the disk are always left to others.

        pinned: as build_arena has it.
        """
        self.reads = 0
        """Adapters that were got from here."""
        self._directory = directory
        self._max_bytes = max_bytes
        self._spare_bytes = spare_bytes
        self._pinned = pinned
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._files: dict[str, _Written] = {}
        """By digest, the least recently used first."""
        self._failing = False

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return sum(written.num_bytes for written in self._files.values())

    def read(self, info: AdapterInfo) -> Adapter | None:
        """The version that `info` describes; None where there is no whole file of it."""
        with self._lock:
            written = self._files.pop(info.digest, None)
            if written is None:
                return None
            self._files[info.digest] = written
        try:
            adapter = self._read(info, written)
        except OSError as error:
            if self._forget(info.digest):  # else it made room meanwhile
                logger.warning("the arena file of %s is lost, its checkpoint is read: %s", info.digest[:12], error)
            return None
        with self._lock:
            self.reads += 1
        return adapter

    def write(self, adapter: Adapter) -> None:
        """Keep its arena, where that can be; one at a time: while another is written, nothing is done.

        Nobody may be changing its numbers. Does not wait until it is on the disk.
        """
        if adapter.info.digest in self._files or not can_be_mapped(adapter):
            return
        if not self._writing.acquire(blocking=False):
            return
        try:
            if adapter.info.digest not in self._files:  # still
                self._write(adapter)
                self._failing = False
        except OSError as error:
            level = logging.DEBUG if self._failing else logging.WARNING
            logger.log(level, "no arena file is written, checkpoints are read again: %s", error)
            self._failing = True
        finally:
            self._writing.release()

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Remove the files of all digests but those for which `wanted` is true. It is called without a lock."""
        with self._lock:
            digests = [*self._files]
        for digest in digests:
            if not wanted(digest):
                self._forget(digest)

    def _read(self, info: AdapterInfo, written: _Written) -> Adapter:
        started = time.monotonic()
        memory = empty_arena(written.arena_bytes, self._pinned)
        with self._path(info.digest).open("rb") as handle:
            if os.fstat(handle.fileno()).st_size != written.num_bytes:
                raise OSError("it has another size")
            count = handle.readinto(memory.numpy().data)
            text = handle.read(written.map_bytes)
        if count != written.arena_bytes or zlib.crc32(text, zlib.crc32(memory.numpy().data)) != written.crc32:
            raise OSError("it is damaged")
        return replace(read_map(text, memory, info), loaded_in_s=time.monotonic() - started)

    def _write(self, adapter: Adapter) -> None:
        digest, memory = adapter.info.digest, adapter.memory
        assert memory is not None
        text = map_arena(adapter)
        written = _Written(len(memory), len(text), zlib.crc32(text, zlib.crc32(memory.numpy().data)))
        if written.num_bytes > self._max_bytes:
            return
        self._make_room(written.num_bytes)
        if shutil.disk_usage(self._directory).free < written.num_bytes + self._spare_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            with open(self._path(digest), "wb", opener=_open_private) as handle:
                handle.write(memory.numpy().data)
                handle.write(text)
        except OSError:
            self._remove(digest)
            raise
        with self._lock:
            self._files[digest] = written

    def _make_room(self, size: int) -> None:
        with self._lock:
            taken = sum(written.num_bytes for written in self._files.values())
            leaving = []
            for digest, written in self._files.items():
                if taken + size <= self._max_bytes:
                    break
                leaving.append(digest)
                taken -= written.num_bytes
        for digest in leaving:
            self._forget(digest)

    def _forget(self, digest: str) -> bool:
        """Whether it was there."""
        with self._lock:
            found = self._files.pop(digest, None) is not None
            if found:
                self._remove(digest)
        return found

    def _remove(self, digest: str) -> None:
        with suppress(OSError):
            self._path(digest).unlink()

    def _path(self, digest: str) -> Path:
        return self._directory / digest


def _open_private(path: str, flags: int) -> int:
    """A checkpoint may be readable by its owner only."""
    return os.open(path, flags, 0o600)

"""HostTier: which versions lie in host memory. Reads them from disk in its own threads, each once however many ask.

Knows nothing of names or of requests. What reads runs without the registry's lock, all else under it; any thread.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event, RLock

from adapters.adapter import Adapter
from adapters.arena_files import ArenaFiles
from adapters.errors import AdapterError
from adapters.version import AdapterVersion, Source

logger = logging.getLogger(__name__)

REST_AFTER_LOAD, LONGEST_REST_S = 14.0, 0.5
"""While requests run, a thread reads a fifteenth of the time: on few cores, what reads is taken from what computes."""
NICENESS = 10
RETRY_FAILED_S = 30.0
"""A version that could not be read is not tried again for so long."""


@dataclass(frozen=True)
class HostLimits:
    """Bounds of the host tier."""

    max_loras: int
    max_bytes: int
    threads: int
    """Versions that are read at once."""


@dataclass
class HostCounts:
    """What happened since the start."""

    loads: int = 0
    failures: int = 0
    evictions: int = 0


class HostTier:
    """Versions in host memory, at most so many and so many bytes; the least recently used one makes room.

    A version whose sequences run is never taken; one that others wait for only where the reader is owed service
    (`urgent`). Reads begin in the order of asking, urgent ones first, and wait while there is no room.
    """

    def __init__(
        self,
        lock: RLock,
        limits: HostLimits,
        read: Callable[[Source], Adapter],
        leave_device: Callable[[AdapterVersion], None],
    ) -> None:
        self.counts = HostCounts()
        self.changed: Callable[[], None] = lambda: None
        """Called when a read has ended, well or not. Any thread."""
        self.loaded: Callable[[float], None] = lambda _: None
        """Called with the seconds that a read took. A thread of this tier."""
        self.busy: Callable[[], bool] = lambda: False
        """Whether requests run. A thread of this tier."""
        self.arenas: ArenaFiles | None = None
        """Whence versions are read again; None: always from their source."""
        self._closing = Event()
        self._lock = lock
        self._limits = limits
        self._read_source = read
        self._leave_device = leave_device
        self._resident: dict[AdapterVersion, int] = {}
        """Version -> bytes."""
        self._loading: dict[AdapterVersion, int] = {}
        self._wanted: dict[AdapterVersion, bool] = {}
        """Version -> whether it is urgent; in the order of asking."""
        self._threads = ThreadPoolExecutor(limits.threads, "loader", initializer=_step_back)

    @property
    def num_bytes(self) -> int:
        return sum(list(self._resident.values()))

    def __len__(self) -> int:
        return len(self._resident)

    def want(self, version: AdapterVersion, urgent: bool = False) -> None:
        """Have it read, when there is room. Cheap when that is under way, and when it failed a short while ago."""
        if version.in_host or version in self._loading or self.failed(version):
            return
        if version.source is None:
            self._fail(version, "its files are there no more")
        elif version.info.num_bytes > self._limits.max_bytes:
            self._fail(version, f"it takes {version.info.num_bytes} bytes, host memory for adapters is less")
        elif version not in self._wanted or (urgent and not self._wanted[version]):
            self._wanted[version] = urgent
            self.start()

    def admit(self, version: AdapterVersion, adapter: Adapter, leaving: AdapterVersion | None = None) -> bool:
        """Keep an adapter that was read by somebody else; False when there is no room for it.

        leaving: a version that will be forgotten, and may make room.
        """
        if version.in_host:
            return True
        if version in self._loading or not self._make_room(adapter.nbytes, urgent=False, leaving=leaving):
            return False
        self._wanted.pop(version, None)
        self._keep(version, adapter)
        return True

    def drop(self, version: AdapterVersion) -> int:
        """Forget it, wherever it is on its way; bytes freed."""
        self._wanted.pop(version, None)
        self._loading.pop(version, None)
        version.adapter = None
        return self._resident.pop(version, 0)

    def failed(self, version: AdapterVersion) -> bool:
        """Whether reading it failed a short while ago; forgets an older failure."""
        if version.failure is not None and time.monotonic() - version.failed_at > RETRY_FAILED_S:
            version.failure = None
        return version.failure is not None

    def start(self) -> None:
        """Begin what is wanted, as far as threads and room allow. To be called when there may be more room."""
        if not self._wanted:
            return
        for version in sorted(self._wanted, key=lambda v: not self._wanted[v]):
            if len(self._loading) >= self._limits.threads:
                return
            if not (version.holders or version.pins):
                del self._wanted[version]  # whoever asked has gone
            elif self._make_room(version.info.num_bytes, self._wanted[version]):
                del self._wanted[version]
                self._loading[version] = version.info.num_bytes
                self.submit(self._load, version)
            else:
                return

    def submit(self, function: Callable[..., None], *arguments: object) -> Future[None]:
        """Run something else that reads in a thread of this tier."""
        return self._threads.submit(function, *arguments)

    def close(self) -> None:
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)

    def check_integrity(self, versions: set[AdapterVersion]) -> None:
        """Raise AssertionError unless it holds just what `versions`, all that there are, say."""
        assert set(self._resident) == {v for v in versions if v.in_host}
        assert set(self._loading) <= versions
        assert set(self._wanted) <= versions
        assert not set(self._loading) & (set(self._wanted) | set(self._resident))
        assert not set(self._wanted) & set(self._resident)
        assert len(self._resident) + len(self._loading) <= self._limits.max_loras

    def forget_files(self, in_use: Callable[[str], bool]) -> None:
        """Remove the arena files of versions for whose digest `in_use` is false. Without the registry's lock."""
        if self.arenas is not None:
            self.arenas.keep(in_use)

    def read(self, source: Source) -> Adapter:
        """Read it now, in this thread, without the registry's lock. Raises InvalidAdapter, OSError."""
        started = time.monotonic()
        adapter = self._read_again(source) or self._read_source(source)
        with self._lock:
            self.counts.loads += 1
        self.loaded(time.monotonic() - started)
        return adapter

    def _load(self, version: AdapterVersion) -> None:
        """A thread of this tier."""
        started = time.thread_time()
        source = version.source
        try:
            assert source is not None
            adapter = self.read(source)
            if adapter.info.digest != version.digest:
                raise AdapterError("its files hold other content now")
        except Exception as error:
            if not isinstance(error, AdapterError):
                logger.error("reading adapter %s failed", version.digest[:12], exc_info=error)
            text = str(error) if isinstance(error, AdapterError) else "reading its files failed"
            with self._lock:
                self._loading.pop(version, None)
                self._fail(version, text)
                self.start()
            self.changed()
        else:
            with self._lock:
                if version.source is source:
                    version.source = source.read_as(adapter.info)
                if self._loading.pop(version, None) is not None:
                    self._keep(version, adapter)
                self.start()
            self.changed()
            self._keep_file(version, source, adapter)
        if self.busy():
            self._closing.wait(min(REST_AFTER_LOAD * (time.thread_time() - started), LONGEST_REST_S))

    def _read_again(self, source: Source) -> Adapter | None:
        """From its arena file, where there is one: this process knows which content it has written there."""
        return None if self.arenas is None or source.known is None else self.arenas.read(source.known)

    def _keep_file(self, version: AdapterVersion, source: Source, adapter: Adapter) -> None:
        """A version that is read a second time comes and goes: the next time it is one read. Whoever waited has it."""
        if self.arenas is None or source.known is None:
            return
        self.arenas.write(adapter)
        with self._lock:
            forgotten = not (version.names or version.holders)
        if forgotten:  # meanwhile, so that `forget_files` may have come too early
            self.arenas.keep(lambda digest: digest != version.digest)

    def _keep(self, version: AdapterVersion, adapter: Adapter) -> None:
        version.adapter = adapter
        version.loaded_in_s = adapter.loaded_in_s
        version.failure = None
        self._resident[version] = adapter.nbytes

    def _fail(self, version: AdapterVersion, reason: str) -> None:
        self.counts.failures += 1
        version.failure, version.failed_at = reason, time.monotonic()

    def _make_room(self, size: int, urgent: bool, leaving: AdapterVersion | None = None) -> bool:
        """Whether one more of `size` bytes has its place; evicts for it, but nothing unless that is enough."""
        count = len(self._resident) + len(self._loading) + 1 - self._limits.max_loras
        taken = self.num_bytes + sum(self._loading.values()) + size - self._limits.max_bytes
        chosen = []
        for version in self._leaving_order(urgent, leaving) if count > 0 or taken > 0 else ():
            chosen.append(version)
            count, taken = count - 1, taken - self._resident[version]
            if count <= 0 and taken <= 0:
                break
        if count > 0 or taken > 0:
            return False
        for version in chosen:
            self._leave_device(version)
            version.adapter = None
            del self._resident[version]
            self.counts.evictions += 1
        return True

    def _leaving_order(self, urgent: bool, leaving: AdapterVersion | None) -> list[AdapterVersion]:
        """What may leave, what goes first before."""
        may_leave = [
            version
            for version in self._resident
            if version is not leaving and version.source is not None
            and not version.slot_users and not version.pins and (urgent or not version.expected)
        ]  # fmt: skip
        may_leave.sort(key=lambda v: (v.expected > 0, v.used_at))
        return [leaving, *may_leave] if leaving is not None and leaving in self._resident else may_leave


def _step_back() -> None:
    """Give this thread a lower priority than those that compute, where threads have one of their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)

"""AdapterRegistry: names, versions, who holds them, and in which tiers they lie.

A name points at one version; a version is its content digest. Requests and slots hold versions, never names, so that
replacing or removing a name touches nothing that runs. A version is forgotten, and its memory freed, when no name
points at it and its last holder lets go. Knows nothing of HTTP, scheduling or where files come from.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from adapters.adapter import Adapter, AdapterInfo
from adapters.composition import Composed, composed_source
from adapters.device_tier import DeviceTier
from adapters.errors import AdapterExists, AdapterNotFound, AdapterRefused, InvalidName, RegistryFull, TooManyPins
from adapters.host_tier import HostLimits, HostTier
from adapters.slots import LoraSlots
from adapters.version import AdapterVersion, Source, UnreadAdapter, promise

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
Entry = AdapterVersion | UnreadAdapter


def is_name(name: str) -> bool:
    """Whether it fits the pattern for adapter names."""
    return re.fullmatch(NAME_PATTERN, name) is not None


def no_source(source: Source) -> Adapter:
    """For a registry whose versions exist in memory only."""
    raise AssertionError(f"nothing can be read from {source}")


class AdapterRegistry:
    """All adapters of one base. Methods may be called from any thread unless they say otherwise."""

    def __init__(
        self,
        slots: LoraSlots,
        limits: HostLimits,
        reserved_names: Sequence[str] = (),
        read: Callable[[Source], Adapter] = no_source,
    ) -> None:
        self._max_loras = slots.max_loras
        self._reserved = frozenset(reserved_names)
        self._lock = threading.RLock()
        self._current: dict[str, Entry] = {}
        self._versions: dict[str, AdapterVersion] = {}
        self._refused: dict[str, tuple[str, ...]] = {}
        self._pinned: set[str] = set()
        self._clock = 0
        self.hits: Counter[str] = Counter()
        """Requests by the tier in which they found their adapter."""
        self.device = DeviceTier(slots)
        self.host = HostTier(self._lock, limits, read, self.device.leave)

    # Names

    def put(
        self, name: str, adapter: Adapter, replace: bool = True, source: Source | None = None
    ) -> tuple[AdapterVersion, bool]:
        """Point `name` at `adapter`, atomically; False when it did already.

        Requests in flight stay on the version that they hold. With a source it may leave host memory, or not enter it
        when that is full. Raises InvalidName, AdapterExists (the name has other content and `replace` is false),
        RegistryFull (without a source, when host memory has no room).
        """
        self.check_name(name)
        if source is not None:
            source = source.read_as(adapter.info)
        with self._lock:
            old = self._current.get(name)
            if isinstance(old, AdapterVersion) and old.digest == adapter.info.digest:
                self._refused.pop(name, None)
                self._renew(old, adapter, source)
                return old, False
            self.check_replaceable(name, replace)
            self._keep_in_memory(old, source)
            version = self._version(adapter.info, source)
            if not self.host.admit(version, adapter, _leaving(old)) and version.source is None:
                self._free_if_unused(version)
                raise RegistryFull("host memory holds as many adapters as it may; remove one first")
            version.used_at = self._tick()
            self._point(name, version)
            return version, True

    def add(self, name: str, info: AdapterInfo, source: Source) -> AdapterVersion:
        """Point `name` at a version that lies on disk. Raises InvalidName."""
        self.check_name(name)
        with self._lock:
            version = self._version(info, source)
            self._point(name, version)
            return version

    def add_unread(self, name: str, info: AdapterInfo, source: Source) -> None:
        """Serve as `name` what lies in `source`, to be read when it is asked for first. Raises InvalidName."""
        self.check_name(name)
        with self._lock:
            self._point(name, UnreadAdapter(info, source))

    def remove(self, name: str) -> tuple[Entry | None, Future[int]]:
        """Forget `name`: no new request finds it. None where it was refused. Raises AdapterNotFound.

        The future has the bytes freed, once the last holder has let go; 0 when another name has the same content.
        """
        with self._lock:
            refused = self._refused.pop(name, None)
            entry = self._current.pop(name, None)
            self._pinned.discard(name)
            if entry is None and refused is None:
                raise AdapterNotFound(name)
            if isinstance(entry, AdapterVersion) and len(entry.names) == 1:
                drained = entry.drained
            else:
                drained = promise()
                drained.set_result(0)
            if entry is not None:
                self._drop_name(entry, name)
            return entry, drained

    def refuse(self, name: str, reasons: Sequence[str]) -> None:
        """Remember why what is on disk is not served, to be listed; what `name` points at stays."""
        with self._lock:
            self._refused[name] = tuple(reasons)

    def refused(self) -> dict[str, tuple[str, ...]]:
        """Name -> reasons, of what was found but is not served as it is."""
        with self._lock:
            return dict(self._refused)

    def get(self, name: str) -> Entry:
        """What `name` points at now. Raises AdapterNotFound, AdapterRefused."""
        with self._lock:
            entry = self._current.get(name)
            if entry is not None:
                return entry
            reasons = self._refused.get(name)
        if reasons is not None:
            raise AdapterRefused(name, reasons)
        raise AdapterNotFound(name)

    def current(self, name: str) -> AdapterVersion:
        """As `get`, of an adapter that was read: raises AdapterNotFound of others."""
        entry = self.get(name)
        if isinstance(entry, UnreadAdapter):
            raise AdapterNotFound(name)
        return entry

    def list(self) -> list[tuple[str, Entry]]:
        """(name, version) of everything that is served, by name."""
        with self._lock:
            return sorted(self._current.items(), key=lambda item: item[0])

    def __len__(self) -> int:
        return len(self._current)

    def check_name(self, name: str) -> None:
        """Raises InvalidName unless `name` fits the pattern and is not the base model's."""
        if not is_name(name):
            raise InvalidName(f"an adapter's name must match {NAME_PATTERN}, not {name[:140]!r}")
        if name in self._reserved:
            raise InvalidName(f"{name!r} is the base model's name")

    def check_replaceable(self, name: str, replace: bool) -> None:
        """Raises AdapterExists where `name` points at something and `replace` is false."""
        with self._lock:
            if name in self._current and not replace:
                raise AdapterExists(f"adapter {name!r} exists with other content")

    def lose_source(self, name: str, path: Path) -> None:
        """What `name` points at can no longer be read from `path`: it stays as long as it is in memory, or goes now."""
        with self._lock:
            entry = self._current.get(name)
            if entry is None or entry.source is None or entry.source.path != path:
                return
            if isinstance(entry, AdapterVersion) and entry.in_host:
                entry.source = None
            else:
                self.remove(name)

    def pin(self, name: str, pinned: bool) -> None:
        """Keep what `name` points at on the device, from when the engine next can; or no more.

        Raises AdapterNotFound, TooManyPins: at most max_loras − 1 names are pinned, so that the others have a slot.
        """
        with self._lock:
            entry = self.get(name)
            if (name in self._pinned) is pinned:
                return
            if pinned and len(self._pinned) + 1 >= self._max_loras:
                raise TooManyPins(f"{len(self._pinned)} adapters are pinned, as many as max_loras − 1 allows")
            self._pinned.symmetric_difference_update({name})
            if isinstance(entry, AdapterVersion):
                self._change_pins(entry, 1 if pinned else -1)

    def pinned(self, name: str) -> bool:
        with self._lock:
            return name in self._pinned

    # Holders

    def acquire(self, name: str) -> AdapterVersion:
        """Hold the current version of `name` until `release`; if it lies on disk, it begins to be read.

        Raises AdapterNotFound, AdapterRefused (also when reading it failed a short while ago). Of an adapter that was
        not read yet the digest is not known: see `read_first`.
        """
        with self._lock:
            return self._hold_for_request(self.current(name), name)

    def acquire_version(self, name: str, info: AdapterInfo, source: Source | None) -> AdapterVersion:
        """As `acquire`, of a version that no name need point at. Raises AdapterRefused."""
        with self._lock:
            version = self._version(info, source)
            try:
                return self._hold_for_request(version, name)
            except AdapterRefused:
                self._free_if_unused(version)
                raise

    def acquire_composed(self, name: str, parts: Sequence[tuple[AdapterVersion, float]]) -> AdapterVersion:
        """As `acquire`, of versions with their weights, which the caller holds, as one. Raises AdapterRefused.

        It is known as long as somebody holds it, and holds its parts as long.
        """
        with self._lock:
            info, source = composed_source(parts)
            if info.digest not in self._versions:
                for version, _ in parts:
                    version.holders += 1
            return self.acquire_version(name, info, source)

    def hold(self, version: AdapterVersion) -> None:
        """Hold a version once more that is held already."""
        with self._lock:
            assert version.holders or version.names
            version.holders += 1

    def release(self, version: AdapterVersion) -> None:
        """Let go of a version got from `acquire` or `hold`."""
        with self._lock:
            version.holders -= 1
            self._free_if_unused(version)
            self.host.start()

    def expect(self, version: AdapterVersion) -> None:
        """A holder will need it in memory, until `unexpect`."""
        with self._lock:
            version.expected += 1

    def unexpect(self, version: AdapterVersion) -> None:
        """That holder needs it no more, though it may hold it still."""
        with self._lock:
            version.expected -= 1
            self.host.start()

    def in_use(self, digest: str) -> bool:
        """Whether this version is known here: named, or held by somebody."""
        with self._lock:
            return digest in self._versions

    def read_first(self, name: str) -> Future[None] | None:
        """None when the digest of what `name` points at is known; else a future that is done when it is, or refused.

        Whoever asks, it is read once. Call it again when the future is done: the name may have moved.
        Raises AdapterNotFound, AdapterRefused.
        """
        with self._lock:
            entry = self.get(name)
            if isinstance(entry, AdapterVersion):
                return None
            if entry.reading is None:
                entry.reading = self.host.submit(self._read_unread, name, entry)
            return entry.reading

    # The device

    def acquire_slot(self, version: AdapterVersion, urgent: bool = False) -> int | None:
        """A slot that holds `version` until `release_slot`; None when it has none now. Engine's thread, between steps.

        Takes, in this order: the slot that it is in, a free one, the least recently used one without users. A version
        that is not in host memory begins to be read; `urgent`: one that others wait for may make room for it.
        """
        with self._lock:
            if version.slot is not None:
                version.slot_users += 1
                version.used_at = self._tick()
                return version.slot
            if not version.in_host:
                self.host.want(version, urgent)
                return None
            if not self.device.take(version):
                return None
            version.slot_users = 1
            version.used_at = self._tick()
        try:
            self.device.write(version)
        except Exception:
            with self._lock:
                version.slot_users = 0
                self.device.leave(version)
            raise
        return version.slot

    def release_slot(self, version: AdapterVersion) -> None:
        """The sequence that acquired the slot no longer runs. Engine's thread."""
        with self._lock:
            version.slot_users -= 1
            if not version.slot_users:
                self.host.start()

    def place_pinned(self) -> None:
        """Bring pinned adapters onto the device, as far as there are slots. Engine's thread, between steps."""
        if not self._pinned:
            return
        with self._lock:
            entries = [self._current[name] for name in self._pinned]
            versions = [e for e in entries if isinstance(e, AdapterVersion) and e.slot is None]
            for version in versions:
                self.hold(version)
        for version in versions:
            if self.acquire_slot(version, urgent=True) is not None:
                self.release_slot(version)
            self.release(version)

    # Inside

    def check_integrity(self) -> None:
        """Raise AssertionError unless every slot, byte, version and count is accounted for."""
        with self._lock:
            versions = set(self._versions.values())
            self.device.check_integrity(versions)
            self.host.check_integrity(versions)
            for digest, version in self._versions.items():
                assert version.digest == digest
                assert version.names or version.holders, f"{digest} is held by nobody"
                assert 0 <= version.slot_users <= version.holders
                assert 0 <= version.expected <= version.holders
                assert version.slot is not None or version.slot_users == 0
                assert version.pins == len(version.names & self._pinned)
                assert all(self._current[name] is version for name in version.names)
            for name, entry in self._current.items():
                if isinstance(entry, AdapterVersion):
                    assert name in entry.names
                    assert self._versions[entry.digest] is entry
            assert self._pinned <= set(self._current)

    def _read_unread(self, name: str, entry: UnreadAdapter) -> None:
        """A thread of the host tier."""
        try:
            adapter = self.host.read(entry.source)
        except Exception as error:
            reasons = getattr(error, "reasons", (str(error),))
            with self._lock:
                if self._current.get(name) is entry:
                    del self._current[name]
                    self._pinned.discard(name)
                    self._refused[name] = tuple(reasons)
            return
        with self._lock:
            if self._current.get(name) is entry:
                self.put(name, adapter, source=entry.source)

    def _hold_for_request(self, version: AdapterVersion, name: str) -> AdapterVersion:
        if self.host.failed(version):
            raise AdapterRefused(name, (version.failure or "",))
        self.hits[version.tier] += 1
        version.holders += 1
        version.requests += 1
        version.last_used = time.time()
        version.used_at = self._tick()
        self.host.want(version)
        return version

    def _version(self, info: AdapterInfo, source: Source | None) -> AdapterVersion:
        """The version with this digest, a new one if need be."""
        known = self._versions.get(info.digest)
        if known is None:
            known = self._versions[info.digest] = AdapterVersion(info, source)
        else:
            known.prefer(source)
        return known

    def _keep_in_memory(self, old: Entry | None, source: Source | None) -> None:
        """What new content overwrote on the disk cannot be read again: it stays until its last holder lets go."""
        if isinstance(old, AdapterVersion) and old.in_host and old.source and source and old.source.path == source.path:
            old.source = None

    def _renew(self, version: AdapterVersion, adapter: Adapter, source: Source | None) -> None:
        """The same content again: it can be read from there, and is in hand."""
        version.prefer(source)
        version.failure = None
        self.host.admit(version, adapter)

    def _point(self, name: str, entry: Entry) -> None:
        old = self._current.get(name)
        self._current[name] = entry
        self._refused.pop(name, None)
        if old is entry:
            return
        if isinstance(entry, AdapterVersion):
            if not entry.names and entry.holders:
                entry.drained.set_result(0)  # it was draining, and is wanted again
                entry.drained = promise()
            entry.names.add(name)
            if name in self._pinned:
                self._change_pins(entry, 1)
        if old is not None:
            self._drop_name(old, name)

    def _drop_name(self, entry: Entry, name: str) -> None:
        if isinstance(entry, UnreadAdapter):
            return
        entry.names.discard(name)
        entry.pins = len(entry.names & self._pinned)
        self._free_if_unused(entry)

    def _change_pins(self, version: AdapterVersion, by: int) -> None:
        version.pins += by
        if version.pins:
            self.host.want(version, urgent=True)

    def _free_if_unused(self, version: AdapterVersion) -> None:
        if version.names or version.holders:
            return
        del self._versions[version.digest]
        self.device.leave(version)
        version.drained.set_result(self.host.drop(version))
        if isinstance(version.source, Composed):
            for part, _ in version.source.parts:
                part.holders -= 1
                self._free_if_unused(part)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _leaving(entry: Entry | None) -> AdapterVersion | None:
    """The version that is forgotten when the name that points at it moves."""
    if isinstance(entry, AdapterVersion) and len(entry.names) == 1 and not entry.holders:
        return entry
    return None

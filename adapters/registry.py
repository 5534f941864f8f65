"""AdapterRegistry: names, versions, who holds them, and which version is in which slot.

A name points at one version; a version is its content digest. Requests and slots hold versions, never names, so that
replacing or removing a name touches nothing that runs. A version's memory is freed when its last holder lets go.
Knows nothing of HTTP, scheduling or files.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from adapters.adapter import Adapter
from adapters.errors import AdapterExists, AdapterNotFound, InvalidName, RegistryFull
from adapters.slots import LoraSlots

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


def _promise() -> Future[int]:
    """A future that whoever waits for it cannot cancel, since others' work sets it."""
    future: Future[int] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(eq=False)
class AdapterVersion:
    """One adapter's content in host memory, and its place on the device."""

    adapter: Adapter
    names: set[str] = field(default_factory=set)
    holders: int = 0
    """Sequences that use it, waiting or running."""
    slot: int | None = None
    slot_users: int = 0
    """Running sequences; the slot is not taken while there are any."""
    slot_used_at: int = 0
    requests: int = 0
    last_used: float | None = None
    """Unix time of the last request."""
    drained: Future[int] = field(default_factory=_promise)
    """Bytes freed, when the last holder has let go of a version that no name points at."""

    @property
    def digest(self) -> str:
        return self.adapter.digest

    @property
    def tier(self) -> str:
        return "host" if self.slot is None else "device"


class AdapterRegistry:
    """All adapters of one base. Methods may be called from any thread unless they say otherwise."""

    def __init__(self, slots: LoraSlots, max_cpu_loras: int, reserved_names: Sequence[str] = ()) -> None:
        self._slots = slots
        self._max_cpu_loras = max_cpu_loras
        self._reserved = frozenset(reserved_names)
        self._lock = threading.RLock()
        self._current: dict[str, AdapterVersion] = {}
        self._versions: dict[str, AdapterVersion] = {}
        self._refused: dict[str, tuple[str, ...]] = {}
        self._free_slots = list(range(slots.max_loras - 1, -1, -1))
        self._clock = 0

    def put(self, name: str, adapter: Adapter, replace: bool = True) -> tuple[AdapterVersion, bool]:
        """Point `name` at `adapter`, atomically; False when it did already.

        Requests in flight stay on the version that they hold. Raises InvalidName, AdapterExists (the name has other
        content and `replace` is false), RegistryFull.
        """
        self.check_name(name)
        with self._lock:
            old = self._current.get(name)
            if old is not None and old.digest == adapter.digest:
                self._refused.pop(name, None)
                return old, False
            if old is not None and not replace:
                raise AdapterExists(f"adapter {name!r} exists with other content")
            version = self._version(adapter, replaced=old)
            self._current[name] = version
            self._refused.pop(name, None)
            version.names.add(name)
            if old is not None:
                self._drop_name(old, name)
            return version, True

    def remove(self, name: str) -> tuple[AdapterVersion, Future[int]]:
        """Forget `name`: no new request finds it. Raises AdapterNotFound.

        The future has the bytes freed, once the last holder has let go; 0 when another name has the same content.
        """
        with self._lock:
            version = self._current.pop(name, None)
            if version is None:
                raise AdapterNotFound(name)
            drained = version.drained
            if len(version.names) > 1:
                drained = _promise()
                drained.set_result(0)
            self._drop_name(version, name)
            return version, drained

    def refuse(self, name: str, reasons: Sequence[str]) -> None:
        """Remember why a directory is not served, to be listed."""
        with self._lock:
            self._refused[name] = tuple(reasons)

    def get(self, name: str) -> AdapterVersion:
        """The version that `name` points at now. Raises AdapterNotFound."""
        with self._lock:
            version = self._current.get(name)
        if version is None:
            raise AdapterNotFound(name)
        return version

    def acquire(self, name: str) -> AdapterVersion:
        """Hold the current version of `name` until `release`. Raises AdapterNotFound."""
        with self._lock:
            version = self.get(name)
            version.holders += 1
            version.requests += 1
            version.last_used = time.time()
            return version

    def release(self, version: AdapterVersion) -> None:
        """Let go of a version got from `acquire`."""
        with self._lock:
            version.holders -= 1
            self._free_if_unused(version)

    def acquire_slot(self, version: AdapterVersion) -> int | None:
        """A slot that holds `version` until `release_slot`; None when all are in use. Engine's thread, between steps.

        Takes, in this order: the slot that it is in, a free one, the least recently used one without users.
        """
        with self._lock:
            self._clock += 1
            version.slot_used_at = self._clock
            if version.slot is not None:
                version.slot_users += 1
                return version.slot
            slot = self._take_slot()
            if slot is None:
                return None
            version.slot = slot
            version.slot_users = 1
        try:
            self._slots.write(slot, version.adapter)
        except Exception:
            with self._lock:
                version.slot, version.slot_users = None, 0
                self._free_slots.append(slot)
            raise
        return slot

    def release_slot(self, version: AdapterVersion) -> None:
        """The sequence that acquired the slot no longer runs. Engine's thread."""
        with self._lock:
            version.slot_users -= 1

    def list(self) -> list[tuple[str, AdapterVersion]]:
        """(name, version) of everything that is served, by name."""
        with self._lock:
            return sorted(self._current.items(), key=lambda item: item[0])

    def refused(self) -> dict[str, tuple[str, ...]]:
        """Name -> reasons, of what was found but is not served."""
        with self._lock:
            return dict(self._refused)

    def check_name(self, name: str) -> None:
        """Raises InvalidName unless `name` fits the pattern and is not the base model's."""
        if not re.match(NAME_PATTERN, name) or name.endswith("\n"):
            raise InvalidName(f"an adapter's name must match {NAME_PATTERN}, not {name[:140]!r}")
        if name in self._reserved:
            raise InvalidName(f"{name!r} is the base model's name")

    def check_integrity(self) -> None:
        """Raise AssertionError unless every slot, version and count is accounted for."""
        with self._lock:
            used = [v.slot for v in self._versions.values() if v.slot is not None]
            assert sorted(used + self._free_slots) == list(range(self._slots.max_loras)), (used, self._free_slots)
            for digest, version in self._versions.items():
                assert version.digest == digest
                assert version.names or version.holders, f"{digest} is held by nobody"
                assert 0 <= version.slot_users <= version.holders
                assert version.slot is not None or version.slot_users == 0
                assert all(self._current[name] is version for name in version.names)
            for name, version in self._current.items():
                assert name in version.names
                assert self._versions[version.digest] is version

    def _version(self, adapter: Adapter, replaced: AdapterVersion | None) -> AdapterVersion:
        known = self._versions.get(adapter.digest)
        if known is not None:
            if not known.names:  # it was draining, and is wanted again
                known.drained.set_result(0)
                known.drained = _promise()
            return known
        leaving = replaced is not None and len(replaced.names) == 1 and not replaced.holders
        if len(self._versions) - leaving >= self._max_cpu_loras:
            raise RegistryFull(f"{self._max_cpu_loras} adapters are loaded, as many as max_cpu_loras allows")
        version = self._versions[adapter.digest] = AdapterVersion(adapter)
        return version

    def _drop_name(self, version: AdapterVersion, name: str) -> None:
        version.names.discard(name)
        self._free_if_unused(version)

    def _free_if_unused(self, version: AdapterVersion) -> None:
        if version.names or version.holders:
            return
        del self._versions[version.digest]
        if version.slot is not None:
            self._slots.clear(version.slot)
            self._free_slots.append(version.slot)
            version.slot = None
        version.drained.set_result(version.adapter.num_bytes)

    def _take_slot(self) -> int | None:
        if self._free_slots:
            return self._free_slots.pop()
        idle = [v for v in self._versions.values() if v.slot is not None and v.slot_users == 0]
        if not idle:
            return None
        oldest = min(idle, key=lambda v: v.slot_used_at)
        slot, oldest.slot = oldest.slot, None
        return slot

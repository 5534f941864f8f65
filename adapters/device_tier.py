"""DeviceTier: which versions are in which slot. Knows nothing of names, files or requests.

Every method runs under the registry's lock, but for `write`.
"""

from __future__ import annotations

from adapters.slots import LoraSlots
from adapters.version import AdapterVersion


class DeviceTier:
    """`max_loras` slots; a version that nobody runs and no pin keeps makes room, the least recently used first."""

    def __init__(self, slots: LoraSlots) -> None:
        self.evictions = 0
        self._slots = slots
        self._free = list(range(slots.max_loras - 1, -1, -1))
        self._placed: dict[int, AdapterVersion] = {}

    @property
    def num_used(self) -> int:
        return len(self._placed)

    @property
    def num_bytes(self) -> int:
        """Of the adapters in slots."""
        return sum(v.adapter.nbytes for v in list(self._placed.values()) if v.adapter is not None)

    def take(self, version: AdapterVersion) -> bool:
        """Give `version` a slot, to be written before it is used; False when none can be had."""
        if not self._free:
            idle = [v for v in self._placed.values() if not v.slot_users and not v.pins]
            if not idle:
                return False
            self.leave(min(idle, key=lambda v: v.used_at), clear=False)
            self.evictions += 1
        version.slot = self._free.pop()
        self._placed[version.slot] = version
        return True

    def write(self, version: AdapterVersion) -> None:
        """Fill its slot. Engine's thread, between steps; the version must have users, so that nobody takes the slot."""
        assert version.slot is not None
        assert version.adapter is not None
        self._slots.write(version.slot, version.adapter)

    def leave(self, version: AdapterVersion, clear: bool = True) -> None:
        """Free its slot, if it has one; `clear` also lets go of what is in it."""
        if version.slot is None:
            return
        if clear:
            self._slots.clear(version.slot)
        del self._placed[version.slot]
        self._free.append(version.slot)
        version.slot = None

    def check_integrity(self, versions: set[AdapterVersion]) -> None:
        """Raise AssertionError unless every slot is accounted for by `versions`, all that there are."""
        assert {v.slot: v for v in versions if v.slot is not None} == self._placed
        assert sorted([*self._placed, *self._free]) == list(range(self._slots.max_loras))
        assert all(v.in_host for v in self._placed.values()), "in a slot, but not in host memory"

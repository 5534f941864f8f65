"""AdapterRegistry: names move, versions stay with their holders, slots stay with their users, and all is freed."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import pytest
import torch

from adapters.adapter import Adapter
from adapters.errors import AdapterExists, AdapterNotFound, InvalidName, RegistryFull
from adapters.host_tier import HostLimits
from adapters.registry import AdapterRegistry
from adapters.slots import LoraSlots
from adapters.version import AdapterVersion
from tests.adapters_support import HIDDEN, PLAIN, adapter_of, random_pair, small_base

RANK = 2
NUM_BYTES = 4 * RANK * (HIDDEN + 12)


def new_registry(max_loras: int = 2, max_cpu_loras: int = 4) -> AdapterRegistry:
    body, layout = small_base()
    limits = HostLimits(max_cpu_loras, max_bytes=1 << 20, threads=2)
    return AdapterRegistry(LoraSlots(body, layout, max_loras), limits, reserved_names=["base"])


@cache
def content(number: int) -> Adapter:
    """An adapter whose weights and digest depend on `number` alone."""
    return adapter_of({PLAIN: random_pair(number, HIDDEN, 12, RANK)}, digest=f"digest-{number}")


def holds(registry: AdapterRegistry, slot: int, adapter: Adapter | None) -> bool:
    """Whether the slot has this adapter's factors."""
    assert adapter is not None
    term = registry.device._slots.weights[PLAIN].terms[slot]
    return term is not None and torch.equal(term.a, adapter.pairs[PLAIN].a)


# names and versions


def test_a_name_finds_what_was_put() -> None:
    registry = new_registry()
    version, created = registry.put("a", content(1))
    assert created
    assert registry.current("a") is version
    assert (version.digest, version.names, version.tier) == ("digest-1", {"a"}, "host")
    assert registry.list() == [("a", version)]


def test_names_are_listed_in_order() -> None:
    registry = new_registry()
    for number, name in enumerate(["b", "a-2", "a"]):
        registry.put(name, content(number))
    assert [name for name, _ in registry.list()] == ["a", "a-2", "b"]


@pytest.mark.parametrize("replace", [True, False])
def test_the_same_content_again_changes_nothing(replace: bool) -> None:
    registry = new_registry()
    version, _ = registry.put("a", content(1))
    assert registry.put("a", content(1), replace=replace) == (version, False)
    registry.check_integrity()


def test_other_content_is_a_new_version_and_holders_stay_on_the_old() -> None:
    registry = new_registry()
    registry.put("a", content(1))
    held = registry.acquire("a")
    version, created = registry.put("a", content(2))
    assert created
    assert registry.acquire("a") is version is not held
    assert (held.digest, held.holders, held.names) == ("digest-1", 1, set())
    registry.check_integrity()
    registry.release(held)
    assert held.drained.result(timeout=0) == NUM_BYTES
    registry.check_integrity()


def test_other_content_is_refused_where_no_replacement_is_asked_for() -> None:
    registry = new_registry()
    version, _ = registry.put("a", content(1))
    with pytest.raises(AdapterExists, match="'a' exists with other content"):
        registry.put("a", content(2), replace=False)
    assert registry.list() == [("a", version)]
    registry.check_integrity()


def test_two_names_of_one_content_share_a_version() -> None:
    registry = new_registry(max_cpu_loras=1)
    first, _ = registry.put("a", content(1))
    second, created = registry.put("b", content(1))
    assert created
    assert first is second
    assert first.names == {"a", "b"}
    _, drained = registry.remove("a")
    assert drained.result(timeout=0) == 0, "the other name keeps the memory"
    assert registry.current("b") is first
    registry.check_integrity()
    _, drained = registry.remove("b")
    assert drained.result(timeout=0) == NUM_BYTES


def test_replacing_one_of_two_names_keeps_the_other() -> None:
    registry = new_registry()
    shared, _ = registry.put("a", content(1))
    registry.put("b", content(1))
    registry.put("a", content(2))
    assert registry.current("b") is shared
    assert shared.names == {"b"}
    assert not shared.drained.done()
    registry.check_integrity()


VALID_NAMES = ["a", "A", "7", "a.b", "a_b-c", "a..b", "a" * 128, "base-2", "Base"]
INVALID_NAMES = ["", " ", ".", "..", ".a", "-a", "_a", "a b", "a/b", "a\\b", "a\n", "\na", "a\0", "é", "a:b", "a" * 129]


@pytest.mark.parametrize("name", VALID_NAMES)
def test_a_name_of_the_pattern_is_taken(name: str) -> None:
    registry = new_registry()
    registry.put(name, content(1))
    assert [name for name, _ in registry.list()] == [name]


@pytest.mark.parametrize("name", INVALID_NAMES)
def test_a_name_outside_the_pattern_is_refused(name: str) -> None:
    registry = new_registry()
    with pytest.raises(InvalidName, match="must match") as caught:
        registry.put(name, content(1))
    assert len(str(caught.value)) < 300
    assert registry.list() == []


def test_the_bases_name_is_reserved() -> None:
    registry = new_registry()
    with pytest.raises(InvalidName, match="'base' is the base model's name"):
        registry.put("base", content(1))
    assert registry.list() == []


# limits


def test_a_full_registry_refuses_a_new_version_and_stays_as_it_is() -> None:
    registry = new_registry(max_cpu_loras=2)
    registry.put("a", content(1))
    registry.put("b", content(2))
    before = registry.list()
    with pytest.raises(RegistryFull, match="as many adapters as it may"):
        registry.put("c", content(3))
    assert registry.list() == before
    registry.put("c", content(2))
    registry.put("b", content(1))
    registry.check_integrity()


def test_a_full_registry_replaces_what_nobody_holds() -> None:
    registry = new_registry(max_cpu_loras=1)
    registry.put("a", content(1))
    registry.put("a", content(2))
    assert registry.current("a").digest == "digest-2"
    registry.check_integrity()


@pytest.mark.parametrize("why", ["held", "shared"])
def test_a_full_registry_refuses_to_replace_what_must_stay(why: str) -> None:
    registry = new_registry(max_cpu_loras=1)
    version, _ = registry.put("a", content(1))
    if why == "held":
        registry.acquire("a")
    else:
        registry.put("b", content(1))
    with pytest.raises(RegistryFull):
        registry.put("a", content(2))
    assert registry.current("a") is version
    registry.check_integrity()


def test_a_draining_version_counts_until_it_is_freed() -> None:
    registry = new_registry(max_cpu_loras=1)
    registry.put("a", content(1))
    held = registry.acquire("a")
    registry.remove("a")
    with pytest.raises(RegistryFull):
        registry.put("b", content(2))
    registry.release(held)
    assert registry.put("b", content(2))[1]


# holders


def test_an_unknown_name_is_not_found() -> None:
    registry = new_registry()
    for ask in (registry.get, registry.acquire, registry.remove):
        with pytest.raises(AdapterNotFound, match="no adapter is named 'nobody'"):
            ask("nobody")


def test_acquiring_counts_holders_and_requests() -> None:
    registry = new_registry()
    version, _ = registry.put("a", content(1))
    assert (version.holders, version.requests, version.last_used) == (0, 0, None)
    held = [registry.acquire("a") for _ in range(3)]
    assert version.last_used is not None
    registry.release(held[0])
    assert (version.holders, version.requests) == (2, 3)


def test_what_nobody_holds_is_freed_at_once() -> None:
    registry = new_registry()
    version, _ = registry.put("a", content(1))
    removed, drained = registry.remove("a")
    assert removed is version
    assert drained.result(timeout=0) == NUM_BYTES
    registry.check_integrity()


def test_removed_while_held_is_not_found_and_freed_with_the_last_holder() -> None:
    registry = new_registry()
    registry.put("a", content(1))
    held = [registry.acquire("a") for _ in range(2)]
    version, drained = registry.remove("a")
    assert version is held[0]
    with pytest.raises(AdapterNotFound):
        registry.acquire("a")
    registry.release(held[0])
    assert not drained.done()
    registry.check_integrity()
    registry.release(held[1])
    assert drained.result(timeout=0) == NUM_BYTES
    registry.check_integrity()


def test_put_again_while_draining_revives_the_version() -> None:
    registry = new_registry()
    registry.put("a", content(1))
    held = registry.acquire("a")
    _, drained = registry.remove("a")
    version, created = registry.put("b", content(1))
    assert created
    assert version is held
    assert drained.result(timeout=0) == 0, "nothing was freed, and nobody need wait any longer"
    registry.release(held)
    assert registry.current("b") is held
    registry.check_integrity()
    assert registry.remove("b")[1].result(timeout=0) == NUM_BYTES


@pytest.mark.parametrize("end", ["released", "revived"])
def test_a_waiter_that_gives_up_harms_nobody(end: str) -> None:
    """An asyncio task that awaits the future cancels it when the task is cancelled (a server that shuts down)."""
    registry = new_registry()
    registry.put("a", content(1))
    held = registry.acquire("a")
    _, drained = registry.remove("a")
    drained.cancel()
    if end == "revived":
        assert registry.put("a", content(1)) == (held, True)
    registry.release(held)
    assert held.holders == 0
    registry.check_integrity()


# slots


def acquired(registry: AdapterRegistry, name: str) -> tuple[AdapterVersion, int | None]:
    version = registry.acquire(name)
    return version, registry.acquire_slot(version)


def let_go(registry: AdapterRegistry, version: AdapterVersion) -> None:
    registry.release_slot(version)
    registry.release(version)


def with_adapters(count: int, max_loras: int = 2) -> AdapterRegistry:
    registry = new_registry(max_loras, max_cpu_loras=count)
    for number in range(count):
        registry.put(f"a{number}", content(number))
    return registry


def test_a_slot_holds_the_adapters_weights() -> None:
    registry = with_adapters(2)
    for number in range(2):
        version, slot = acquired(registry, f"a{number}")
        assert slot is not None
        assert holds(registry, slot, content(number))
        assert version.tier == "device"
    registry.check_integrity()


def test_sequences_of_one_version_share_its_slot() -> None:
    registry = with_adapters(1)
    first, slot = acquired(registry, "a0")
    second, same = acquired(registry, "a0")
    assert slot == same
    assert first is second
    assert first.slot_users == 2


def test_no_slot_is_given_while_all_are_in_use() -> None:
    registry = with_adapters(3)
    users = [acquired(registry, f"a{number}") for number in range(2)]
    waiting, slot = acquired(registry, "a2")
    assert slot is None
    assert (waiting.slot, waiting.slot_users, waiting.tier) == (None, 0, "host")
    assert all(holds(registry, user.slot, user.adapter) for user, _ in users if user.slot is not None)
    registry.check_integrity()
    registry.release_slot(users[1][0])
    assert registry.acquire_slot(waiting) == users[1][1]
    registry.check_integrity()


def test_a_slot_stays_filled_for_the_next_request() -> None:
    registry = with_adapters(2)
    version, slot = acquired(registry, "a0")
    let_go(registry, version)
    assert acquired(registry, "a1")[1] != slot, "a free slot goes before one that is idle but filled"
    assert acquired(registry, "a0")[1] == slot


def test_the_least_recently_used_idle_slot_is_taken() -> None:
    registry = with_adapters(5, max_loras=3)
    slots = {}
    for name in ("a0", "a1", "a2", "a0"):
        version, slots[name] = acquired(registry, name)
        let_go(registry, version)
    in_use, _ = acquired(registry, "a1")
    assert acquired(registry, "a3")[1] == slots["a2"], "a1 is in use, a0 was used after a2"
    assert acquired(registry, "a4")[1] == slots["a0"]
    assert registry.current("a0").slot is registry.current("a2").slot is None
    assert in_use.slot == slots["a1"]
    registry.check_integrity()


def test_a_replaced_version_keeps_its_slot_until_it_is_released() -> None:
    registry = new_registry(max_loras=1)
    registry.put("a", content(1))
    old, slot = acquired(registry, "a")
    registry.put("a", content(2))
    new, none = acquired(registry, "a")
    assert none is None
    assert slot is not None
    assert holds(registry, slot, content(1))
    let_go(registry, old)
    assert registry.acquire_slot(new) == slot
    assert holds(registry, slot, content(2))
    registry.check_integrity()


def test_a_removed_versions_slot_is_not_reused_until_it_is_released() -> None:
    registry = with_adapters(2, max_loras=1)
    version, slot = acquired(registry, "a0")
    registry.remove("a0")
    other, none = acquired(registry, "a1")
    assert none is None
    assert slot is not None
    assert holds(registry, slot, content(0))
    let_go(registry, version)
    assert version.slot is None
    assert not holds(registry, slot, content(0)), "a freed version leaves nothing in its slot"
    assert registry.acquire_slot(other) == slot
    registry.check_integrity()


# refusals


def test_refusals_are_listed_until_the_name_is_served() -> None:
    registry = new_registry()
    registry.refuse("broken", ["r must be positive", "use_dora is not supported"])
    registry.refuse("../odd name", ["an adapter's name must match"])
    assert registry.refused()["broken"] == ("r must be positive", "use_dora is not supported")
    assert registry.list() == []
    registry.put("broken", content(1))
    assert list(registry.refused()) == ["../odd name"]


def test_a_served_name_is_not_among_the_refused_when_its_content_is_put_again() -> None:
    registry = new_registry()
    registry.put("a", content(1))
    registry.refuse("a", ["its new version is broken"])
    registry.put("a", content(1))
    assert registry.refused() == {}


# schedules


class Schedule:
    """Random operations, and all that they hold."""

    def __init__(self, registry: AdapterRegistry, seed: int, slots: bool) -> None:
        self.registry = registry
        self.rng = random.Random(seed)
        self.waiting: list[AdapterVersion] = []
        self.running: list[tuple[AdapterVersion, int]] = []
        self.drained: list[Future[int]] = []
        self.done = 0
        operations = {"put": 3, "remove": 1, "acquire": 5, "release": 3}
        self.operations = {**operations, "start": 5, "finish": 4} if slots else operations

    def step(self) -> None:
        operation = self.rng.choices([*self.operations], [*self.operations.values()])[0]
        try:
            getattr(self, operation)(self.rng.choice(["a", "b", "c", "d", "e"]))
            self.done += 1
        except (AdapterNotFound, AdapterExists, RegistryFull):
            pass
        for version, slot in self.running:
            assert version.slot == slot, "a slot was taken from a running sequence"
            assert holds(self.registry, slot, version.adapter)

    def put(self, name: str) -> None:
        self.registry.put(name, content(self.rng.randrange(8)), replace=self.rng.random() < 0.8)

    def remove(self, name: str) -> None:
        self.drained.append(self.registry.remove(name)[1])

    def acquire(self, name: str) -> None:
        self.waiting.append(self.registry.acquire(name))

    def release(self, _name: str) -> None:
        if self.waiting:
            self.registry.release(self.waiting.pop(self.rng.randrange(len(self.waiting))))

    def start(self, _name: str) -> None:
        if self.waiting:
            version = self.waiting.pop(self.rng.randrange(len(self.waiting)))
            slot = self.registry.acquire_slot(version)
            if slot is None:
                self.waiting.append(version)
            else:
                self.running.append((version, slot))

    def finish(self, _name: str) -> None:
        if self.running:
            let_go(self.registry, self.running.pop(self.rng.randrange(len(self.running)))[0])

    def release_all(self) -> None:
        while self.running:
            self.finish("")
        while self.waiting:
            self.release("")


def assert_nothing_is_held(registry: AdapterRegistry) -> None:
    """Remove every name: all memory and all slots must then be free."""
    for name, version in registry.list():
        assert isinstance(version, AdapterVersion)
        assert (version.holders, version.slot_users) == (0, 0)
        registry.remove(name)
    registry.check_integrity()
    assert registry._versions == {}
    assert sorted(registry.device._free) == list(range(registry.device._slots.max_loras))
    for weights in registry.device._slots.weights.values():
        assert weights.terms == [None] * registry.device._slots.max_loras
        assert not weights.table["rank"].any()


@pytest.mark.parametrize("seed", range(6))
def test_a_random_schedule_keeps_every_account_balanced(seed: int) -> None:
    registry = new_registry(max_loras=2, max_cpu_loras=5)
    schedule = Schedule(registry, seed, slots=True)
    for _ in range(500):
        schedule.step()
        registry.check_integrity()
    assert schedule.done > 250
    schedule.release_all()
    registry.check_integrity()
    assert_nothing_is_held(registry)
    assert schedule.drained
    assert all(future.done() for future in schedule.drained)


@pytest.fixture
def _frequent_thread_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_frequent_thread_switches")
def test_threads_may_put_remove_acquire_and_release_at_once() -> None:
    """One thread is the engine's and places adapters into slots; the others do what requests do."""
    registry = new_registry(max_loras=2, max_cpu_loras=5)
    schedules = [Schedule(registry, seed, slots=seed == 0) for seed in range(4)]

    together = threading.Barrier(len(schedules), timeout=60)

    def run(schedule: Schedule) -> None:
        together.wait()
        for _ in range(3000):
            schedule.step()
        schedule.release_all()

    with ThreadPoolExecutor(len(schedules)) as threads:
        for finished in [threads.submit(run, schedule) for schedule in schedules]:
            finished.result(timeout=60)
    assert all(schedule.done > 900 for schedule in schedules)
    registry.check_integrity()
    assert_nothing_is_held(registry)
    assert all(future.done() for schedule in schedules for future in schedule.drained)

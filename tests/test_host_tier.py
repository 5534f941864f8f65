"""Disk to host memory: each version is read once however many ask, and room is made in order."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters import host_tier
from adapters.adapter import Adapter, AdapterInfo
from adapters.arena import build_arena
from adapters.arena_files import ArenaFiles
from adapters.errors import AdapterNotFound, AdapterRefused, InvalidAdapter, RegistryFull, TooManyPins
from adapters.host_tier import HostLimits
from adapters.registry import AdapterRegistry
from adapters.slots import LoraSlots
from adapters.version import AdapterVersion, Source
from tests.adapters_support import HIDDEN, PLAIN, adapter_of, random_pair, small_base

RANK = 2
TIMEOUT_S = 30


def content(number: int) -> Adapter:
    return adapter_of({PLAIN: random_pair(number, HIDDEN, 12, RANK)}, digest=f"digest-{number}")


SIZE = content(0).nbytes


class Disk:
    """Adapters by path; counts its reads, and holds them up while its gate is closed."""

    def __init__(self, count: int) -> None:
        self.contents = {Path(f"/a{i}"): content(i) for i in range(count)}
        self.broken: set[Path] = set()
        self.reads: Counter[str] = Counter()
        self.known: list[AdapterInfo | None] = []
        self.gate = threading.Event()
        self.gate.set()

    def read(self, source: Source) -> Adapter:
        assert self.gate.wait(TIMEOUT_S)
        self.reads[source.path.name] += 1
        self.known.append(source.known)
        if source.path in self.broken:
            raise InvalidAdapter(["it is broken"])
        return self.contents[source.path]


class Tiers:
    """A registry on a disk, and a way to wait for its reads."""

    def __init__(
        self, count: int, max_loras: int = 2, max_cpu_loras: int = 3, max_bytes: int = 1 << 30, threads: int = 2
    ) -> None:
        body, layout = small_base()
        self.disk = Disk(count)
        self.registry = AdapterRegistry(
            LoraSlots(body, layout, max_loras), HostLimits(max_cpu_loras, max_bytes, threads), read=self.disk.read
        )
        self.changed = threading.Semaphore(0)
        self.registry.host.changed = self.changed.release
        for path, adapter in self.disk.contents.items():
            self.registry.add(path.name, adapter.info, Source(path))

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait for reads to end until it is so."""
        while not reached():
            assert self.changed.acquire(timeout=TIMEOUT_S)

    def loaded(self, *names: str) -> list[AdapterVersion]:
        """Acquire them, wait until they are in host memory, and let go."""
        versions = []
        for name in names:
            version = self.registry.acquire(name)
            self.until(lambda: version.in_host)  # noqa: B023
            self.registry.release(version)
            versions.append(version)
        self.registry.check_integrity()
        return versions

    def in_host(self) -> set[str]:
        return {name for name, v in self.registry.list() if isinstance(v, AdapterVersion) and v.in_host}


def with_arena_files(directory: Path, max_cpu_loras: int) -> Tiers:
    """Three adapters that lie in arenas, as those of checkpoints do; of two threads one passes over what it may write
    while the other writes."""
    tiers = Tiers(3, max_cpu_loras=max_cpu_loras, threads=1)
    for path, adapter in tiers.disk.contents.items():
        arena = build_arena(adapter.pairs)
        tiers.disk.contents[path] = replace(adapter, pairs=arena.pairs, memory=arena.memory)
    tiers.registry.host.arenas = ArenaFiles(directory, 1 << 30)
    return tiers


def assert_same_factors(one: Adapter, other: Adapter) -> None:
    assert one.pairs.keys() == other.pairs.keys()
    for name, pair in one.pairs.items():
        assert torch.equal(pair.a, other.pairs[name].a)
        assert torch.equal(pair.b, other.pairs[name].b)


def test_what_is_on_disk_is_known_and_not_read() -> None:
    tiers = Tiers(5)
    assert [name for name, _ in tiers.registry.list()] == [f"a{i}" for i in range(5)]
    assert {version.tier for _, version in tiers.registry.list()} == {"disk"}
    assert not tiers.disk.reads


def test_a_version_is_read_once_however_many_ask() -> None:
    tiers = Tiers(1)
    tiers.disk.gate.clear()
    versions = [tiers.registry.acquire("a0") for _ in range(50)]
    for version in versions:
        assert tiers.registry.acquire_slot(version) is None
    tiers.disk.gate.set()
    tiers.until(lambda: versions[0].in_host)
    assert tiers.registry.acquire_slot(versions[0]) is not None
    assert tiers.disk.reads == {"a0": 1}
    tiers.registry.check_integrity()


def test_files_that_this_process_has_read_are_known_when_they_are_read_again() -> None:
    tiers = Tiers(2, max_cpu_loras=1)
    assert tiers.disk.known == []
    for _ in range(2):
        tiers.loaded("a0", "a1")
    infos = [tiers.disk.contents[Path(f"/a{i}")].info for i in range(2)]
    assert tiers.disk.known == [None, None, *infos]
    changed = tiers.registry.put("a0", content(7), source=Source(Path("/a9")))[0]
    assert changed.source is not None
    assert changed.source.known == content(7).info


def test_what_is_read_a_second_time_is_read_from_its_arena_file_the_third(tmp_path: Path) -> None:
    tiers = with_arena_files(tmp_path, max_cpu_loras=2)
    for _ in range(4):
        for name in ("a0", "a1", "a2"):
            (version,) = tiers.loaded(name)
            assert version.adapter is not None
            assert_same_factors(version.adapter, tiers.disk.contents[Path(f"/{name}")])
    tiers.registry.host.close()
    arenas = tiers.registry.host.arenas
    assert arenas is not None
    assert tiers.disk.reads == {"a0": 2, "a1": 2, "a2": 2}
    assert (arenas.reads, tiers.registry.host.counts.loads) == (6, 12)


def test_what_is_read_once_writes_no_file(tmp_path: Path) -> None:
    tiers = with_arena_files(tmp_path, max_cpu_loras=3)
    tiers.loaded("a0", "a1", "a2")
    tiers.registry.host.close()
    assert list(tmp_path.iterdir()) == []


def test_a_version_that_is_forgotten_while_its_file_is_written_leaves_none(tmp_path: Path) -> None:
    tiers = with_arena_files(tmp_path, max_cpu_loras=1)
    tiers.loaded("a0", "a1")
    version = tiers.registry.acquire("a0")
    tiers.until(lambda: version.in_host)
    tiers.registry.release(version)
    tiers.registry.remove("a0")
    tiers.registry.host.forget_files(tiers.registry.in_use)  # before or after the file is written
    tiers.registry.host.close()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_arena_file_is_read_from_its_source_and_written_again(tmp_path: Path) -> None:
    tiers = with_arena_files(tmp_path, max_cpu_loras=1)
    tiers.loaded("a0", "a1", "a0", "a1")
    assert (tmp_path / "digest-0").stat().st_size > SIZE
    before = tiers.disk.reads["a0"]
    (tmp_path / "digest-0").write_bytes(b"")
    (version,) = tiers.loaded("a0")
    assert version.adapter is not None
    assert_same_factors(version.adapter, tiers.disk.contents[Path("/a0")])
    assert tiers.disk.reads["a0"] == before + 1
    tiers.registry.host.close()
    assert (tmp_path / "digest-0").stat().st_size > SIZE


def test_no_more_are_read_at_once_than_threads() -> None:
    tiers = Tiers(6, max_cpu_loras=6)
    tiers.disk.gate.clear()
    for i in range(6):
        tiers.registry.acquire(f"a{i}")
    tiers.registry.check_integrity()
    assert len(tiers.registry.host._loading) == 2
    tiers.disk.gate.set()
    tiers.until(lambda: len(tiers.in_host()) == 6)


def test_threads_rest_while_requests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_tier, "REST_AFTER_LOAD", 1e9)
    monkeypatch.setattr(host_tier, "LONGEST_REST_S", 1e9)
    tiers = Tiers(4, max_cpu_loras=4)
    tiers.registry.host.busy = lambda: True
    for i in range(4):
        tiers.registry.acquire(f"a{i}")
    tiers.until(lambda: len(tiers.in_host()) == 2)
    tiers.registry.host.close()
    assert len(tiers.in_host()) == 2, "both threads rested until the end"


def test_the_least_recently_used_leaves_first() -> None:
    tiers = Tiers(4)
    tiers.loaded("a0", "a1", "a2", "a0", "a3")
    assert tiers.in_host() == {"a0", "a2", "a3"}
    assert tiers.registry.host.counts.evictions == 1
    tiers.loaded("a1")
    assert tiers.disk.reads["a1"] == 2


def test_bytes_are_bounded_too() -> None:
    tiers = Tiers(4, max_cpu_loras=4, max_bytes=2 * SIZE)
    tiers.loaded("a0", "a1", "a2")
    assert tiers.in_host() == {"a1", "a2"}
    assert tiers.registry.host.num_bytes == 2 * SIZE


def test_an_adapter_larger_than_host_memory_is_refused() -> None:
    tiers = Tiers(1, max_bytes=SIZE - 1)
    version = tiers.registry.acquire("a0")
    assert version.failure is not None
    assert "host memory for adapters is less" in version.failure
    tiers.registry.release(version)
    with pytest.raises(AdapterRefused, match="host memory"):
        tiers.registry.acquire("a0")


def test_what_others_wait_for_stays_unless_the_next_is_owed() -> None:
    tiers = Tiers(4)
    registry = tiers.registry
    for name in ("a0", "a1", "a2"):
        tiers.loaded(name)
        registry.expect(registry.acquire(name))
    waits = registry.acquire("a3")
    assert registry.acquire_slot(waits) is None
    assert tiers.in_host() == {"a0", "a1", "a2"}
    assert registry.acquire_slot(waits, urgent=True) is None
    tiers.until(lambda: tiers.in_host() == {"a1", "a2", "a3"})
    registry.check_integrity()


def test_what_runs_is_never_taken_even_for_one_that_is_owed() -> None:
    tiers = Tiers(3, max_loras=2, max_cpu_loras=2)
    running = []
    for name in ("a0", "a1"):
        tiers.loaded(name)
        running.append(tiers.registry.acquire(name))
        tiers.registry.expect(running[-1])
        assert tiers.registry.acquire_slot(running[-1]) is not None
    waits = tiers.registry.acquire("a2")
    assert tiers.registry.acquire_slot(waits, urgent=True) is None
    assert tiers.in_host() == {"a0", "a1"}
    tiers.registry.release_slot(running[0])
    tiers.registry.unexpect(running[0])
    tiers.registry.release(running[0])
    tiers.until(lambda: tiers.in_host() == {"a1", "a2"})  # it is read without being asked for again
    assert running[0].slot is None
    tiers.registry.check_integrity()


def test_who_asked_first_is_read_first_when_room_comes() -> None:
    tiers = Tiers(3, max_loras=1, max_cpu_loras=1)
    tiers.loaded("a0")
    held = tiers.registry.acquire("a0")
    tiers.registry.expect(held)
    first, second = tiers.registry.acquire("a1"), tiers.registry.acquire("a2")
    tiers.registry.expect(first)
    tiers.registry.unexpect(held)
    tiers.registry.release(held)
    tiers.until(lambda: first.in_host)
    assert not second.in_host


def test_nobody_is_read_for_requests_that_have_gone() -> None:
    tiers = Tiers(3, max_loras=1, max_cpu_loras=1)
    tiers.loaded("a0")
    held = tiers.registry.acquire("a0")
    tiers.registry.expect(held)
    tiers.registry.release(tiers.registry.acquire("a1"))
    waits = tiers.registry.acquire("a2")
    tiers.registry.unexpect(held)
    tiers.registry.release(held)
    tiers.until(lambda: waits.in_host)
    assert "a1" not in tiers.disk.reads


def test_a_broken_adapter_asked_for_often_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = Tiers(1)
    tiers.disk.broken = set(tiers.disk.contents)
    version = tiers.registry.acquire("a0")
    tiers.until(lambda: version.failure == "it is broken")
    for _ in range(1000):
        with pytest.raises(AdapterRefused, match="adapter 'a0' is refused: it is broken"):
            tiers.registry.acquire("a0")
    assert tiers.disk.reads == {"a0": 1}
    tiers.disk.broken.clear()
    monkeypatch.setattr(host_tier, "RETRY_FAILED_S", -1.0)
    tiers.registry.acquire("a0")
    tiers.until(lambda: version.in_host)


def test_files_with_other_content_are_not_served_as_this_version() -> None:
    tiers = Tiers(2)
    tiers.disk.contents[Path("/a0")] = content(1)
    version = tiers.registry.acquire("a0")
    tiers.until(lambda: version.failure == "its files hold other content now")


def test_a_version_that_is_removed_while_it_is_read_leaves_nothing() -> None:
    tiers = Tiers(1)
    tiers.disk.gate.clear()
    version = tiers.registry.acquire("a0")
    _, drained = tiers.registry.remove("a0")
    tiers.registry.release(version)
    assert drained.result(TIMEOUT_S) == 0
    tiers.disk.gate.set()
    tiers.registry.host.close()
    assert not version.in_host
    assert len(tiers.registry.host) == 0
    tiers.registry.check_integrity()


def test_a_put_with_a_source_needs_no_room() -> None:
    tiers = Tiers(3)
    held = []
    for i in range(3):
        tiers.loaded(f"a{i}")
        held.append(tiers.registry.acquire(f"a{i}"))
        tiers.registry.expect(held[-1])
    new = content(7)
    with pytest.raises(RegistryFull):
        tiers.registry.put("new", new)
    tiers.disk.contents[Path("/new")] = new
    version, created = tiers.registry.put("new", new, source=Source(Path("/new")))
    assert (created, version.tier) == (True, "disk")
    tiers.registry.unexpect(held[-1])
    tiers.registry.release(held.pop())
    assert tiers.loaded("new") == [version]


# What was found, but not read


def unread(tiers: Tiers, name: str, number: int) -> None:
    path = Path(f"/{name}")
    tiers.disk.contents[path] = content(number)
    tiers.registry.add_unread(name, AdapterInfo("", "CAUSAL_LM", 2, (), "", SIZE), Source(path, "signature"))


def test_an_adapter_is_read_before_its_first_request() -> None:
    tiers = Tiers(0)
    unread(tiers, "new", 1)
    with pytest.raises(AdapterNotFound):
        tiers.registry.acquire("new")
    tiers.disk.gate.clear()
    futures = {tiers.registry.read_first("new") for _ in range(9)}
    assert len(futures) == 1
    tiers.disk.gate.set()
    wait([future for future in futures if future is not None], TIMEOUT_S)
    assert tiers.registry.read_first("new") is None
    assert tiers.registry.acquire("new").digest == "digest-1"
    assert tiers.disk.reads == {"new": 1}


def test_two_names_of_one_content_become_one_version() -> None:
    tiers = Tiers(2)
    unread(tiers, "same", 1)
    future = tiers.registry.read_first("same")
    assert future is not None
    future.result(TIMEOUT_S)
    assert tiers.registry.current("same") is tiers.registry.current("a1")
    tiers.registry.check_integrity()


def test_an_adapter_that_cannot_be_read_is_refused_with_its_reasons() -> None:
    tiers = Tiers(0)
    unread(tiers, "bad", 1)
    tiers.disk.broken = {Path("/bad")}
    future = tiers.registry.read_first("bad")
    assert future is not None
    future.result(TIMEOUT_S)
    assert tiers.registry.refused() == {"bad": ("it is broken",)}
    with pytest.raises(AdapterRefused):
        tiers.registry.read_first("bad")
    tiers.registry.check_integrity()


# Pins


def placed(tiers: Tiers) -> set[str]:
    return {n for n, v in tiers.registry.list() if isinstance(v, AdapterVersion) and v.slot is not None}


def test_a_pinned_adapter_comes_onto_the_device_and_stays() -> None:
    tiers = Tiers(5, max_loras=2)
    tiers.registry.pin("a0", True)
    tiers.until(lambda: tiers.registry.current("a0").in_host)
    tiers.registry.place_pinned()
    assert placed(tiers) == {"a0"}
    for i in (1, 2, 3, 4):
        [version] = tiers.loaded(f"a{i}")
        tiers.registry.hold(version)
        assert tiers.registry.acquire_slot(version) is not None
        tiers.registry.release_slot(version)
        tiers.registry.release(version)
    assert "a0" in placed(tiers)
    tiers.registry.pin("a0", False)
    tiers.registry.check_integrity()


def test_a_pin_follows_its_name() -> None:
    tiers = Tiers(2)
    tiers.registry.pin("a0", True)
    tiers.until(lambda: tiers.registry.current("a0").in_host)
    tiers.registry.place_pinned()
    old = tiers.registry.current("a0")
    new = replace(content(9))
    tiers.disk.contents[Path("/a9")] = new
    tiers.registry.put("a0", new, source=Source(Path("/a9")))
    assert old.slot is None
    tiers.registry.place_pinned()
    assert tiers.registry.current("a0").slot is not None
    assert tiers.registry.pinned("a0")
    tiers.registry.check_integrity()


def test_one_slot_is_left_for_the_others() -> None:
    tiers = Tiers(3, max_loras=3)
    tiers.registry.pin("a0", True)
    tiers.registry.pin("a1", True)
    tiers.registry.pin("a1", True)
    with pytest.raises(TooManyPins, match="2 adapters are pinned"):
        tiers.registry.pin("a2", True)
    tiers.registry.remove("a0")
    tiers.registry.pin("a2", True)
    with pytest.raises(AdapterNotFound):
        tiers.registry.pin("a0", True)
    tiers.registry.check_integrity()

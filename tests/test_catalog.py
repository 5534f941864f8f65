"""What a name points at: uploads, the operator's directory, rollback, removal; and all of it again after a restart."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.adapter import Limits
from adapters.arena_files import ArenaFiles
from adapters.catalog import AdapterCatalog, reader
from adapters.directory import scan
from adapters.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterRefused,
    InvalidAdapter,
    InvalidName,
    VersionNotFound,
)
from adapters.host_tier import HostLimits
from adapters.registry import AdapterRegistry
from adapters.slots import LoraSlots
from adapters.store import AdapterStore
from adapters.version import UnreadAdapter
from tests.adapters_support import save_small, small_base


class House:
    """A catalog on a store and a directory that outlive it."""

    def __init__(self, root: Path, keep_versions: int = 3) -> None:
        self.root = root
        self.directory = root / "adapters"
        self.directory.mkdir(exist_ok=True)
        self._keep_versions = keep_versions
        self.catalog = self._open()

    def _open(self) -> AdapterCatalog:
        body, layout = small_base()
        limits = Limits()
        registry = AdapterRegistry(
            LoraSlots(body, layout, 3), HostLimits(4, 1 << 20, 1), ("base",), reader(layout, limits)
        )
        store = AdapterStore(self.root / "store", self._keep_versions)
        registry.host.arenas = ArenaFiles(store.scratch, 1 << 20)
        catalog = AdapterCatalog(registry, store, layout, limits, self.directory)
        catalog.open()
        return catalog

    def close(self) -> None:
        self.catalog.registry.check_integrity()
        self.catalog.registry.host.close()
        self.catalog.store.close()

    def restart(self) -> None:
        self.close()
        self.catalog = self._open()
        assert self.catalog.store.audit() == []

    def upload(self, name: str, number: int, replace: bool = True) -> tuple[str, bool]:
        staged = self.catalog.store.stage()
        version, created = self.catalog.publish(name, save_small(staged, number), replace)
        return version.digest, created

    def drop_in(self, name: str, number: int) -> str:
        """Into the directory, and told."""
        save_small(self.directory / name, number)
        signature = scan(self.directory)[name]
        self.catalog.changed(name, signature)
        return self.digest(name)

    def digest(self, name: str) -> str:
        future = self.catalog.registry.read_first(name)
        if future is not None:
            future.result(30)
        version = self.catalog.registry.acquire(name)
        self.catalog.registry.release(version)
        return version.digest

    def keep_arena(self, name: str) -> Path:
        """Write the arena file of what `name` points at."""
        version = self.catalog.registry.current(name)
        arenas = self.catalog.registry.host.arenas
        assert arenas is not None
        arenas.write(self.catalog.read(version))
        return self.catalog.store.scratch / version.digest

    def names(self) -> list[str]:
        return [name for name, _ in self.catalog.registry.list()]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.close()


def test_an_upload_is_served_and_there_after_a_restart(house: House) -> None:
    digest, created = house.upload("a", 1)
    assert created
    assert house.upload("a", 1) == (digest, False)
    house.restart()
    assert house.names() == ["a"]
    assert house.digest("a") == digest
    assert house.catalog.registry.current("a").info.rank == 2


def test_the_same_content_under_two_names_is_one_version(house: House) -> None:
    assert house.upload("a", 1)[0] == house.upload("b", 1)[0]
    house.catalog.remove("a")
    house.restart()
    assert house.names() == ["b"]


@pytest.mark.parametrize("what", ["name", "content", "taken"])
def test_a_refused_upload_leaves_nothing(house: House, what: str) -> None:
    house.upload("a", 1)
    staged = save_small(house.catalog.store.stage(), 2)
    if what == "content":
        (staged / "adapter_config.json").write_text("{}")
    with pytest.raises({"name": InvalidName, "content": InvalidAdapter, "taken": AdapterExists}[what]):
        house.catalog.publish("bad name" if what == "name" else "a", staged, replace=False)
    assert not staged.exists()
    assert len(house.catalog.versions("a")) == 1
    assert house.catalog.store.audit() == []


def test_an_import_is_a_copy(house: House, tmp_path: Path) -> None:
    source = save_small(tmp_path / "elsewhere", 1)
    version, _ = house.catalog.import_directory("a", source)
    shutil.rmtree(source)
    house.restart()
    assert house.digest("a") == version.digest
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json is missing"):
        house.catalog.import_directory("b", tmp_path / "nowhere")
    assert list((house.root / "store" / "incoming").iterdir()) == []


def test_rollback_moves_the_name_and_survives_a_restart(house: House) -> None:
    first, second = house.upload("a", 1)[0], house.upload("a", 2)[0]
    assert house.catalog.rollback("a", first[:12]).digest == first
    assert house.digest("a") == first
    assert [stored.info.digest for stored in house.catalog.versions("a")] == [second, first]
    house.restart()
    assert house.digest("a") == first
    with pytest.raises(VersionNotFound):
        house.catalog.rollback("a", "0000")
    with pytest.raises(AdapterNotFound):
        house.catalog.rollback("b", first)


def test_old_versions_are_kept_up_to_the_limit_and_while_they_are_held(house: House) -> None:
    digests = [house.upload("a", 1)[0]]
    held = house.catalog.registry.acquire("a")
    digests += [house.upload("a", number)[0] for number in (2, 3, 4, 5)]
    assert [stored.info.digest for stored in house.catalog.versions("a")] == digests[:1:-1]
    store = house.catalog.store
    assert [store.path(digest).exists() for digest in digests] == [True, False, True, True, True]
    house.catalog.registry.release(held)
    house.catalog.collect()
    assert not store.path(digests[0]).exists()
    assert store.audit() == []


def test_a_version_is_found_by_the_beginning_of_its_digest(house: House) -> None:
    first, second = house.upload("a", 1)[0], house.upload("a", 2)[0]
    info, source = house.catalog.find("a", first[:8])
    assert info.digest == first
    version = house.catalog.registry.acquire_version("a", info, source)
    assert (version.digest, version.names) == (first, set())
    assert house.catalog.find("a", second[:8])[0].digest == second
    house.catalog.registry.release(version)
    for name, prefix, error in (("a", "0000", VersionNotFound), ("b", first, AdapterNotFound)):
        with pytest.raises(error):
            house.catalog.find(name, prefix)


def test_a_removed_adapter_stays_removed(house: House) -> None:
    house.upload("a", 1)
    house.drop_in("b", 2)
    for name in ("a", "b"):
        _, drained = house.catalog.remove(name)
        assert drained.result(30) > 0
    assert house.names() == []
    house.restart()
    assert house.names() == []
    assert house.drop_in("b", 3), "what is put into the directory later is served"
    for name in ("a", "c"):
        with pytest.raises(AdapterNotFound):
            house.catalog.remove(name)


# The directory


def test_the_directory_is_served_unread_at_first_and_remembered(house: House) -> None:
    save_small(house.directory / "a", 1)
    (house.directory / "a note.txt").write_text("no adapter")
    house.restart()
    [(name, entry)] = house.catalog.registry.list()
    assert isinstance(entry, UnreadAdapter)
    assert (name, entry.info.task_type, entry.info.rank, entry.tier) == ("a", "CAUSAL_LM", 2, "disk")
    assert house.catalog.unread() == ["a"]
    digest = house.digest("a")
    house.catalog.remember("a")
    house.restart()
    assert house.catalog.unread() == []
    assert house.catalog.registry.current("a").digest == digest
    save_small(house.directory / "a", 2)
    house.restart()
    assert house.catalog.unread() == ["a"], "it is another one now"


def test_new_content_becomes_a_new_version_and_holders_keep_the_old(house: House) -> None:
    old = house.drop_in("a", 1)
    held = house.catalog.registry.acquire("a")
    assert house.drop_in("a", 2) != old
    assert held.digest == old
    assert held.in_host
    assert held.source is None, "its files are gone: it may not leave memory"
    house.catalog.registry.release(held)
    assert not house.catalog.registry.in_use(old)


def test_a_broken_update_leaves_what_is_in_memory_served(house: House) -> None:
    digest = house.drop_in("a", 1)
    (house.directory / "a" / "adapter_config.json").write_text("{}")
    house.catalog.changed("a", scan(house.directory)["a"])
    assert house.digest("a") == digest
    assert "a" in house.catalog.registry.refused()
    new = house.drop_in("a", 3)
    assert new != digest
    assert house.catalog.registry.refused() == {}


def test_a_broken_update_of_what_is_on_disk_only_is_refused(house: House) -> None:
    house.drop_in("a", 1)
    for number in range(5):
        house.upload(f"other-{number}", 10 + number)
    assert house.catalog.registry.current("a").tier == "disk"
    (house.directory / "a" / "adapter_config.json").write_text("{}")
    house.catalog.broken("a", scan(house.directory)["a"], ["it is broken"])
    with pytest.raises(AdapterRefused, match="it is broken"):
        house.catalog.registry.acquire("a")


def test_broken_checkpoints_and_odd_names_are_listed(house: House) -> None:
    save_small(house.directory / "bad name", 1)
    save_small(house.directory / "base", 1)
    (save_small(house.directory / "broken", 1) / "adapter_config.json").write_text("{")
    house.restart()
    future = house.catalog.registry.read_first("broken")
    assert future is not None
    future.result(30)
    house.catalog.remember("broken")
    assert set(house.catalog.registry.refused()) == {"bad name", "base", "broken"}
    house.restart()
    assert house.catalog.unread() == []
    assert "adapter_config.json is not JSON" in house.catalog.registry.refused()["broken"][0]


def test_a_refused_directory_can_be_removed(house: House) -> None:
    (save_small(house.directory / "broken", 1) / "adapter_config.json").write_text("{}")
    house.catalog.changed("broken", scan(house.directory)["broken"])
    assert house.catalog.remove("broken")[1].result(30) == 0
    house.restart()
    assert house.catalog.registry.refused() == {}
    assert house.names() == []


def test_what_leaves_the_directory_is_served_no_more(house: House) -> None:
    house.drop_in("a", 1)
    shutil.rmtree(house.directory / "a")
    house.catalog.gone("a")
    assert house.names() == []
    house.catalog.gone("a")


def test_what_comes_last_under_a_name_counts(house: House) -> None:
    house.drop_in("a", 1)
    uploaded, _ = house.upload("a", 2)
    assert house.digest("a") == uploaded
    house.restart()
    assert house.digest("a") == uploaded, "the directory was there before"
    dropped = house.drop_in("a", 3)
    assert house.digest("a") == dropped
    house.restart()
    assert house.digest("a") == dropped
    assert house.catalog.rollback("a", uploaded).digest == uploaded
    house.restart()
    assert house.digest("a") == uploaded


def test_the_stores_version_comes_back_when_the_directory_goes(house: House) -> None:
    uploaded, _ = house.upload("a", 1)
    house.drop_in("a", 2)
    shutil.rmtree(house.directory / "a")
    house.catalog.gone("a")
    assert house.digest("a") == uploaded


def test_one_content_in_store_and_directory_outlives_either(house: House) -> None:
    house.upload("stored", 1)
    assert house.drop_in("dropped", 1) == house.digest("stored")
    shutil.rmtree(house.directory / "dropped")
    house.catalog.gone("dropped")
    assert house.names() == ["stored"]
    assert house.drop_in("dropped", 1)
    house.catalog.remove("stored")
    assert house.names() == ["dropped"]
    house.restart()
    assert house.digest("dropped")


def test_files_that_change_while_they_are_read_are_not_served(house: House, tmp_path: Path) -> None:
    path = save_small(house.directory / "a", 1)
    signature = scan(house.directory)["a"]
    save_small(path, 2)
    house.catalog.changed("a", signature)
    assert "changed while they were read" in house.catalog.registry.refused()["a"][0]
    assert house.names() == []


@pytest.mark.parametrize("end", ["removed", "replaced", "gone", "changed", "broken"])
def test_the_arena_file_goes_with_its_version(house: House, end: str) -> None:
    house.upload("kept", 3)
    of_directory = end in ("gone", "changed", "broken")
    if of_directory:
        house.drop_in("a", 1)
    else:
        house.upload("a", 1)
    house.restart()  # now they lie on the disk only
    kept, file = house.keep_arena("kept"), house.keep_arena("a")
    assert file.is_file()
    if end == "removed":
        house.catalog.remove("a")
    elif end == "replaced":
        house.upload("a", 2)
    elif end == "changed":
        house.drop_in("a", 2)
    elif end == "broken":
        house.catalog.broken("a", None, ["it is damaged"])
    else:
        shutil.rmtree(house.directory / "a")
        house.catalog.gone("a")
    assert not file.exists()
    assert kept.is_file()
    house.restart()
    assert not kept.exists()


def test_pins_are_there_after_a_restart(house: House) -> None:
    house.upload("a", 1)
    house.drop_in("b", 2)
    house.catalog.pin("a", True)
    house.catalog.pin("b", True)
    house.restart()
    assert house.catalog.registry.pinned("a")
    assert house.catalog.registry.pinned("b")
    house.catalog.pin("a", False)
    house.catalog.remove("b")
    house.restart()
    assert not house.catalog.registry.pinned("a")
    assert house.catalog.store.pins() == frozenset()

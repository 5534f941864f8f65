"""AdapterStore: names, histories, pins and the cache survive; nothing half done is ever found; faults are named."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from adapters import store as store_module
from adapters.adapter import AdapterInfo
from adapters.errors import AdapterNotFound, StoreInUse, VersionNotFound
from adapters.store import MAX_UNSAVED, AdapterStore

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEEP = 3


def weights_of(number: int) -> bytes:
    return random.Random(number).randbytes(100 + number)


def info_of(number: int) -> AdapterInfo:
    digest = hashlib.sha256(weights_of(number)).hexdigest()
    return AdapterInfo(digest, "SEQ_CLS", 8, ("no", "yés"), "single_label_classification", 100 + number)


def stage(store: AdapterStore, number: int) -> Path:
    staged = store.stage()
    (staged / CONFIG).write_bytes(b"{}")
    (staged / WEIGHTS).write_bytes(weights_of(number))
    return staged


def put(store: AdapterStore, name: str, number: int) -> AdapterInfo:
    info = info_of(number)
    store.commit(name, stage(store, number), info)
    return info


def history(store: AdapterStore, name: str) -> list[AdapterInfo]:
    return [version.info for version in store.versions(name)]


def nothing(digest: str) -> bool:
    """For `collect`: no version is in use."""
    return False


def check(store: AdapterStore) -> None:
    """No fault, and as many directories as rows."""
    assert store.audit() == []
    rows = {digest for (digest,) in store._database.run("SELECT digest FROM version")}
    assert {path.name for path in store._versions.iterdir()} == rows


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


@pytest.fixture
def store(root: Path) -> Iterator[AdapterStore]:
    with closing(AdapterStore(root, KEEP)) as opened:
        yield opened
        check(opened)


# names and versions


def test_a_commit_is_found(store: AdapterStore) -> None:
    staged = stage(store, 1)
    store.commit("a", staged, info_of(1))
    assert not staged.exists()
    assert store.current("a") == info_of(1)
    assert store.names() == {"a": info_of(1)}
    assert (store.path(info_of(1).digest) / WEIGHTS).read_bytes() == weights_of(1)


def test_an_empty_store_has_nothing(store: AdapterStore) -> None:
    assert (store.names(), store.current("a"), store.versions("a")) == ({}, None, [])
    assert (store.pins(), store.hidden(), store.remembered()) == (frozenset(), {}, {})
    store.remove("a")
    assert store.collect(nothing) == 0


def test_all_is_there_after_opening_again(root: Path) -> None:
    with closing(AdapterStore(root, KEEP)) as store:
        for number in (1, 2):
            put(store, "a", number)
        put(store, "b", 3)
        store.point("a", info_of(1).digest)
        store.set_pin("b", True)
        store.hide("c", "old")
        store.remember("d", "seen", info_of(4))
        before = store.versions("a")
    with closing(AdapterStore(root, KEEP)) as store:
        assert store.names() == {"a": info_of(1), "b": info_of(3)}
        assert store.versions("a") == before
        assert (store.pins(), store.hidden()) == (frozenset({"b"}), {"c": "old"})
        assert store.remembered() == {"d": ("seen", info_of(4))}
        check(store)


def test_names_come_in_order(store: AdapterStore) -> None:
    for name in ("b", "a-2", "a"):
        put(store, name, 1)
    assert list(store.names()) == ["a", "a-2", "b"]


def test_a_history_has_the_newest_first(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.store.time.time", iter([30.0, 10.0, 20.0]).__next__)  # a clock that was set back
    for number in (1, 2, 3):
        put(store, "a", number)
    assert [(v.info, v.put_at) for v in store.versions("a")] == [
        (info_of(3), 20.0), (info_of(2), 10.0), (info_of(1), 30.0),
    ]  # fmt: skip


def test_a_history_keeps_the_newest(store: AdapterStore) -> None:
    for number in range(5):
        put(store, "a", number)
    assert history(store, "a") == [info_of(4), info_of(3), info_of(2)]


def test_a_version_put_again_is_the_newest(store: AdapterStore) -> None:
    for number in (1, 2, 1):
        put(store, "a", number)
    assert history(store, "a") == [info_of(1), info_of(2)]
    assert store.current("a") == info_of(1)


def test_the_files_of_a_known_version_stay(store: AdapterStore) -> None:
    put(store, "a", 1)
    staged = stage(store, 1)
    (staged / CONFIG).write_bytes(b"{ }")
    store.commit("b", staged, info_of(1))
    assert not staged.exists()
    assert (store.path(info_of(1).digest) / CONFIG).read_bytes() == b"{}"


def test_a_commit_brings_back_a_lost_directory(store: AdapterStore) -> None:
    put(store, "a", 1)
    shutil.rmtree(store.path(info_of(1).digest))
    staged = stage(store, 1)
    (staged / CONFIG).write_bytes(b"{ }")
    store.commit("a", staged, info_of(1))
    check(store)


def test_point_goes_back_and_history_stays(store: AdapterStore) -> None:
    for number in (1, 2, 3):
        put(store, "a", number)
    assert store.point("a", info_of(1).digest) == info_of(1)
    assert store.current("a") == info_of(1)
    assert history(store, "a") == [info_of(3), info_of(2), info_of(1)]


def test_the_current_version_is_never_trimmed(root: Path) -> None:
    with closing(AdapterStore(root, KEEP)) as store:
        for number in (1, 2, 3):
            put(store, "a", number)
        store.point("a", info_of(1).digest)
    with closing(AdapterStore(root, 2)) as store:
        store.point("a", info_of(1).digest)
        assert history(store, "a") == [info_of(3), info_of(1)]
    with closing(AdapterStore(root, 1)) as store:
        store.point("a", info_of(1).digest)
        assert history(store, "a") == [info_of(1)]
        assert put(store, "a", 4) == store.current("a")
        assert history(store, "a") == [info_of(4)]


def test_point_refuses_what_is_not_there(store: AdapterStore) -> None:
    put(store, "a", 1)
    put(store, "b", 2)
    with pytest.raises(AdapterNotFound, match="no adapter is named 'c'"):
        store.point("c", info_of(1).digest)
    with pytest.raises(VersionNotFound, match=f"'a' has no version whose digest begins with '{info_of(2).digest}'"):
        store.point("a", info_of(2).digest)
    assert store.names() == {"a": info_of(1), "b": info_of(2)}


def test_find_by_prefix(store: AdapterStore) -> None:
    first, second = (replace(info_of(number), digest=digest) for number, digest in ((1, "abc1"), (2, "abd2")))
    store.commit("a", stage(store, 1), first)
    store.commit("a", stage(store, 2), second)
    assert store.find("a", "abc") == first
    assert store.find("a", "abd2") == second
    with pytest.raises(VersionNotFound, match="'a' has 2 versions whose digest begins with 'ab'"):
        store.find("a", "ab")
    with pytest.raises(VersionNotFound, match="'a' has no version whose digest begins with 'a_c'"):
        store.find("a", "a_c")
    with pytest.raises(AdapterNotFound):
        store.find("b", "abc")


def test_remove_takes_history_and_pin(store: AdapterStore) -> None:
    for number in (1, 2):
        put(store, "a", number)
    store.set_pin("a", True)
    store.remove("a")
    assert (store.names(), store.versions("a"), store.pins()) == ({}, [], frozenset())


# collecting


def test_collect_removes_what_no_history_holds(store: AdapterStore) -> None:
    for number in range(5):
        put(store, "a", number)
    assert store.collect(nothing) == sum(len(weights_of(number)) + 2 for number in (0, 1))
    assert [store.path(info_of(n).digest).exists() for n in range(5)] == [False, False, True, True, True]
    assert store.collect(nothing) == 0
    check(store)


def test_collect_leaves_what_is_in_use(store: AdapterStore) -> None:
    for number in (1, 2):
        put(store, "a", number)
    store.remove("a")
    used = info_of(1).digest
    assert store.collect(used.__eq__) == len(weights_of(2)) + 2
    assert (store.path(used) / WEIGHTS).read_bytes() == weights_of(1)
    put(store, "b", 1)
    assert store.collect(nothing) == 0
    assert store.current("b") == info_of(1)


def test_collect_leaves_what_is_put_meanwhile(store: AdapterStore) -> None:
    put(store, "a", 1)
    store.remove("a")

    def put_it_again(digest: str) -> bool:
        with ThreadPoolExecutor(1) as pool:  # so it also shows that the store is not locked while it asks
            pool.submit(put, store, "b", 1).result(timeout=20)
        return False

    assert store.collect(put_it_again) == 0
    assert (store.path(info_of(1).digest) / WEIGHTS).read_bytes() == weights_of(1)


def test_a_shared_version_survives_one_name(store: AdapterStore) -> None:
    put(store, "a", 1)
    put(store, "b", 1)
    store.remove("a")
    assert store.collect(nothing) == 0
    assert (store.path(info_of(1).digest) / WEIGHTS).read_bytes() == weights_of(1)
    store.remove("b")
    assert store.collect(nothing) > 0


# uploads


def test_staged_directories_are_empty_and_distinct(store: AdapterStore) -> None:
    first, second = store.stage(), store.stage()
    assert first != second
    assert [*first.iterdir(), *second.iterdir()] == []


def test_discard(store: AdapterStore) -> None:
    staged = stage(store, 1)
    store.discard(staged)
    assert not staged.exists()
    store.discard(staged)


def test_discard_removes_nothing_else(store: AdapterStore) -> None:
    put(store, "a", 1)
    with pytest.raises(AssertionError):
        store.discard(store.path(info_of(1).digest))


def test_a_commit_without_space_changes_nothing(store: AdapterStore) -> None:
    put(store, "a", 1)
    store._database.run("PRAGMA max_page_count = 1")  # SQLite makes it the file's size
    large = replace(info_of(2), labels=("x" * 100_000,))
    staged = stage(store, 2)
    with pytest.raises(OSError, match="full") as raised:
        store.commit("a", staged, large)
    assert raised.value.errno == errno.ENOSPC
    check(store)
    assert history(store, "a") == [info_of(1)]
    store._database.run("PRAGMA max_page_count = 1000000")
    store.commit("a", staged, large)
    assert store.current("a") == large


def test_a_commit_refuses_what_is_not_a_file(store: AdapterStore) -> None:
    staged = stage(store, 1)
    (staged / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        store.commit("a", staged, info_of(1))
    assert staged.exists()
    assert store.names() == {}


# pins, the watched directory


def test_pins(store: AdapterStore) -> None:
    for name, pinned in (("a", True), ("b", True), ("a", True), ("b", False), ("c", False)):
        store.set_pin(name, pinned)
    assert store.pins() == {"a"}


def test_hidden(store: AdapterStore) -> None:
    for name, signature in (("a", "1"), ("b", "1"), ("a", "2")):
        store.hide(name, signature)
    store.unhide("b")
    store.unhide("c")
    assert store.hidden() == {"a": "2"}


def test_remembered(store: AdapterStore) -> None:
    store.remember("a", "1", info_of(1))
    store.remember("b", "1", ("no weights", "no config"))
    store.remember("c", "1", ())
    assert store.remembered() == {"a": ("1", info_of(1)), "b": ("1", ("no weights", "no config")), "c": ("1", ())}
    store.remember("a", "2", ("broken",))
    store.forget("b")
    store.forget("c")
    store.remember("c", "3", info_of(3))
    store.forget("d")
    assert store.remembered() == {"a": ("2", ("broken",)), "c": ("3", info_of(3))}


def test_many_are_remembered_together(store: AdapterStore) -> None:
    def written() -> int:
        return int(store._database.run("SELECT count(*) FROM remembered")[0][0])

    for number in range(MAX_UNSAVED - 1):
        store.remember(str(number), "1", ())
    assert written() == 0
    store.remember("last", "1", ())
    assert written() == MAX_UNSAVED


# threads and processes


def test_threads_commit_at_once(store: AdapterStore) -> None:
    def work(thread: int) -> None:
        for number in range(20):
            put(store, f"name-{thread}", number * (thread + 1))  # some are put by several
            store.set_pin(f"name-{thread}", number % 2 == 0)
            store.remember(f"name-{thread}", str(number), ())
            if number % 5 == 4:
                store.collect(nothing)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert store.names() == {f"name-{thread}": info_of(19 * (thread + 1)) for thread in range(3)}
    assert store.remembered() == {f"name-{thread}": ("19", ()) for thread in range(3)}
    store.collect(nothing)
    check(store)
    assert list(store._incoming.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="no flock")
def test_another_process_cannot_open_it(store: AdapterStore, root: Path) -> None:
    program = f"from adapters.store import AdapterStore; AdapterStore(__import__('pathlib').Path({str(root)!r}), 1)"
    put(store, "a", 1)
    staged = stage(store, 2)
    (store.scratch / "file").touch()
    other = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120)
    assert other.returncode == 1
    assert f"StoreInUse: {root} is in use by another server" in other.stderr
    assert staged.exists()
    assert (store.scratch / "file").exists()
    with pytest.raises(StoreInUse):
        AdapterStore(root, 1)


def test_the_scratch_directory_is_empty_at_first_and_gone_at_the_end(root: Path) -> None:
    (root / "scratch" / "deeper").mkdir(parents=True)
    (root / "scratch" / "file").touch()
    store = AdapterStore(root, KEEP)
    assert list(store.scratch.iterdir()) == []
    (store.scratch / "file").touch()
    check(store)
    store.close()
    assert not store.scratch.exists()


def test_the_scratch_directory_is_gone_though_the_end_fails(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(root, KEEP)

    def fail() -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(store, "flush", fail)
    with pytest.raises(OSError, match="no space"):
        store.close()
    assert not store.scratch.exists()


def test_what_is_closed_again_leaves_the_next_ones_scratch_directory(root: Path) -> None:
    first = AdapterStore(root, KEEP)
    first.close()
    with closing(AdapterStore(root, KEEP)) as second:
        first.close()
        assert second.scratch.is_dir()


@pytest.mark.skipif(os.name == "nt", reason="no flock")
def test_one_may_close_it_just_before_another_locks_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, lock = AdapterStore(root, KEEP), store_module._lock_file

    def close_first(handle: IO[str], at: Path) -> None:
        first.close()
        lock(handle, at)

    monkeypatch.setattr(store_module, "_lock_file", close_first)
    with closing(AdapterStore(root, KEEP)) as second:
        assert list(second.scratch.iterdir()) == []


def test_close_lets_go_and_may_be_repeated(root: Path) -> None:
    for _ in range(2):
        store = AdapterStore(root, KEEP)
        store.remember("a", "1", ())
        store.close()
        store.close()
        with pytest.raises(OSError, match="closed database"):
            store.names()


# what a crash or another hand left


def test_open_removes_what_a_crash_left(root: Path) -> None:
    with closing(AdapterStore(root, KEEP)) as store:
        for number in (1, 2):
            put(store, "a", number)
        put(store, "b", 3)
        store.remove("b")
        stage(store, 4)
        (root / "incoming" / "file").write_bytes(b"")
        shutil.copytree(store.path(info_of(1).digest), root / "versions" / "orphan")
    with closing(AdapterStore(root, KEEP)) as store:
        check(store)
        assert sorted(p.name for p in (root / "versions").iterdir()) == sorted(info_of(n).digest for n in (1, 2))
        assert list((root / "incoming").iterdir()) == []
        assert history(store, "a") == [info_of(2), info_of(1)]


Change = Callable[[AdapterStore], object]


def remove_and_collect(store: AdapterStore) -> None:
    store.remove("a")
    store.collect(nothing)


@pytest.mark.parametrize(
    ("change", "after"),
    [
        pytest.param(lambda store: put(store, "a", 2), info_of(2), id="commit"),
        pytest.param(remove_and_collect, None, id="remove and collect"),
    ],
)
def test_a_stop_at_any_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, after: AdapterInfo | None
) -> None:
    """The store as it was before each statement and before each order to the disk, opened again."""
    copies: list[Path] = []

    def take_copy(step: object) -> None:
        copies.append(tmp_path / f"copy-{len(copies)}")
        shutil.copytree(root, copies[-1])

    def copying(call: Callable[..., None]) -> Callable[..., None]:
        def copy_and_call(*arguments: object) -> None:
            take_copy(call)
            call(*arguments)

        return copy_and_call

    with closing(AdapterStore(root, 1)) as store:
        put(store, "a", 1)
        with monkeypatch.context() as patched:
            for call in (os.fsync, os.rename):
                patched.setattr(os, call.__name__, copying(call))
            store._database._connection.set_trace_callback(take_copy)
            change(store)
            store._database._connection.set_trace_callback(None)
    found = []
    for copy in [*copies, root]:
        with closing(AdapterStore(copy, 1)) as store:
            check(store)
            assert list((copy / "incoming").iterdir()) == []
            found.append(store.current("a"))
            assert history(store, "a") == [info for info in found[-1:] if info is not None]
    made = found.index(after)
    assert 5 <= made < len(found)
    assert found == [info_of(1)] * made + [after] * (len(found) - made)


def break_row(database: sqlite3.Connection, directory: Path) -> None:
    database.execute("DELETE FROM version WHERE digest = ?", (directory.name,))


def lose_the_directory(database: sqlite3.Connection, directory: Path) -> None:
    shutil.rmtree(directory)


def lose_a_file(database: sqlite3.Connection, directory: Path) -> None:
    (directory / CONFIG).unlink()


def cut_a_file(database: sqlite3.Connection, directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(weights_of(1)[:-1])


def change_a_file(database: sqlite3.Connection, directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(weights_of(1)[:-1] + b"!")


def add_a_file(database: sqlite3.Connection, directory: Path) -> None:
    (directory / "model.bin").write_bytes(b"")


DIGEST = info_of(1).digest


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (break_row, f"a points at {DIGEST}, which is no version"),
        (break_row, f"versions/{DIGEST} belongs to no version"),
        (lose_the_directory, f"{DIGEST} has no directory"),
        (lose_a_file, f"{DIGEST} lacks {CONFIG}"),
        (cut_a_file, f"{DIGEST} has {WEIGHTS} of another size"),
        (change_a_file, f"{DIGEST} has {WEIGHTS} of another content"),
        (add_a_file, f"{DIGEST} has an unknown file model.bin"),
    ],
)
def test_an_audit_names_the_fault(root: Path, damage: Callable[[sqlite3.Connection, Path], None], fault: str) -> None:
    with closing(AdapterStore(root, KEEP)) as store:
        put(store, "a", 1)
        stage(store, 2)
        assert store.audit() == []
        with closing(sqlite3.connect(root / "store.db")) as database, database:
            damage(database, store.path(DIGEST))
        assert fault in store.audit()


def test_the_database_refuses_a_pointer_to_nothing(store: AdapterStore) -> None:
    with pytest.raises(OSError, match="FOREIGN KEY"):
        store._database.run("INSERT INTO name VALUES ('a', 'nothing')")


@pytest.mark.parametrize("content", [b"this is no database " * 100, None])
def test_a_file_that_is_not_ours_is_refused_and_let_go(root: Path, content: bytes | None) -> None:
    file = root / "store.db"
    root.mkdir(parents=True)
    if content is None:
        with closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA user_version = 99")
    else:
        file.write_bytes(content)
    with pytest.raises(OSError, match=r"store\.db"):
        AdapterStore(root, KEEP)
    file.unlink()
    AdapterStore(root, KEEP).close()

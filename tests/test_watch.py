"""What an operator does in the directory is told once, in order, when it has settled; nothing else is told."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from adapters.directory import scan, signature_of
from server import watch
from server.watch import DirectoryWatch

WEIGHTS = save({"a": np.arange(64, dtype=np.float32)})
NEVER_S = 3600.0
TIMEOUT_S = 30.0
Told = tuple[str, ...]


class Recorder:
    """A listener that keeps what it is told, and can be made to wait or to fail."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[Told] = asyncio.Queue()
        self.gates: dict[str, asyncio.Event] = {}
        self.failures: Counter[str] = Counter()
        self._running: set[str] = set()

    async def changed(self, name: str, signature: str) -> None:
        await self._take("changed", name, signature)

    async def gone(self, name: str) -> None:
        await self._take("gone", name)

    async def broken(self, name: str, reasons: Sequence[str]) -> None:
        await self._take("broken", name, *reasons)

    async def next(self) -> Told:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.told.get()

    async def _take(self, kind: str, name: str, *rest: str) -> None:
        assert name not in self._running, f"two calls at once for {name}"
        self._running.add(name)
        try:
            self.told.put_nowait((kind, name, *rest))
            if name in self.gates:
                await self.gates[name].wait()
            if self.failures[name]:
                self.failures[name] -= 1
                raise OSError("the disk is full")
        finally:
            self._running.remove(name)


def put(file: Path, content: bytes) -> None:
    """Write a file in one go, as far as anybody sees."""
    new = file.with_name(".new")
    new.write_bytes(content)
    new.replace(file)


def write(path: Path, text: str = "{}", weights: bytes = WEIGHTS) -> Path:
    """A checkpoint, complete unless told otherwise; in one go, when at most one file of it is other than before."""
    files = {CONFIG_FILE: text.encode(), WEIGHTS_FILE: weights}
    if path.exists():
        for name, content in files.items():
            if not (path / name).exists() or (path / name).read_bytes() != content:
                put(path / name, content)
        return path
    staged = path.with_name(f".{path.name}")
    staged.mkdir(parents=True)
    for name, content in files.items():
        (staged / name).write_bytes(content)
    return staged.rename(path)


def changed(path: Path) -> Told:
    return ("changed", path.name, str(signature_of(path)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "root" / "old").parent


Work = Callable[[Recorder], Awaitable[None]]


def watching(root: Path, work: Work, begun: bool = True, **settings: Any) -> None:
    """Do `work` while `root` is watched; when `begun`, the watch tells of `zero` first."""
    settings = {"known": scan(root), "settle_s": 0.05, "patience_s": NEVER_S, "rescan_s": NEVER_S, **settings}

    async def main() -> None:
        recorder = Recorder()
        task = asyncio.create_task(DirectoryWatch(root, recorder, **settings).run())
        try:
            if begun:
                write(root / "zero")
                assert await recorder.next() == changed(root / "zero")
            await work(recorder)
            assert not task.done()
            assert recorder.told.empty()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main(), debug=True)


def test_what_changed_before_it_began_is_told(root: Path) -> None:
    for name in ("same", "replaced", "removed"):
        write(root / name)
    known = scan(root)
    write(root / "replaced", '{"r": 2}')
    shutil.rmtree(root / "removed")
    write(root / "new")

    async def work(listener: Recorder) -> None:
        told = {await listener.next() for _ in range(3)}
        assert told == {changed(root / "replaced"), changed(root / "new"), ("gone", "removed")}

    watching(root, work, begun=False, known=known)


def test_a_checkpoint_that_is_written_slowly_is_told_when_it_is_complete(root: Path) -> None:
    async def work(listener: Recorder) -> None:
        (root / "slow").mkdir()
        (root / "slow" / CONFIG_FILE).write_text('{"r":')
        write(root / "mark-1")
        assert await listener.next() == changed(root / "mark-1")
        with (root / "slow" / WEIGHTS_FILE).open("wb") as file:
            for count, byte in enumerate((WEIGHTS[:100], WEIGHTS[100:])):
                file.write(byte)
                file.flush()
                write(root / f"mark-{2 + count}")
                assert await listener.next() == changed(root / f"mark-{2 + count}")
        (root / "slow" / CONFIG_FILE).write_text('{"r": 2}')
        assert await listener.next() == changed(root / "slow")

    watching(root, work)


def test_a_checkpoint_that_is_moved_into_place_is_told(root: Path, tmp_path: Path) -> None:
    async def work(listener: Recorder) -> None:
        write(tmp_path / "aside" / "moved").rename(root / "moved")
        assert await listener.next() == changed(root / "moved")
        (root / "moved").rename(root / "other-name")
        assert {await listener.next(), await listener.next()} == {("gone", "moved"), changed(root / "other-name")}

    watching(root, work)


def test_new_content_is_told_and_so_is_its_end(root: Path) -> None:
    async def work(listener: Recorder) -> None:
        write(root / "old", '{"r": 2}')
        assert await listener.next() == changed(root / "old")
        (root / "old" / "README.md").write_text("says nothing")
        put(root / "old" / WEIGHTS_FILE, WEIGHTS)
        assert await listener.next() == changed(root / "old")
        shutil.rmtree(root / "old")
        assert await listener.next() == ("gone", "old")
        write(root / "old")
        assert await listener.next() == changed(root / "old")
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            (root / "old" / file).unlink()
        assert await listener.next() == ("gone", "old")

    watching(root, work)


def test_what_stays_incomplete_is_broken_once(root: Path) -> None:
    async def work(listener: Recorder) -> None:
        write(root / "half", weights=WEIGHTS[:-1])
        reason = f"{WEIGHTS_FILE} has {len(WEIGHTS) - 1} of {len(WEIGHTS)} bytes"
        assert await listener.next() == ("broken", "half", reason)
        (root / "half" / "README.md").write_text("says nothing")
        write(root / "mark")
        assert await listener.next() == changed(root / "mark")
        write(root / "half", weights=WEIGHTS[:-2])
        assert (await listener.next())[:2] == ("broken", "half")
        write(root / "half")
        assert await listener.next() == changed(root / "half")
        (root / "half" / CONFIG_FILE).unlink()
        assert await listener.next() == ("broken", "half", f"{CONFIG_FILE} is missing")

    watching(root, work, patience_s=0.1)


def test_nothing_is_told_before_it_has_settled(root: Path) -> None:
    async def work(listener: Recorder) -> None:
        started = time.monotonic()
        write(root / "new")
        assert await listener.next() == changed(root / "new")
        assert time.monotonic() - started >= 0.2
        started = time.monotonic()
        shutil.rmtree(root / "new")
        assert await listener.next() == ("gone", "new")
        assert time.monotonic() - started >= 0.2
        started = time.monotonic()
        write(root / "half", weights=WEIGHTS[:-1])
        assert (await listener.next())[:2] == ("broken", "half")
        assert time.monotonic() - started >= 0.4

    watching(root, work, settle_s=0.2, patience_s=0.4)


def test_each_change_is_waited_for_again(root: Path) -> None:
    async def work(listener: Recorder) -> None:
        started, told = time.monotonic(), None
        while told is None:
            if time.monotonic() - started < 1.0:
                written = time.monotonic()
                write(root / "new", f"[{written}]")
            with suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    told = await listener.told.get()
        assert told == changed(root / "new")
        assert time.monotonic() - written >= 0.4

    watching(root, work, settle_s=0.4)


def test_events_that_change_nothing_delay_nothing(root: Path) -> None:
    async def work(listener: Recorder) -> None:
        write(root / "busy")
        told: Told | None = None
        for count in range(3000):
            (root / "busy" / "log.txt").write_text(str(count))
            with suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    told = await listener.told.get()
                    break
        assert told == changed(root / "busy")

    watching(root, work, settle_s=0.5)


def test_names_do_not_wait_for_each_other_and_calls_of_one_name_do(root: Path) -> None:
    async def work(listener: Recorder) -> None:
        listener.gates["held"] = asyncio.Event()
        first = changed(write(root / "held"))
        assert await listener.next() == first
        for text in ('{"r": 3}', '{"r": 4}'):
            write(root / "held", text)
            write(root / "other", text)
            assert await listener.next() == changed(root / "other")
        listener.gates["held"].set()
        assert await listener.next() == changed(root / "held") != first

    watching(root, work)


def test_a_listener_that_fails_is_told_again(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work(listener: Recorder) -> None:
        listener.failures.update({"bad": 1, "old": 1})
        write(root / "bad")
        assert await listener.next() == changed(root / "bad")
        assert await listener.next() == changed(root / "bad")
        shutil.rmtree(root / "old")
        assert await listener.next() == ("gone", "old")
        assert await listener.next() == ("gone", "old")

    watching(root, work, rescan_s=0.1)
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["the disk is full"] * 2


def test_a_volume_that_turns_its_link_is_seen_at_once(root: Path) -> None:
    def turn(version: str) -> None:
        write(root / f"..{version}" / "mounted", f'{{"version": "{version}"}}')
        (root / "..data_new").symlink_to(f"..{version}")
        (root / "..data_new").replace(root / watch.SWITCH)

    async def work(listener: Recorder) -> None:
        turn("1")
        (root / "mounted").symlink_to("..data/mounted")
        assert await listener.next() == changed(root / "mounted")
        turn("2")
        assert await listener.next() == changed(root / "mounted")

    watching(root, work)


def test_a_link_that_leads_elsewhere_is_seen_at_the_next_scan(root: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(write(tmp_path / "v1" / "linked").parent)
    (root / "linked").symlink_to(tmp_path / "current" / "linked")

    async def work(listener: Recorder) -> None:
        write(tmp_path / "v2" / "linked", '{"r": 2}')
        (tmp_path / "new").symlink_to(tmp_path / "v2")
        (tmp_path / "new").replace(tmp_path / "current")
        assert await listener.next() == changed(root / "linked")

    watching(root, work, rescan_s=0.1)


def test_what_is_hidden_is_nobodys(root: Path) -> None:
    async def work(listener: Recorder) -> None:
        write(root / ".incoming")
        (root / "notes.txt").write_text("")
        (root / "empty").mkdir()
        write(root / "mark")
        assert await listener.next() == changed(root / "mark")
        (root / ".incoming").rename(root / "arrived")
        assert await listener.next() == changed(root / "arrived")

    watching(root, work)


def test_while_the_directory_is_away_its_adapters_stay(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(listener: Recorder) -> None:
        loop, failed = asyncio.get_running_loop(), asyncio.Semaphore(0)

        def scan_and_tell(path: Path) -> dict[str, str]:
            try:
                return scan(path)
            except OSError:
                loop.call_soon_threadsafe(failed.release)
                raise

        monkeypatch.setattr(watch, "scan", scan_and_tell)
        shutil.rmtree(root)
        async with asyncio.timeout(TIMEOUT_S):
            for _ in range(2):
                await failed.acquire()
        assert listener.told.empty()
        write(root / "zero")
        assert {await listener.next(), await listener.next()} == {changed(root / "zero"), ("gone", "old")}
        write(root / "new")
        assert await listener.next() == changed(root / "new")

    watching(root, work, rescan_s=0.5)


def test_events_come_from_a_directory_that_took_the_place_of_another(root: Path) -> None:
    """A link to the directory is turned; then the scans cease, and events must do."""
    link = root.parent / "link"
    link.symlink_to(root)
    other = write(root.parent / "other" / "old").parent

    async def main() -> None:
        listener = Recorder()
        directory_watch = DirectoryWatch(link, listener, {}, settle_s=0.05, rescan_s=0.1)
        task = asyncio.create_task(directory_watch.run())
        assert await listener.next() == changed(link / "old")
        link.unlink()
        link.symlink_to(other)
        assert await listener.next() == changed(link / "old")
        directory_watch._rescan_s = NEVER_S
        for name in ("seen-by-a-scan", "seen-by-an-event"):
            write(other / name)
            assert await listener.next() == changed(link / name)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_without_events_scans_do(root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def no_events(*_paths: str, **_options: Any) -> AsyncIterator[set[Any]]:
        raise OSError("OS file watch limit reached")
        yield set()

    monkeypatch.setattr(watch, "awatch", no_events)

    async def work(listener: Recorder) -> None:
        write(root / "old", '{"r": 2}')
        assert await listener.next() == changed(root / "old")

    with caplog.at_level(logging.WARNING):
        watching(root, work, rescan_s=0.1)
    assert "it is scanned every 0.1 s: OS file watch limit reached" in caplog.text


def test_a_directory_is_polled_where_the_environment_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHFILES_FORCE_POLLING", "1")
    monkeypatch.setenv("WATCHFILES_POLL_DELAY_MS", "50")

    async def work(listener: Recorder) -> None:
        write(root / "new")
        assert await listener.next() == changed(root / "new")

    watching(root, work)

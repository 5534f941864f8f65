"""DirectoryWatch: tells what changes among the checkpoints of a directory, when it has settled.

Knows nothing of what is done about it. The system's events say which names to look at; a name that differs from what
the listener was told is looked at until it stays as it is. Events can be lost (a queue runs over, a link leads
elsewhere, a network file system sends none), so now and then the whole directory is scanned. Where a mount sends no
events at all, WATCHFILES_FORCE_POLLING=1 in the environment makes the watchfiles library look for itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from watchfiles import Change, awatch

from adapters.directory import scan, signature_of, unfinished

logger = logging.getLogger(__name__)

STEP_MS, DEBOUNCE_MS = 50, 200
"""Events this close together come as one batch, which takes no longer than that."""
SWITCH = "..data"
"""Kubernetes replaces the content of a volume by turning this link."""
MAX_LOOKS = 4
"""Names looked at at once, so that thousands of them leave threads to others."""


class Listener(Protocol):
    """Who is told. One call at a time for one name; a call that raises is made again after the next scan."""

    async def changed(self, name: str, signature: str) -> None:
        """A complete checkpoint is there, new or with other content than the one told of before."""

    async def gone(self, name: str) -> None:
        """The checkpoint told of before is no longer there."""

    async def broken(self, name: str, reasons: Sequence[str]) -> None:
        """A checkpoint was not completed for long; told once for each content."""


@dataclass(frozen=True)
class _Sight:
    """What lies under a name: no checkpoint (no signature), a complete one (no fault), or another."""

    signature: str | None
    fault: str | None = None


class DirectoryWatch:
    """Watches the checkpoints directly under one directory. Event loop only; the disk is read in threads."""

    def __init__(  # noqa: PLR0913
        self,
        root: Path,
        listener: Listener,
        known: Mapping[str, str],
        *,
        settle_s: float = 0.5,
        patience_s: float = 30.0,
        rescan_s: float = 60.0,
    ) -> None:
        """known: name -> signature that the listener knows already, as `adapters.directory.scan` gives them.

        settle_s: so long a complete checkpoint, or its absence, must stay before it is told; patience_s: so long an
        incomplete one.
        """
        self._root = root
        self._listener = listener
        self._known = dict(known)
        self._settle_s, self._patience_s, self._rescan_s = settle_s, patience_s, rescan_s
        self._followed: dict[str, asyncio.Event] = {}
        """Name -> set when it is to be looked at again, for names whose task runs."""
        self._looks = asyncio.Semaphore(MAX_LOOKS)
        self._tasks: asyncio.TaskGroup

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            while True:
                await self._watch()

    async def _watch(self) -> None:
        """Follow events, and scan, for as long as there are events and the directory is the one that it was."""
        place = await asyncio.to_thread(_place, self._root)
        listening = self._tasks.create_task(self._listen(place[0]))
        await asyncio.sleep(0)  # the task is at its first wait: what changes from here on gives events
        try:
            while True:
                await self._scan()
                await asyncio.sleep(self._rescan_s)
                if listening.done() or await asyncio.to_thread(_place, self._root) != place:
                    return
        finally:
            listening.cancel()

    async def _listen(self, directory: str) -> None:
        """Have every name looked at that an event names; return when there are no events to be had."""

        def visible(_change: Change, path: str) -> bool:
            return not any(part.startswith(".") and part != SWITCH for part in _parts(directory, path))

        try:
            # it adds its watches before it first waits: 10,000 subdirectories hold the loop for a third of a second
            batches = awatch(directory, watch_filter=visible, step=STEP_MS, debounce=DEBOUNCE_MS)
            async with aclosing(batches):
                async for changes in batches:
                    names = {parts[0] for _, path in changes if (parts := _parts(directory, path))}
                    if SWITCH in names:
                        await self._scan()
                    self._look_at(names - {SWITCH})
        except Exception as error:
            logger.warning("no events from the adapter directory, it is scanned every %g s: %s", self._rescan_s, error)

    async def _scan(self) -> None:
        """Have every name looked at that differs from what the listener was told."""
        try:
            found = await asyncio.to_thread(scan, self._root)
        except OSError as error:
            logger.warning("the adapter directory cannot be read, its adapters stay: %s", error)
            return
        known = self._known
        self._look_at(name for name in found.keys() | known.keys() if found.get(name) != known.get(name))

    def _look_at(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._followed:
                self._followed[name].set()
            else:
                self._followed[name] = asyncio.Event()
                self._tasks.create_task(self._follow(name, self._followed[name]))

    async def _follow(self, name: str, again: asyncio.Event) -> None:
        """Look at one name until the listener knows what is there; `again` is set when it may have changed."""
        clock = asyncio.get_running_loop().time
        since, seen = clock(), _Sight(None)
        try:
            while True:
                again.clear()
                async with self._looks:
                    last, seen = seen, await asyncio.to_thread(self._see, name)
                if seen.signature == self._known.get(name):
                    if again.is_set():
                        continue
                    return
                if seen.signature != last.signature:
                    since = clock()
                left = since + (self._patience_s if seen.fault else self._settle_s) - clock()
                if left > 0:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(left):
                            await again.wait()
                elif not await self._tell(name, seen) and not again.is_set():
                    return
        finally:
            del self._followed[name]

    def _see(self, name: str) -> _Sight:
        """Any thread. While the directory itself is away, everything in it counts as unchanged."""
        path = self._root / name
        signature = signature_of(path)
        if signature is None:
            return _Sight(None if os.path.isdir(self._root) else self._known.get(name))
        if signature == self._known.get(name):
            return _Sight(signature)
        return _Sight(signature, unfinished(path))

    async def _tell(self, name: str, seen: _Sight) -> bool:
        """Whether the listener took it."""
        try:
            if seen.signature is None:
                await self._listener.gone(name)
                self._known.pop(name, None)
                return True
            if seen.fault is None:
                await self._listener.changed(name, seen.signature)
            else:
                await self._listener.broken(name, [seen.fault])
        except Exception:
            logger.exception("adapter %s: what changed in the directory is not served; it is tried again", name)
            return False
        self._known[name] = seen.signature
        return True


def _parts(directory: str, path: str) -> list[str]:
    """The names on the way from `directory` to `path`; none for `directory` itself."""
    return [part for part in path.removeprefix(directory).split(os.sep) if part]


def _place(root: Path) -> tuple[str, tuple[int, int] | None]:
    """Where `root` really lies, and which directory that is now. Any thread."""
    real = os.path.realpath(root)
    try:
        found = os.stat(real)
    except OSError:
        return real, None
    return real, (found.st_dev, found.st_ino)

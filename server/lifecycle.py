"""Lifecycle: adapters come, change and go while the server serves. Between the event loop and the catalog's disk.

Knows nothing of HTTP or of sequences. Event loop only, but for `open`; what blocks on the disk runs in its own threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from adapters.adapter import Adapter, AdapterInfo
from adapters.arena_files import ArenaFiles
from adapters.catalog import AdapterCatalog
from adapters.checkpoint import CONFIG_FILE
from adapters.composition import MAX_PARTS, check_composition
from adapters.errors import AdapterError, AdapterNotFound, InvalidAdapter, VersionNotFound
from adapters.registry import AdapterRegistry, Entry
from adapters.report import Report, describe
from adapters.store import AdapterStore, StoredVersion
from adapters.version import AdapterVersion, Source
from server.bases import state_dir
from server.composition import InvalidComposition, Parts, names_in, parts_of
from server.config import ServerConfig
from server.engine.engine import Engine
from server.watch import DirectoryWatch

logger = logging.getLogger(__name__)

CHANGING_THREADS = 2
MAX_UPLOADS = 4
"""Received at once; more wait."""
READ_AT_START_S = 2.0
"""So long the start reads checkpoints that are new; the rest are read while it serves."""
REST_AFTER_READING = 4.0
"""While requests run, new checkpoints are read a fifth of the time."""
T = TypeVar("T")


class ForbiddenPath(Exception):
    """A path outside the directory from which adapters may be loaded."""


class Lifecycle:
    """The adapters of one server: store, directory watch, uploads."""

    def __init__(self, config: ServerConfig, busy: Callable[[], bool], wake: Callable[[], None]) -> None:
        """busy: whether requests run; wake: has the engine look at pins."""
        self._config = config
        self._busy = busy
        self._wake = wake
        self._catalog: AdapterCatalog | None = None
        self._threads = ThreadPoolExecutor(CHANGING_THREADS, "adapters")
        self._uploads = asyncio.Semaphore(MAX_UPLOADS)
        self.upload_threads = ThreadPoolExecutor(MAX_UPLOADS, "upload")
        """In which what is received is written."""
        self._tasks: list[asyncio.Task[None]] = []
        self._known: dict[str, str] = {}

    @property
    def catalog(self) -> AdapterCatalog:
        assert self._catalog is not None, "the engine is not ready"
        return self._catalog

    @property
    def registry(self) -> AdapterRegistry:
        return self.catalog.registry

    # Life

    def open(self, engine: Engine, base_name: str) -> None:
        """Serve what store and directory hold. Engine's thread, at start. Raises OSError, StoreInUse."""
        directory = Path(self._config.adapter_dir).expanduser() if self._config.adapter_dir else None
        if directory is not None and not directory.is_dir():
            raise FileNotFoundError(f"adapter_dir {self._config.adapter_dir!r} is not a directory")
        root = Path(self._config.store_dir).expanduser() if self._config.store_dir else state_dir() / base_name
        store = AdapterStore(root, self._config.keep_versions)
        catalog = AdapterCatalog(engine.registry, store, engine.base.layout, engine.limits, directory)
        if self._config.arena_cache_bytes:
            spare, pinned = engine.limits.max_adapter_bytes, engine.limits.pinned
            engine.registry.host.arenas = ArenaFiles(store.scratch, self._config.arena_cache_bytes, spare, pinned)
        try:
            self._known = catalog.open()
            self._read_new(catalog)
        except BaseException:
            store.close()
            raise
        self._catalog = catalog

    def begin(self) -> None:
        """Watch the directory, and read what the start left, from now on."""
        self._tasks.append(asyncio.create_task(self._read_rest()))
        if self.catalog.directory is not None:
            watch = DirectoryWatch(self.catalog.directory, self, self._known)
            self._tasks.append(asyncio.create_task(watch.run()))

    async def stop(self) -> None:
        """End watching, and what is being changed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._close)

    # Requests

    async def acquire(self, model: str) -> AdapterVersion:
        """Hold what `model`, a name, `name@digest-prefix` or a composition, means now. Waits for a first reading.

        Raises AdapterNotFound, AdapterRefused, VersionNotFound, InvalidComposition.
        """
        parts = parts_of(model)
        return await self._acquire_composed(model, parts) if parts else await self._acquire_one(model)

    async def _acquire_one(self, model: str) -> AdapterVersion:
        name, at, prefix = model.partition("@")
        await self._known_digest(name)
        if at:
            return self.registry.acquire_version(name, *self._find(name, prefix))
        return self.registry.acquire(name)

    async def _acquire_composed(self, model: str, parts: Parts) -> AdapterVersion:
        """Raises InvalidComposition too. Parts that lie on disk are read to be looked at."""
        held: list[tuple[AdapterVersion, float]] = []
        try:
            if len(parts) > MAX_PARTS:
                raise InvalidAdapter([f"at most {MAX_PARTS} adapters are composed"])
            for name, weight in parts:
                held.append((await self._acquire_one(name), weight))
            adapters = [await self._content(version) for version, _ in held]
            check_composition(adapters, [weight for _, weight in held], self.catalog.limits)
            return self.registry.acquire_composed(model, held)
        except InvalidAdapter as error:
            raise InvalidComposition(f"{model}: {error}") from error
        finally:
            for version, _ in held:
                self.registry.release(version)

    def look_up(self, model: str) -> Entry:
        """What `model` means now, without holding it; of a composition its first part. Raises as `acquire`."""
        model = names_in(model)[0]
        name, at, prefix = model.partition("@")
        entry = self.registry.get(name)
        return AdapterVersion(*self._find(name, prefix)) if at and isinstance(entry, AdapterVersion) else entry

    # Changes

    async def load(self, name: str, source: str, replace: bool = True) -> tuple[AdapterVersion, bool]:
        """Serve a copy of the checkpoint at `source` as `name`; False when it is served already.

        Raises ForbiddenPath, InvalidName, InvalidAdapter, AdapterExists.
        """
        self.registry.check_name(name)
        path = self.path_below_root(source)
        return await self._run(self.catalog.import_directory, name, path, replace)

    async def upload(self, name: str, receive: Callable[[Path], Awaitable[None]]) -> tuple[AdapterVersion, bool]:
        """Serve as `name` what `receive` writes into the directory that it is given; False when it is served already.

        Raises InvalidName, InvalidAdapter, and what `receive` raises.
        """
        self.registry.check_name(name)
        async with self._uploads:
            staged = await self._run(self.catalog.store.stage)
            try:
                await receive(staged)
            except BaseException:
                self._threads.submit(self.catalog.store.discard, staged)
                raise
            return await self._run(self.catalog.publish, name, staged)

    async def remove(self, name: str) -> tuple[str | None, int]:
        """Stop serving `name` at once; its digest, and the bytes freed when the last running request has ended.

        Raises AdapterNotFound.
        """
        entry, drained = await self.begin_to_remove(name)
        freed = await asyncio.shield(asyncio.wrap_future(drained))
        return entry.info.digest or None if entry is not None else None, freed

    async def begin_to_remove(self, name: str) -> tuple[Entry | None, Future[int]]:
        """As `remove`, without waiting for the running requests."""
        removed = await self._run(self.catalog.remove, name)
        removed[1].add_done_callback(lambda _: self._collect_later())
        return removed

    async def rollback(self, name: str, digest: str) -> AdapterVersion:
        """An earlier version becomes current. Raises AdapterNotFound, VersionNotFound."""
        return await self._run(self.catalog.rollback, name, digest)

    async def pin(self, name: str, pinned: bool) -> None:
        """Keep it on the device, or no more. Raises AdapterNotFound, AdapterRefused, TooManyPins."""
        await self._known_digest(name)
        await self._run(self.catalog.pin, name, pinned)
        self._wake()

    async def describe(self, name: str) -> tuple[AdapterVersion, Report]:
        """The current version, and what it is to the base. Raises AdapterNotFound, AdapterRefused."""
        await self._known_digest(name)
        version = self.registry.current(name)
        return version, describe(await self._content(version), self.catalog.limits)

    async def _content(self, version: AdapterVersion) -> Adapter:
        """Read apart, where it lies on disk."""
        adapter = version.adapter
        return await self._run(self.catalog.read, version) if adapter is None else adapter

    async def versions(self, name: str) -> list[StoredVersion]:
        return await self._run(self.catalog.versions, name)

    def path_below_root(self, source: str) -> Path:
        """A directory below the configured root. Raises ForbiddenPath, without telling what is where."""
        root = self._config.root
        if root is None:
            raise ForbiddenPath("no directory is configured from which adapters may be loaded (--adapter-root)")
        try:
            path = (root / source).resolve()
            below = path.is_relative_to(root)
            if below:
                (path / CONFIG_FILE).exists()  # some systems take a name that is too long until it is looked up
        except (OSError, ValueError, RuntimeError) as error:
            raise ForbiddenPath(f"{source[:200]!r} is no path") from error
        if not below:
            raise ForbiddenPath(f"{source[:200]!r} is not below the directory from which adapters may be loaded")
        return path

    # What the watch tells

    async def changed(self, name: str, signature: str) -> None:
        await self._run(self.catalog.changed, name, signature)

    async def gone(self, name: str) -> None:
        await self._run(self.catalog.gone, name)

    async def broken(self, name: str, reasons: Sequence[str]) -> None:
        await self._run(self.catalog.broken, name, None, reasons)

    # Inside

    async def _known_digest(self, name: str) -> None:
        """Until what `name` points at has been read once. Raises AdapterNotFound, AdapterRefused."""
        while (reading := self.registry.read_first(name)) is not None:
            await asyncio.shield(asyncio.wrap_future(reading))

    def _find(self, name: str, prefix: str) -> tuple[AdapterInfo, Source | None]:
        if not prefix:
            raise VersionNotFound(name, prefix, 0)
        return self.catalog.find(name, prefix)

    def _read_new(self, catalog: AdapterCatalog) -> None:
        deadline = time.monotonic() + READ_AT_START_S
        names = catalog.unread()
        for count, name in enumerate(names):
            if time.monotonic() > deadline:
                logger.info("%d more adapters are read while it serves", len(names) - count)
                return
            reading = catalog.registry.read_first(name)
            if reading is not None:
                reading.result()
            self._tell(catalog, name)
        catalog.store.flush()

    async def _read_rest(self) -> None:
        """Read what is new on the disk, in the background: its digest, or what is wrong with it."""
        for name in self.catalog.unread():
            started = time.monotonic()
            try:
                reading = self.registry.read_first(name)
            except AdapterError:
                continue  # it is gone meanwhile
            if reading is not None:
                await asyncio.shield(asyncio.wrap_future(reading))
                await self._run(self._tell, self.catalog, name)
            if self._busy():
                await asyncio.sleep(REST_AFTER_READING * (time.monotonic() - started))
        await self._run(self.catalog.store.flush)

    def _tell(self, catalog: AdapterCatalog, name: str) -> None:
        catalog.remember(name)
        try:
            catalog.registry.get(name)
        except AdapterNotFound:
            pass
        except InvalidAdapter as error:
            logger.warning("%s", error)

    def _collect_later(self) -> None:
        try:
            self._threads.submit(self.catalog.collect)
        except RuntimeError:  # it is stopping: the next start collects
            logger.debug("no versions are collected any more")

    def _run(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """In a thread. A change that has begun ends, also when nobody waits for it any more."""
        return asyncio.shield(asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments))

    def _close(self) -> None:
        self.upload_threads.shutdown()
        self._threads.shutdown()
        if self._catalog is not None:
            self._catalog.registry.host.close()
            self._catalog.store.close()

"""AdapterCatalog: everything that changes which content a name has, on disk first and then for new requests.

Adapters come from two places: the store, into which uploads and imports go, and a directory that an operator fills.
What came last under a name counts: an upload hides the directory of its name as that is then, and a directory that
changes later is served again. Knows nothing of HTTP. Every method blocks on the disk, and may be called from any
thread; changes happen one after another.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from adapters.adapter import Adapter, AdapterInfo, Limits
from adapters.checkpoint import CONFIG_FILE, MAX_JSON_BYTES, WEIGHTS_FILE, read_checkpoint
from adapters.composition import Composed, compose, composed_source
from adapters.directory import CHECKPOINT_FILES, scan, signature_of
from adapters.errors import AdapterError, AdapterNotFound, InvalidAdapter, InvalidName, VersionNotFound
from adapters.layout import BaseLayout
from adapters.registry import AdapterRegistry, Entry, is_name
from adapters.store import AdapterStore, StoredVersion
from adapters.tokenizer_files import TOKENIZER_FILES
from adapters.version import AdapterVersion, Source, UnreadAdapter

logger = logging.getLogger(__name__)

CHANGING = "its files changed while they were read"


def reader(layout: BaseLayout, limits: Limits) -> Callable[[Source], Adapter]:
    """What reads a source for this base: Source -> Adapter. Raises InvalidAdapter."""

    def read(source: Source) -> Adapter:
        if isinstance(source, Composed):
            return _compose(source)
        if source.signature is not None and signature_of(source.path) != source.signature:
            raise InvalidAdapter([CHANGING])
        adapter = read_checkpoint(source.path, layout, limits, source.known)
        if source.signature is not None and signature_of(source.path) != source.signature:
            raise InvalidAdapter([CHANGING])
        return adapter

    def _compose(source: Composed) -> Adapter:
        versions, weights = zip(*source.parts, strict=True)
        adapters = [read_version(version) for version in versions]
        return compose(adapters, weights, composed_source(source.parts)[0], limits)

    def read_version(version: AdapterVersion) -> Adapter:
        adapter, known = version.adapter, version.source
        if adapter is not None:
            return adapter
        if known is None:
            raise InvalidAdapter([f"the files of {version.digest[:12]} are there no more"])
        return read(known)

    return read


class AdapterCatalog:
    """Store, directory and registry of one base."""

    def __init__(
        self,
        registry: AdapterRegistry,
        store: AdapterStore,
        layout: BaseLayout,
        limits: Limits,
        directory: Path | None = None,
    ) -> None:
        self.registry = registry
        self.store = store
        self.directory = directory
        self._read = reader(layout, limits)
        self._layout = layout
        self.limits = limits
        """Under which it reads checkpoints."""
        self._changes = threading.Lock()
        """Held while a name moves on disk and in memory, so that both move in the same order."""
        self._from_directory: dict[str, str] = {}
        """Name -> signature, where the directory's checkpoint is what the name points at, or is refused."""

    # At start

    def open(self) -> dict[str, str]:
        """Serve what store and directory hold, reading no weights; the directory's names and signatures."""
        for name, info in self.store.names().items():
            self.registry.add(name, info, Source(self.store.path(info.digest)))
        found = scan(self.directory) if self.directory else {}
        hidden, remembered = self.store.hidden(), self.store.remembered()
        for name, signature in sorted(found.items()):
            if hidden.get(name) == signature:
                continue
            seen = remembered.get(name)
            self._serve_found(name, signature, seen[1] if seen and seen[0] == signature else None)
        for name in self.store.pins():
            self._pin_if_there(name)
        return found

    def unread(self) -> list[str]:
        """Names whose content was not read yet."""
        return [name for name, entry in self.registry.list() if isinstance(entry, UnreadAdapter)]

    def remember(self, name: str) -> None:
        """Note what the first reading of the directory's checkpoint gave, so that the next start need not read it."""
        with self._changes:
            signature = self._from_directory.get(name)
            if signature is None:
                return
            entry, reasons = self._entry(name), self.registry.refused().get(name)
            if isinstance(entry, AdapterVersion):
                self.store.remember(name, signature, entry.info)
            elif entry is None and reasons is not None:
                self.store.remember(name, signature, reasons)

    # Through the API

    def publish(self, name: str, staged: Path, replace: bool = True) -> tuple[AdapterVersion, bool]:
        """Serve the checkpoint in `staged`, a directory from `store.stage`, as `name`; False when it is served already.

        Durable when it returns. Raises InvalidName, InvalidAdapter, AdapterExists; `staged` is gone in every case.
        """
        try:
            self.registry.check_name(name)
            adapter = read_checkpoint(staged, self._layout, self.limits)
            with self._changes:
                current = self._entry(name)
                if isinstance(current, AdapterVersion) and current.digest == adapter.info.digest:
                    return current, False
                self.registry.check_replaceable(name, replace)
                self.store.commit(name, staged, adapter.info)
                self._hide_directory(name)
                source = Source(self.store.path(adapter.info.digest))
                version, created = self.registry.put(name, adapter, source=source)
                self.collect()
        finally:
            self.store.discard(staged)
        _tell(name, version)
        return version, created

    def import_directory(self, name: str, path: Path, replace: bool = True) -> tuple[AdapterVersion, bool]:
        """As `publish`, of a copy of the checkpoint at `path`."""
        self.registry.check_name(name)
        staged = self.store.stage()
        try:
            files = [path / file for file in CHECKPOINT_FILES if (path / file).exists()]
            usable = {file.name: file.stat().st_size for file in files if file.is_file()}
            largest = {**TOKENIZER_FILES, WEIGHTS_FILE: self.limits.max_adapter_bytes}
            fits = all(usable.get(file, 0) <= limit for file, limit in largest.items())
            if len(usable) < len(files) or not {CONFIG_FILE, WEIGHTS_FILE} <= usable.keys() or not fits:
                read_checkpoint(path, self._layout, self.limits)  # raises, with the reasons
            for file in files:
                shutil.copyfile(file, staged / file.name)
        except BaseException:
            self.store.discard(staged)
            raise
        return self.publish(name, staged, replace)

    def remove(self, name: str) -> tuple[Entry | None, Future[int]]:
        """Stop serving `name`, also after a restart. Raises AdapterNotFound.

        The future has the bytes freed in host memory, when the last running request has ended.
        """
        with self._changes:
            if self._entry(name) is None and name not in self.registry.refused():
                raise AdapterNotFound(name)
            self._hide_directory(name)
            self.store.remove(name)
            entry, drained = self.registry.remove(name)
            self.collect()
        logger.info("adapter %s is removed", name)
        return entry, drained

    def rollback(self, name: str, digest: str) -> AdapterVersion:
        """The version whose digest begins so becomes current. Raises AdapterNotFound, VersionNotFound."""
        with self._changes:
            self.registry.get(name)
            info = self.find(name, digest)[0]
            current = self._entry(name)
            if isinstance(current, AdapterVersion) and current.digest == info.digest:
                return current
            self.store.point(name, info.digest)
            self._hide_directory(name)
            version = self.registry.add(name, info, Source(self.store.path(info.digest)))
        logger.info("adapter %s is rolled back to %s", name, info.digest[:12])
        return version

    def pin(self, name: str, pinned: bool) -> None:
        """Keep it on the device, also after a restart, or no more. Raises AdapterNotFound, TooManyPins."""
        with self._changes:
            self.registry.pin(name, pinned)
            self.store.set_pin(name, pinned)

    def versions(self, name: str) -> list[StoredVersion]:
        """Those kept in the store, the most recently put first."""
        return self.store.versions(name)

    def read(self, version: AdapterVersion) -> Adapter:
        """Its content from the disk, beside the tiers. Raises InvalidAdapter."""
        if version.source is None:
            raise InvalidAdapter(["its files are there no more"])
        return self._read(version.source)

    def find(self, name: str, prefix: str) -> tuple[AdapterInfo, Source | None]:
        """The version of `name` whose digest begins with `prefix`, the current one before others.

        Without a source it is in memory only. Raises AdapterNotFound, VersionNotFound.
        """
        entry = self._entry(name)
        if isinstance(entry, AdapterVersion) and entry.digest.startswith(prefix):
            return entry.info, entry.source  # it may be the directory's, which the store does not have
        try:
            info = self.store.find(name, prefix)
        except AdapterNotFound:
            if entry is None:
                raise
            raise VersionNotFound(name, prefix, 0) from None
        return info, Source(self.store.path(info.digest))

    def collect(self) -> None:
        """Delete the files of versions that no history keeps and nobody holds, and arena files of unknown ones."""
        self.store.collect(self.registry.in_use)
        self.registry.host.forget_files(self.registry.in_use)

    # In the directory

    def changed(self, name: str, signature: str) -> None:
        """The directory has a complete checkpoint of this name, new or other than before."""
        path = self._path(name)
        try:
            self.registry.check_name(name)
            adapter = self._read(Source(path, signature))
        except InvalidAdapter as error:
            self.broken(name, signature, error.reasons)
            return
        except InvalidName as error:
            self.broken(name, signature, (str(error),))
            return
        with self._changes:
            if self.store.hidden().get(name) == signature:
                return
            version, created = self.registry.put(name, adapter, source=Source(path, signature))
            self._from_directory[name] = signature
            self.store.remember(name, signature, version.info)
            self.collect()
        if created:
            _tell(name, version)

    def broken(self, name: str, signature: str | None, reasons: Sequence[str]) -> None:
        """The directory's checkpoint, with this signature or as it is now, cannot be served.

        What was served from it before stays while it is in memory.
        """
        signature = signature or signature_of(self._path(name)) or ""
        with self._changes:
            if self.store.hidden().get(name) == signature:
                return
            if name in self._from_directory:
                self.registry.lose_source(name, self._path(name))
            self._from_directory[name] = signature
            self.registry.refuse(name, reasons)
            if is_name(name):
                self.store.remember(name, signature, tuple(reasons))
            self.collect()
        logger.warning("adapter %s is refused: %s", name, "; ".join(reasons))

    def gone(self, name: str) -> None:
        """The directory has no checkpoint of this name any more."""
        with self._changes:
            self.store.forget(name)
            self.store.unhide(name)
            if self._from_directory.pop(name, None) is None:
                return
            with suppress(AdapterNotFound):
                self.registry.remove(name)
            stored = self.store.current(name)
            if stored is not None:
                self.registry.add(name, stored, Source(self.store.path(stored.digest)))
            self.collect()
        logger.info("adapter %s has left the directory", name)

    # Inside

    def _serve_found(self, name: str, signature: str, seen: AdapterInfo | tuple[str, ...] | None) -> None:
        """One of the directory's checkpoints, of which `seen` is known, or nothing."""
        source = Source(self._path(name), signature)
        self._from_directory[name] = signature
        try:
            if isinstance(seen, AdapterInfo):
                self.registry.add(name, seen, source)
            elif seen is not None:
                self.registry.check_name(name)
                self.registry.refuse(name, seen)
            else:
                self.registry.add_unread(name, described(source.path), source)
        except AdapterError as error:
            self.registry.refuse(name, getattr(error, "reasons", (str(error),)))
            logger.warning("adapter %s is refused: %s", name, error)

    def _pin_if_there(self, name: str) -> None:
        try:
            self.registry.pin(name, True)
        except AdapterError as error:
            logger.warning("adapter %s was pinned, but is not now: %s", name, error)

    def _hide_directory(self, name: str) -> None:
        """What the directory has under this name now counts no more."""
        self._from_directory.pop(name, None)
        signature = signature_of(self._path(name)) if self.directory else None
        if signature is not None:
            self.store.hide(name, signature)

    def _path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / name

    def _entry(self, name: str) -> Entry | None:
        try:
            return self.registry.get(name)
        except AdapterError:
            return None


def _tell(name: str, version: AdapterVersion) -> None:
    logger.info("adapter %s is now %s (%s)", name, version.digest[:12], version.info.task_type)


def described(path: Path) -> AdapterInfo:
    """What can be said of a checkpoint from its config alone; nothing where that is broken."""
    try:
        config = json.loads((path / CONFIG_FILE).read_bytes()[:MAX_JSON_BYTES])
        size = (path / WEIGHTS_FILE).stat().st_size
        task, rank = config.get("task_type"), config.get("r")
    except (OSError, ValueError, AttributeError, RecursionError):
        task, rank, size = None, None, 0
    return AdapterInfo("", task if isinstance(task, str) else "", rank if isinstance(rank, int) else 0, (), "", size)

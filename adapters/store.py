"""AdapterStore: a directory that belongs to one server: names, their versions, which one is current, pins.

What is known of a version lies in one SQLite file, its files lie in a directory named by its digest. Whenever the
process or the machine stops, the next open finds every change either made or not made: a directory is in place before
the row that speaks of it and outlives it, so that a stop in between leaves a directory without a row, which the next
open removes. Knows nothing of HTTP, of requests or of tensors: a version is files and an AdapterInfo.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from adapters.adapter import AdapterInfo
from adapters.database import Database
from adapters.errors import AdapterNotFound, StoreInUse, VersionNotFound
from adapters.version_files import find_faults, sync_directory, sync_files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SCHEMA_VERSION = 1
SCHEMA = (
    "CREATE TABLE version (digest TEXT PRIMARY KEY, info TEXT NOT NULL, files TEXT NOT NULL)",
    "CREATE TABLE history (number INTEGER PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL REFERENCES version, "
    "put_at REAL NOT NULL, UNIQUE (name, digest))",
    "CREATE INDEX history_digest ON history (digest)",
    "CREATE TABLE name (name TEXT PRIMARY KEY, digest TEXT NOT NULL, "
    "FOREIGN KEY (name, digest) REFERENCES history (name, digest))",
    "CREATE TABLE pin (name TEXT PRIMARY KEY)",
    "CREATE TABLE hidden (name TEXT PRIMARY KEY, signature TEXT NOT NULL)",
    "CREATE TABLE remembered (name TEXT PRIMARY KEY, signature TEXT NOT NULL, outcome TEXT NOT NULL)",
)
UNWANTED = "SELECT digest, files FROM version WHERE digest NOT IN (SELECT digest FROM history)"
TRIM = """DELETE FROM history WHERE name = :name AND digest != :current AND number NOT IN (
    SELECT number FROM history WHERE name = :name AND digest != :current ORDER BY number DESC LIMIT :others)"""
MAX_UNSAVED = 256
"""Entries of the cache that wait to be written together."""
Outcome = AdapterInfo | tuple[str, ...]


@dataclass(frozen=True)
class StoredVersion:
    """One entry of a name's history."""

    info: AdapterInfo
    put_at: float
    """Unix time."""


class AdapterStore:
    """Any thread may call any method. All but `path` use the disk, and wait while another thread makes a change.

    They raise OSError when the disk or the database fails; then the change is not made.
    """

    def __init__(self, root: Path, keep_versions: int) -> None:
        """Create or open, and remove what a crash left. `keep_versions` (1 or more) is per name, the current included.

        Raises StoreInUse, OSError.
        """
        assert keep_versions >= 1
        self._others = keep_versions - 1
        self._versions, self._incoming = root / "versions", root / "incoming"
        self.scratch = root / "scratch"
        """A directory for files that this process alone uses; empty at first, and gone with it."""
        self._unsaved: dict[str, tuple[str, Outcome] | None] = {}
        root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            _lock_file(opened.enter_context((root / "LOCK").open("a")), root)
            for directory in (self._versions, self._incoming, self.scratch):  # whoever closes it removes one of them
                directory.mkdir(exist_ok=True)
            opened.callback(shutil.rmtree, self.scratch, ignore_errors=True)
            self._database = opened.enter_context(closing(Database(root / "store.db", SCHEMA, SCHEMA_VERSION)))
            self._recover()
            sync_directory(root)
            sync_directory(root.parent)
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Let another process open it. Nothing else may be called afterwards."""
        with self._database.lock, self._opened:
            self.flush()

    def stage(self) -> Path:
        """A new empty directory for `commit` or `discard`."""
        staged = self._incoming / secrets.token_hex(16)
        staged.mkdir()
        return staged

    def discard(self, staged: Path) -> None:
        """Remove what `stage` gave, if it is still there. What cannot be removed now is removed at the next open."""
        assert staged.parent == self._incoming
        shutil.rmtree(staged, ignore_errors=True)

    def commit(self, name: str, staged: Path, info: AdapterInfo) -> None:
        """Point `name` at `info.digest`, whose files are those of `staged`; on the disk when it returns.

        A version that is there already stays as it is, and `staged` is thrown away. When it raises, `staged` is left.
        """
        files = json.dumps(sync_files(staged))
        target = self.path(info.digest)
        with self._database.lock:
            new = not (self._has_version(info.digest) and target.is_dir())
            try:
                if new:
                    os.rename(staged, target)
                    sync_directory(self._versions)
                self._put(name, info, files if new else None)
            except BaseException:
                if new and not staged.exists() and not self._has_version(info.digest):
                    os.rename(target, staged)
                raise
        if not new:
            self.discard(staged)

    def point(self, name: str, digest: str) -> AdapterInfo:
        """Make a version of the name's history its current one. Raises AdapterNotFound, VersionNotFound."""
        with self._database.transaction() as connection:
            info = self.find(name, digest)
            connection.execute("UPDATE name SET digest = ? WHERE name = ?", (info.digest, name))
            connection.execute(TRIM, {"name": name, "current": info.digest, "others": self._others})
        return info

    def remove(self, name: str) -> None:
        """Forget the name, its history and its pin, if there are any."""
        with self._database.transaction() as connection:
            for table in ("name", "history", "pin"):
                connection.execute(f"DELETE FROM {table} WHERE name = ?", (name,))

    def names(self) -> dict[str, AdapterInfo]:
        """Name -> current version, by name."""
        rows = self._database.run("SELECT name, info FROM name JOIN version USING (digest) ORDER BY name")
        return {name: _info(json.loads(text)) for name, text in rows}

    def current(self, name: str) -> AdapterInfo | None:
        """The version that the name points at."""
        rows = self._database.run("SELECT info FROM name JOIN version USING (digest) WHERE name = ?", (name,))
        return _info(json.loads(rows[0][0])) if rows else None

    def versions(self, name: str) -> list[StoredVersion]:
        """The name's history, the most recently put first; empty when the name is unknown."""
        rows = self._database.run(
            "SELECT info, put_at FROM history JOIN version USING (digest) WHERE name = ? ORDER BY number DESC", (name,)
        )
        return [StoredVersion(_info(json.loads(text)), put_at) for text, put_at in rows]

    def find(self, name: str, prefix: str) -> AdapterInfo:
        """The one version of the name whose digest begins so. Raises AdapterNotFound, VersionNotFound."""
        versions = self.versions(name)
        if not versions:
            raise AdapterNotFound(name)
        found = [version.info for version in versions if version.info.digest.startswith(prefix)]
        if len(found) != 1:
            raise VersionNotFound(name, prefix, len(found))
        return found[0]

    def path(self, digest: str) -> Path:
        """Where the version's files lie, until `collect` finds it held by nothing."""
        return self._versions / digest

    def set_pin(self, name: str, pinned: bool) -> None:
        """Pin or unpin a name, in this store or not."""
        statement = "INSERT OR IGNORE INTO pin VALUES (?)" if pinned else "DELETE FROM pin WHERE name = ?"
        self._database.run(statement, (name,))

    def pins(self) -> frozenset[str]:
        """The names that are pinned."""
        return frozenset(name for (name,) in self._database.run("SELECT name FROM pin"))

    def hide(self, name: str, signature: str) -> None:
        """The watched directory of this name is not to be served while it has this signature."""
        self._database.run("INSERT OR REPLACE INTO hidden VALUES (?, ?)", (name, signature))

    def unhide(self, name: str) -> None:
        """The watched directory of this name may be served again, whatever its signature."""
        self._database.run("DELETE FROM hidden WHERE name = ?", (name,))

    def hidden(self) -> dict[str, str]:
        """Name -> signature, of what is hidden."""
        return dict(self._database.run("SELECT name, signature FROM hidden"))

    def remember(self, name: str, signature: str, outcome: Outcome) -> None:
        """What reading the watched directory with this signature gave: its info, or why it was refused.

        A cache: many are written together (`flush`), so that a crash may lose the last ones.
        """
        self._note(name, (signature, outcome))

    def forget(self, name: str) -> None:
        """Undo `remember`; a crash may lose it likewise."""
        self._note(name, None)

    def remembered(self) -> dict[str, tuple[str, Outcome]]:
        """Name -> signature and outcome."""
        self.flush()
        rows = self._database.run("SELECT name, signature, outcome FROM remembered")
        return {name: (signature, _outcome(json.loads(text))) for name, signature, text in rows}

    def flush(self) -> None:
        """Write what `remember` and `forget` were told."""
        with self._database.lock:
            if not self._unsaved:
                return
            with self._database.transaction() as connection:
                for name, entry in self._unsaved.items():
                    connection.execute("DELETE FROM remembered WHERE name = ?", (name,))
                    if entry is not None:
                        row = (name, entry[0], _text(entry[1]))
                        connection.execute("INSERT INTO remembered VALUES (?, ?, ?)", row)
            self._unsaved.clear()

    def collect(self, in_use: Callable[[str], bool]) -> int:
        """Remove the versions that no history holds and for whose digest `in_use` is false; bytes freed.

        `in_use` is called without the store's lock. For a version that no history holds it may not turn true again.
        """
        unused = [digest for digest, _ in self._database.run(UNWANTED) if not in_use(digest)]
        with self._database.lock:
            with self._database.transaction() as connection:
                files = dict(connection.execute(UNWANTED))  # asked again: another thread may have put one of them
                gone = [digest for digest in unused if digest in files]
                connection.executemany("DELETE FROM version WHERE digest = ?", [(digest,) for digest in gone])
            trash = [self._withdraw(digest) for digest in gone]
        for directory in trash:
            self.discard(directory)
        return sum(size for digest in gone for size, _ in json.loads(files[digest]).values())

    def audit(self) -> list[str]:
        """Every fault found; reads all files, and everything else waits meanwhile."""
        with self._database.lock:
            faults = self._database.faults()
            rows = dict(self._database.run("SELECT digest, files FROM version"))
            for name, digest in self._database.run("SELECT name, digest FROM name"):
                if digest not in rows:
                    faults.append(f"{name} points at {digest}, which is no version")
            for digest, files in rows.items():
                faults += find_faults(self.path(digest), json.loads(files))
            strays = {path.name for path in self._versions.iterdir()} - rows.keys()
            return faults + [f"versions/{stray} belongs to no version" for stray in sorted(strays)]

    def _recover(self) -> None:
        for directory in (self._incoming, self.scratch):
            shutil.rmtree(directory)
            directory.mkdir()
        self._database.run("DELETE FROM version WHERE digest NOT IN (SELECT digest FROM history)")
        known = {digest for (digest,) in self._database.run("SELECT digest FROM version")}
        for path in self._versions.iterdir():
            if path.is_dir() and path.name not in known:
                shutil.rmtree(path)

    def _put(self, name: str, info: AdapterInfo, files: str | None) -> None:
        """The rows of `commit`; `files` is None for a version that is there."""
        with self._database.transaction() as connection:
            if files is not None:
                connection.execute(
                    "INSERT INTO version VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET files = excluded.files",
                    (info.digest, _text(info), files),
                )
            connection.execute(
                "INSERT OR REPLACE INTO history (name, digest, put_at) VALUES (?, ?, ?)",
                (name, info.digest, time.time()),
            )
            connection.execute("INSERT OR REPLACE INTO name VALUES (?, ?)", (name, info.digest))
            connection.execute(TRIM, {"name": name, "current": info.digest, "others": self._others})

    def _has_version(self, digest: str) -> bool:
        return bool(self._database.run("SELECT 1 FROM version WHERE digest = ?", (digest,)))

    def _note(self, name: str, entry: tuple[str, Outcome] | None) -> None:
        with self._database.lock:
            self._unsaved[name] = entry
            if len(self._unsaved) >= MAX_UNSAVED:
                self.flush()

    def _withdraw(self, digest: str) -> Path:
        """Take the version's directory away from its place, to be removed at leisure."""
        trash = self._incoming / secrets.token_hex(16)
        with suppress(FileNotFoundError):
            os.rename(self.path(digest), trash)
        return trash


def _lock_file(handle: IO[str], root: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreInUse(f"{root} is in use by another server") from None


def _text(outcome: Outcome) -> str:
    return json.dumps(asdict(outcome) if isinstance(outcome, AdapterInfo) else outcome)


def _info(fields: dict[str, Any]) -> AdapterInfo:
    return AdapterInfo(**{**fields, "labels": tuple(fields["labels"])})


def _outcome(loaded: Any) -> Outcome:
    return tuple(loaded) if isinstance(loaded, list) else _info(loaded)

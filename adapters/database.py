"""Database: one SQLite file, one connection, one lock; every change is on the disk when it returns.

Knows nothing of what lies in it. Whatever SQLite raises comes out as an OSError that names the file.
"""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Database:
    """Any thread may call any method; one that holds `lock` keeps the others out between its calls too."""

    def __init__(self, file: Path, schema: Sequence[str], version: int) -> None:
        """Open, or create with `schema`. Raises OSError, also when the file has another `version` of the schema."""
        self.lock = threading.RLock()
        self._file = file
        self._connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(schema, version)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Nothing may be called afterwards but this."""
        with self.lock:
            self._connection.close()

    def run(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """One statement, which is a transaction by itself; its rows."""
        with self.lock, self._as_os_error():
            return self._connection.execute(statement, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Several statements: all of them or, when anything raises, none. `run` may be called inside it."""
        with self.lock, self._as_os_error(), self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    def faults(self) -> list[str]:
        """What SQLite finds wrong with the file, and references to rows that do not exist."""
        found = self.run("PRAGMA integrity_check") + self.run("PRAGMA foreign_key_check")
        return [f"{self._file.name}: {fault}" for fault in found if fault != ("ok",)]

    def _prepare(self, schema: Sequence[str], version: int) -> None:
        # FULL syncs the truncation of the journal, which is the commit; the deletion of a journal it would not sync.
        self.run("PRAGMA journal_mode = TRUNCATE")
        self.run("PRAGMA synchronous = FULL")
        self.run("PRAGMA foreign_keys = ON")
        [(found,)] = self.run("PRAGMA user_version")
        if found not in (0, version):
            raise OSError(errno.EINVAL, f"has schema {found}, but this release knows {version}", str(self._file))
        if found == 0:
            with self.transaction() as connection:
                for statement in schema:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {version}")

    @contextmanager
    def _as_os_error(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(self._file)) from error

"""The files of one version: brought to the disk and described; compared with their description later.

Knows nothing of names or of the database, nor of what the files hold.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

Files = dict[str, tuple[int, str]]
"""File name -> bytes, sha256."""


def sync_files(directory: Path) -> Files:
    """Wait until every file of `directory` is on the disk under its name; what they are.

    Raises OSError, also when there is anything but files.
    """
    files = {path.name: _sync_file(path) for path in sorted(directory.iterdir())}
    sync_directory(directory)
    return files


def sync_directory(directory: Path) -> None:
    """Wait until the names in `directory` are on the disk."""
    if os.name == "nt":  # which opens no directories
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_faults(directory: Path, files: Mapping[str, tuple[int, str]]) -> list[str]:
    """How `directory` differs from `files`; reads everything."""
    if not directory.is_dir():
        return [f"{directory.name} has no directory"]
    found = {path.name for path in directory.iterdir()}
    faults = [f"{directory.name} has an unknown file {name}" for name in sorted(found - files.keys())]
    for name, (size, sha256) in files.items():
        path = directory / name
        if name not in found:
            faults.append(f"{directory.name} lacks {name}")
        elif path.stat().st_size != size:
            faults.append(f"{directory.name} has {name} of another size")
        elif _sha256(path) != sha256:
            faults.append(f"{directory.name} has {name} of another content")
    return faults


def _sync_file(path: Path) -> tuple[int, str]:
    with path.open("r+b") as handle:  # Windows syncs only what is open for writing
        os.fsync(handle.fileno())
    return path.stat().st_size, _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

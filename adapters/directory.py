"""The directory that an operator fills: one PEFT checkpoint a subdirectory. What lies there, told without reading it.

Knows nothing of tensors or of what is served. Nothing here raises because files come and go meanwhile.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from adapters.checkpoint import CONFIG_FILE, LABELS_FILE, MAX_JSON_BYTES, MODEL_CONFIG_FILE, WEIGHTS_FILE
from adapters.tokenizer_files import TEMPLATE_FILE, TOKENIZER_FILES

CHECKPOINT_FILES = (CONFIG_FILE, WEIGHTS_FILE, LABELS_FILE, MODEL_CONFIG_FILE, *TOKENIZER_FILES)
MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EACCES)
"""What may not be looked into is no checkpoint of ours: `lost+found`, which lies in many volumes."""


def signature_of(path: Path) -> str | None:
    """Size, mtime and inode of the checkpoint's files, as one word; None when neither config nor weights are there.

    It changes when a file is written, replaced or removed, or when a link on the way leads elsewhere.
    """
    return _signature(os.fspath(path))


def scan(root: Path) -> dict[str, str]:
    """Name -> signature, of every subdirectory with one; hidden ones are left out. Raises OSError for `root` itself."""
    found = {}
    with os.scandir(root) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                signature = _signature(entry.path)
                if signature is not None:
                    found[entry.name] = signature
    return found


def unfinished(path: Path) -> str | None:
    """Why the checkpoint is not complete yet; None when it looks complete. Reads JSON and the weights' header only."""
    try:
        labels = LABELS_FILE if (path / LABELS_FILE).is_file() else MODEL_CONFIG_FILE
        for file in (CONFIG_FILE, labels):
            if (path / file).is_file():
                fault = _json_fault(path / file)
            else:
                fault = f"{file} is missing" if file == CONFIG_FILE else None
            if fault is not None:
                return fault
        for file in TOKENIZER_FILES.keys() - {TEMPLATE_FILE}:
            if (path / file).is_file() and not _ends_as_an_object(path / file):
                return f"{file} ends too early"
        if not (path / WEIGHTS_FILE).is_file():
            return f"{WEIGHTS_FILE} is missing"
        with (path / WEIGHTS_FILE).open("rb") as handle:
            return _weights_fault(handle)
    except OSError as error:
        return f"its files cannot be read: {error.strerror}"


def _signature(directory: str) -> str | None:
    config, weights = _state(directory, CONFIG_FILE), _state(directory, WEIGHTS_FILE)
    if not config and not weights:
        return None
    tokenizer = [state for file in TOKENIZER_FILES if (state := _state(directory, file))]
    return "-".join((config, weights, _state(directory, LABELS_FILE), _state(directory, MODEL_CONFIG_FILE), *tokenizer))


def _state(directory: str, file: str) -> str:
    """One file's part of the signature; empty when there is no such file."""
    try:
        found = os.stat(f"{directory}{os.sep}{file}")
    except OSError as error:
        return "" if error.errno in ABSENT else f"error{error.errno}"
    if not stat.S_ISREG(found.st_mode):
        return ""
    return f"{found.st_size:x}.{found.st_mtime_ns:x}.{found.st_ino:x}"


def _json_fault(file: Path) -> str | None:
    with file.open("rb") as handle:
        content = handle.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:  # waiting makes it no better: reading it will tell
        return None
    try:
        json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"{file.name} is not JSON: {error}"
    return None


def _ends_as_an_object(file: Path) -> bool:
    """A tokenizer may be too large to be parsed each time that it is looked at."""
    with file.open("rb") as handle:
        handle.seek(max(os.fstat(handle.fileno()).st_size - 16, 0))
        return handle.read().rstrip().endswith(b"}")


def _weights_fault(handle: IO[bytes]) -> str | None:
    """A safetensors file is 8 bytes with the header's length, the header, and the tensors."""
    size = os.fstat(handle.fileno()).st_size
    length = int.from_bytes(handle.read(8), "little")
    if length > MAX_HEADER_BYTES:
        return f"{WEIGHTS_FILE} claims a header of {length} bytes, at most {MAX_HEADER_BYTES} are read"
    if size < 8 + length:
        return f"{WEIGHTS_FILE} ends within its header, after {size} bytes"
    try:
        expected = 8 + length + _end_of_tensors(json.loads(handle.read(length)))
    except (ValueError, RecursionError):
        return f"{WEIGHTS_FILE} has a header that is not JSON"
    return f"{WEIGHTS_FILE} has {size} of {expected} bytes" if size < expected else None


def _end_of_tensors(header: Any) -> int:
    """Where the last tensor ends, counted from the header's end; what makes no sense is left to who reads it."""
    end = 0
    for entry in header.values() if isinstance(header, dict) else ():
        match entry:
            case {"data_offsets": [_, int(last)]} if last < 1 << 63:
                end = max(end, last)
    return end

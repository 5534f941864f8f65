"""KeyFile: the file of the keys' hashes, and what is wrong with one.

Knows nothing of when it is read. A message never holds a hash, or a value of the file that could be a key pasted by
mistake: a name is told only when it is one, an unknown field's name never.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from server.caller import Caller, Right

KEY_PREFIX = "ml-"
MAX_FILE_BYTES = 1 << 20
MAX_REASONS = 100
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
HASH = re.compile(r"[0-9A-Fa-f]{64}")
LIKE_A_KEY = re.compile(rf"{KEY_PREFIX}[A-Za-z0-9_-]{{32,}}|[0-9A-Fa-f]{{64}}")
"""And yet like a name."""


class InvalidKeyFile(ValueError):
    """A key file that is not served from: the message has every reason, and no value of the file but valid names."""


class KeyEntry(BaseModel):
    """One key of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    name: str
    sha256: str = Field(repr=False)
    rights: list[Right] = Field(default=["infer"], min_length=1)
    adapters: list[Annotated[str, Field(min_length=1)]] = ["*"]
    requests_per_minute: int | None = Field(default=None, ge=1, le=10**9)
    queue_share: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise PydanticCustomError("name", "must be 1 to 64 letters, digits, dots, underscores or hyphens")
        if LIKE_A_KEY.fullmatch(value):
            raise PydanticCustomError("name", "must not look like a key or a hash")
        return value

    @field_validator("sha256")
    @classmethod
    def _is_a_hash(cls, value: str) -> str:
        if not HASH.fullmatch(value):
            raise PydanticCustomError("sha256", "must be the 64 hexadecimal digits of the key's SHA-256")
        if bytes.fromhex(value) == digest_of(""):
            raise PydanticCustomError("sha256", "must not be the SHA-256 of nothing")
        return value

    def caller(self) -> Caller:
        return Caller(
            self.name, frozenset(self.rights), tuple(self.adapters), self.queue_share, self.requests_per_minute
        )


class KeyFile(BaseModel):
    """The whole file. Without an entry it lets nobody in."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    keys: list[KeyEntry]


def digest_of(key: str) -> bytes:
    """SHA-256 of any text, also of what a header's bytes were decoded to."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def parse_keys(content: bytes, path: Path) -> KeyFile:
    """path: for the message. Raises InvalidKeyFile."""
    parsed, reasons = _parse(content)
    if parsed is None:  # raised here and not where it was caught: what validation raised holds the values
        rest = [f"and {len(reasons) - MAX_REASONS} more"] if len(reasons) > MAX_REASONS else []
        raise InvalidKeyFile(f"key file {path}: {'; '.join(reasons[:MAX_REASONS] + rest)}")
    return parsed


def _parse(content: bytes) -> tuple[KeyFile | None, list[str]]:
    """The file, or the reasons why it is none."""
    try:
        document = _document(content)
    except _Unreadable as error:
        return None, [str(error)]
    entries = document["keys"] if isinstance(document, dict) and isinstance(document.get("keys"), list) else []
    reasons = _repetitions(entries)
    try:
        parsed = KeyFile.model_validate(document)
    except ValidationError as error:
        return None, [_reason(fault, entries) for fault in error.errors(include_input=False)] + reasons
    return (None, reasons) if reasons else (parsed, [])


class _Unreadable(ValueError):
    """What keeps a file from being JSON that says one thing."""


def _document(content: bytes) -> Any:
    """Raises _Unreadable."""
    if len(content) > MAX_FILE_BYTES:
        raise _Unreadable(f"it has more than {MAX_FILE_BYTES} bytes")
    try:
        return json.loads(content.decode(), object_pairs_hook=_object)
    except _Unreadable:
        raise
    except json.JSONDecodeError as error:
        raise _Unreadable(f"it is not JSON, at line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError:
        raise _Unreadable("it is not UTF-8") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        raise _Unreadable("it holds a number too long or is nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a field that stands twice, Python's reader would take the last and say nothing."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _Unreadable("a field stands twice in one object")
    return made


def _repetitions(entries: Sequence[Any]) -> list[str]:
    """What two entries have in common and must not, among entries that may be broken."""
    reasons = []
    for field in ("name", "sha256"):
        first: dict[str, int] = {}
        for index, entry in enumerate(entries):
            value = entry.get(field) if isinstance(entry, dict) else None
            if isinstance(value, str):
                value = value.lower() if field == "sha256" else value
                if first.setdefault(value, index) < index:
                    reasons.append(f"{_place(index, entries)}: {field}: is that of entry {first[value] + 1} too")
    return reasons


def _reason(fault: ErrorDetails, entries: Sequence[Any]) -> str:
    """One fault in words, without the value that has it, and without a field's name that is not ours."""
    location, message = list(fault["loc"]), fault["msg"]
    if fault["type"] == "extra_forbidden":
        known = KeyFile if len(location) == 1 else KeyEntry
        location.pop()
        message = f"has an unknown field; known are {', '.join(known.model_fields)}"
    elif fault["type"] == "model_type":
        message = "must be an object"
    if len(location) > 1:
        location = [_place(int(location[1]), entries), ".".join(str(part) for part in location[2:])]
    return ": ".join(str(part) for part in (*location, message) if part)


def _place(index: int, entries: Sequence[Any]) -> str:
    """Which entry: its number from 1, and its name where that is one."""
    name = entries[index].get("name") if isinstance(entries[index], dict) else None
    told = isinstance(name, str) and NAME.fullmatch(name) and not LIKE_A_KEY.fullmatch(name)
    return f"entry {index + 1} ({name})" if told else f"entry {index + 1}"


def stat_keys(path: Path) -> os.stat_result:
    """Raises OSError, also for what could make a reader wait."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    return found


def read_keys(path: Path) -> bytes:
    """As much as may be, and a byte more when there is more."""
    with path.open("rb") as handle:
        return handle.read(MAX_FILE_BYTES + 1)

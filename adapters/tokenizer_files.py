"""The files of a tokenizer that a checkpoint brings: their bytes and their digest. Knows nothing of what they mean."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from adapters.errors import InvalidAdapter

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES: Mapping[str, int] = {
    TOKENIZER_FILE: 48 << 20,
    "tokenizer_config.json": 1 << 20,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 1 << 20,
    TEMPLATE_FILE: 1 << 20,
}
"""The most bytes of each."""


def read_tokenizer_files(directory: Path) -> dict[str, bytes]:
    """Those that are there, by name. Raises InvalidAdapter with every reason. Any thread."""
    found, reasons = {}, []
    for name, limit in TOKENIZER_FILES.items():
        try:
            with (directory / name).open("rb") as handle:
                found[name] = handle.read(limit + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            reasons.append(f"{name} cannot be read: {error.strerror}")
            continue
        if len(found[name]) > limit:
            reasons.append(f"{name} is larger than the limit of {limit} bytes")
    if not reasons and TOKENIZER_FILE not in found and found.keys() - {TEMPLATE_FILE}:
        shown = ", ".join(sorted(found.keys() - {TEMPLATE_FILE}))
        reasons.append(f"{shown} without {TOKENIZER_FILE}: a tokenizer is served in its fast form only, save it so")
    if reasons:
        raise InvalidAdapter(reasons)
    return found


def tokenizer_digest(files: Mapping[str, bytes]) -> str:
    """sha256 over names and contents; empty where there are no files."""
    if not files:
        return ""
    result = hashlib.sha256()
    for name, content in sorted(files.items()):
        result.update(f"{name} {len(content)} ".encode())
        result.update(content)
    return result.hexdigest()

"""A checkpoint's files from a multipart/form-data body into a directory, while they arrive.

Knows nothing of adapters, names or the store. Of a file no more than a block is in memory; parsing and writing happen
in a thread. The format is that of RFC 7578.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import Executor
from math import inf
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from adapters.checkpoint import CONFIG_FILE, MAX_JSON_BYTES, WEIGHTS_FILE
from adapters.directory import CHECKPOINT_FILES
from adapters.tokenizer_files import TOKENIZER_FILES

FORM_BYTES = 4 << 20
"""Room for what a form holds beside the weights and a tokenizer: the JSON files, and the parts' headers."""
TOKENIZER_BYTES = sum(TOKENIZER_FILES.values())
BLOCK_BYTES = 256 << 10
"""So much is collected before a thread is given it."""
FORM_TYPE = b"multipart/form-data"
PLAIN_ENCODINGS = (b"", b"binary", b"8bit", b"7bit")


class InvalidUpload(Exception):
    """A body that is not a form with a checkpoint's files; the message may be shown to the caller."""


class TooLarge(Exception):
    """More bytes than may be sent; the message says how many may."""


async def receive_checkpoint(request: Request, directory: Path, max_bytes: int, run: Executor | None = None) -> None:
    """Write the files in the body of `request` into the empty `directory`, in threads of `run` (None: the loop's own).

    Raises InvalidUpload, TooLarge (a body over `max_bytes`, a tokenizer's files not counted, or one of those or a JSON
    file over its limit), starlette's
    ClientDisconnect, OSError; files may be left in `directory` then. No thread works there any more when it returns.
    """
    form = _Form(directory, _boundary(request.headers.get("content-type", "")))
    block: list[bytes] = []
    collected = taken = 0
    try:
        async for chunk in request.stream():
            taken += len(chunk)
            if taken - form.tokenizer_bytes > max_bytes:  # what is not parsed yet is little beside FORM_BYTES
                raise TooLarge(f"the upload is larger than the limit of {max_bytes} bytes")
            block.append(chunk)
            collected += len(chunk)
            if collected >= BLOCK_BYTES:
                await _finish(run, form.feed, b"".join(block))
                block.clear()
                collected = 0
        await _finish(run, form.feed, b"".join(block))
    finally:
        await _finish(run, form.close)
    form.check()


class _Form:
    """Parses blocks and writes what they hold. One thread at a time."""

    def __init__(self, directory: Path, boundary: bytes) -> None:
        self._directory = directory
        self._received: set[str] = set()
        self._ended = False
        self._headers: dict[bytes, bytes] = {}
        self._field, self._value = b"", b""
        self._file: IO[bytes] | None = None
        self._name = ""
        self.tokenizer_bytes = 0
        """Written so far to a tokenizer's files."""
        self._limit = 0.0
        self._left = 0.0
        """Bytes that the file may still take."""
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._take_field,
                    "on_header_value": self._take_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._open_file,
                    "on_part_data": self._write,
                    "on_part_end": self.close,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise InvalidUpload(f"the boundary is not usable: {error}") from error

    def feed(self, block: bytes) -> None:
        """Raises InvalidUpload, TooLarge, OSError."""
        try:
            self._parser.write(block)
        except FormParserError as error:
            raise InvalidUpload(f"the body is not a well-formed multipart form: {error}") from error

    def close(self) -> None:
        """Close the file that is being written, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def check(self) -> None:
        """After the last block. Raises InvalidUpload when anything is missing."""
        if not self._ended:
            raise InvalidUpload("the body ends before the form does")
        missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if file not in self._received]
        if missing:
            raise InvalidUpload(f"{' and '.join(missing)} must be sent too")

    def _begin_part(self) -> None:
        self._headers = {}

    def _take_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field, self._value = b"", b""

    def _open_file(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = _file_of(options.get(b"filename", b""), options.get(b"name", b""))
        if self._name in self._received:
            raise InvalidUpload(f"{self._name} is sent twice")
        encoding = self._headers.get(b"content-transfer-encoding", b"").strip().lower()
        if encoding not in PLAIN_ENCODINGS:
            raise InvalidUpload(f"{self._name} must be sent as it is, not with a content-transfer-encoding")
        self._received.add(self._name)
        self._limit = inf if self._name == WEIGHTS_FILE else TOKENIZER_FILES.get(self._name, MAX_JSON_BYTES)
        self._left = self._limit
        self._file = (self._directory / self._name).open("xb")

    def _write(self, data: bytes, start: int, end: int) -> None:
        assert self._file is not None
        self._left -= end - start
        if self._left < 0:
            raise TooLarge(f"{self._name} is larger than the limit of {self._limit} bytes")
        if self._name in TOKENIZER_FILES:
            self.tokenizer_bytes += end - start
        self._file.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self._ended = True


def _file_of(filename: bytes, field: bytes) -> str:
    """Which of the checkpoint's files a part is, by its filename, or by its field's name. Raises InvalidUpload.

    Of a path the last component counts. Clients that send bytes without a file make a filename up.
    """
    names = [re.split(rb"[/\\]", given)[-1].decode("utf-8", "replace") for given in (filename, field)]
    for file in CHECKPOINT_FILES:
        if file in names:
            return file
    shown = next(filter(None, names), "")
    raise InvalidUpload(f"{shown[:100]!r} is not a file of a checkpoint: send {', '.join(CHECKPOINT_FILES)}")


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    if kind != FORM_TYPE:
        raise InvalidUpload(f"a checkpoint is sent as {FORM_TYPE.decode()}")
    if not options.get(b"boundary"):
        raise InvalidUpload("the content-type names no boundary")
    return options[b"boundary"]


async def _finish(run: Executor | None, step: Callable[..., None], *arguments: bytes) -> None:
    """In a thread; who is cancelled meanwhile still waits for its end."""
    work = asyncio.get_running_loop().run_in_executor(run, step, *arguments)
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise

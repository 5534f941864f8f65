"""Rows of a data file, each with the place where it stands. Knows nothing of tasks, tokens or models.

JSON lines, CSV with a header (a list in a cell is JSON), or Parquet.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

MAX_REASONS = 10
T = TypeVar("T")


class InvalidData(ValueError):
    """A data file that cannot be read or does not fit its task; the message gives the lines."""


class InvalidRow(ValueError):
    """What is wrong with one row."""


@dataclass(frozen=True)
class Row:
    """One example as it stands in the file."""

    line: int
    """From 1, as an editor counts them; of Parquet the row."""
    values: dict[str, Any]

    def text(self, column: str) -> str:
        """A string that is not empty. Raises InvalidRow."""
        value = self._value(column)
        if not isinstance(value, str) or not value.strip():
            raise InvalidRow(f"{column} must be a text that is not empty, not {value!r}")
        if re.search("[\ud800-\udfff]", value):
            raise InvalidRow(f"{column} has half a surrogate pair, which is no text: {value!r}")
        return value

    def number(self, column: str) -> float:
        """A finite number, as such or as text. Raises InvalidRow."""
        value = self._value(column)
        try:
            number = float(value) if not isinstance(value, bool) else float("nan")
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not abs(number) < float("inf"):
            raise InvalidRow(f"{column} must be a finite number, not {value!r}")
        return number

    def label(self, column: str) -> str:
        """A class, named or numbered. Raises InvalidRow."""
        value = self._value(column)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value:
            raise InvalidRow(f"{column} must be a text or a whole number, not {value!r}")
        return value

    def texts(self, column: str) -> list[str]:
        """A list of texts, as such or as JSON. Raises InvalidRow."""
        value = self.listed(column)
        if not all(isinstance(item, str) and item for item in value):
            raise InvalidRow(f"{column} must be a list of texts that are not empty")
        return value

    def listed(self, column: str) -> list[Any]:
        """A list, as such or as JSON. Raises InvalidRow."""
        value = self._value(column)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise InvalidRow(f"{column} must be a list (in a text: as JSON), not {value[:80]!r}") from None
        if not isinstance(value, list):
            raise InvalidRow(f"{column} must be a list, not {value!r}")
        return value

    def has(self, column: str) -> bool:
        return self.values.get(column) not in (None, "")

    def _value(self, column: str) -> Any:
        if column not in self.values:
            raise InvalidRow(f"there is no {column!r}, only {', '.join(map(repr, self.values)) or 'an empty row'}")
        return self.values[column]


def read_rows(path: Path) -> list[Row]:
    """All rows of a `.jsonl`, `.csv` or `.parquet` file. Raises InvalidData with the first faults by line."""
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InvalidData(f"{path}: the kind of file is told by its ending, one of {', '.join(readers)}")
    try:
        rows = reader(path)
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path} is not UTF-8: {error}") from error
    if not rows:
        raise InvalidData(f"{path} has no rows")
    return rows


def convert_rows(path: Path, rows: Iterable[Row], convert: Callable[[Row], T]) -> list[T]:
    """`convert` of every row. Raises InvalidData with the first MAX_REASONS faults by line."""
    converted, faults = [], []
    for row in rows:
        try:
            converted.append(convert(row))
        except InvalidRow as error:
            faults.append(f"{path}:{row.line}: {error}")
    if faults:
        rest = len(faults) - MAX_REASONS
        more = [f"and {rest} more rows"] if rest > 0 else []
        raise InvalidData("\n".join([*faults[:MAX_REASONS], *more]))
    return converted


def _json_lines(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    rows = [Row(i, {"": line}) for i, line in enumerate(lines, 1) if line.strip()]
    return convert_rows(path, rows, _parse_json)


def _parse_json(row: Row) -> Row:
    try:
        values = json.loads(row.values[""], object_pairs_hook=_once)
    except InvalidRow:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidRow(f"no JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidRow("no JSON object")
    return Row(row.line, values)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises InvalidRow for a key that occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise InvalidRow(f"a key occurs twice among {', '.join(key for key, _ in pairs)}")
    return values


def _csv(path: Path) -> list[Row]:
    """Line numbers are those of a row's last line, where a cell has several."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = reader.fieldnames or []
            if len(set(names)) < len(names) or any(name != name.strip() for name in names):
                raise InvalidData(f"{path}:1: names of columns occur twice, or have spaces around: {names}")
            rows = [Row(reader.line_num, values) for values in reader]
        except csv.Error as error:
            raise InvalidData(f"{path}:{reader.line_num}: {error}") from error
    return convert_rows(path, rows, _whole)


def _whole(row: Row) -> Row:
    if None in row.values or None in row.values.values():
        raise InvalidRow("not as many cells as the header has")
    return row


def _parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowException, parquet  # noqa: PLC0415  -- of the extra `train`, needed for this kind alone

    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise InvalidData(f"{path} cannot be read as Parquet: {error}") from error
    return [Row(i, values) for i, values in enumerate(table.to_pylist(), 1)]

"""Rows of data files: three formats, and faults by line."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from server.training.data import InvalidData, InvalidRow, Row, convert_rows, read_rows


def test_three_formats_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "label": "x"}\n\n{"text": "zwei, drei", "label": "y"}\n')
    (tmp_path / "a.csv").write_text('text,label\none,x\n"zwei, drei",y\n')
    table = pyarrow.table({"text": ["one", "zwei, drei"], "label": ["x", "y"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    found = [[row.values for row in read_rows(tmp_path / name)] for name in ("a.jsonl", "a.csv", "a.parquet")]
    assert found == [[{"text": "one", "label": "x"}, {"text": "zwei, drei", "label": "y"}]] * 3


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "\u2028 is no end of a line"}\n\n{"text": "b"}\n')
    (tmp_path / "a.csv").write_text('text\n"two\nlines"\nb\n')
    assert [row.line for row in read_rows(tmp_path / "a.jsonl")] == [2, 4]
    assert [row.line for row in read_rows(tmp_path / "a.csv")] == [3, 4]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n[1]\n', r"a\.jsonl:2: no JSON: .*\n.*a\.jsonl:3: no JSON object"),
        ("a.jsonl", b"\n", "has no rows"),
        ("a.jsonl", b'{"a": "\xff"}', "is not UTF-8"),
        ("a.jsonl", b'{"a": 1, "a": 2}', r"a\.jsonl:1: a key occurs twice"),
        ("a.csv", b"text,text\na,b\n", r"a\.csv:1: names of columns occur twice"),
        ("a.csv", b"text, label\na,b\n", r"a\.csv:1: names of columns .* have spaces around"),
        ("a.csv", b"text,label\none\n", r"a\.csv:2: not as many cells as the header has"),
        ("a.csv", b"text,label\none,x,more\n", r"a\.csv:2: not as many cells"),
        ("a.parquet", b"no parquet", "cannot be read as Parquet"),
        ("a.txt", b"text", r"told by its ending, one of \.jsonl"),
    ],
)
def test_broken_files(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidData, match=reason):
        read_rows(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="cannot be read: No such file"):
        read_rows(tmp_path / "absent.jsonl")


def test_many_faults_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 25)
    rows = read_rows(tmp_path / "a.jsonl")
    with pytest.raises(InvalidData, match=r":10: text must be a text that is not empty, not ''\nand 15 more rows"):
        convert_rows(tmp_path / "a.jsonl", rows, lambda row: row.text("text"))


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("text", 3, "must be a text"),
        ("text", "\ud800", "half a surrogate pair"),
        ("number", "many", "must be a finite number, not 'many'"),
        ("number", True, "must be a finite number"),
        ("number", 1e999, "must be a finite number"),
        ("number", None, "must be a finite number"),
        ("label", 1.5, "must be a text or a whole number"),
        ("label", True, "must be a text or a whole number"),
        ("texts", "[1, 2]", "must be a list of texts"),
        ("texts", "a b", "must be a list .in a text: as JSON."),
        ("listed", 3, "must be a list"),
    ],
)
def test_values_of_the_wrong_kind(kind: str, value: object, reason: str) -> None:
    with pytest.raises(InvalidRow, match=reason):
        getattr(Row(1, {"it": value}), kind)("it")


def test_values() -> None:
    row = Row(1, {"number": "2.5", "label": 7, "texts": '["a", "b"]'})
    assert (row.number("number"), row.label("label"), row.texts("texts")) == (2.5, "7", ["a", "b"])
    with pytest.raises(InvalidRow, match="there is no 'absent', only 'number', 'label', 'texts'"):
        row.text("absent")

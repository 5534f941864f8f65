"""What README says of bases is what the tests prove."""

from __future__ import annotations

from pathlib import Path

from tests.bases import readme_table

README = Path(__file__).parent.parent / "README.md"


def test_the_table_of_bases_is_that_of_the_tests() -> None:
    assert f"\n\n{readme_table()}\n\n" in README.read_text()

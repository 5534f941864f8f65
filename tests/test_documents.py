"""README.md and docs/ say what the code says: tables, links, sizes, the program's version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from server import __version__
from server.config import ServerConfig
from tests.documents import CHECKPOINTS, TRIED, marked, parts
from tests.support import Live

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
OTHER_FLAGS = {
    "best", "build-arg", "config", "resume", "baseline", "serve-at", "help", "max-loras-per-batch", "extra-index-url",
}  # fmt: skip
"""Of `docker build`, of other commands of `multilora`, of pip and of SGLang."""


def test_generated_parts_are_up_to_date(live: Live) -> None:
    for name, (file, text) in parts(live.service).items():
        found = marked(name).findall((ROOT / file).read_text())
        assert [between for _, between, _ in found] == [text], f"{file}, {name}: run python -m tests.documents"


def test_no_kind_of_checkpoint_is_untold() -> None:
    """Every option of the tests' checkpoints has its line, and every line a checkpoint."""
    specs = [spec for of_base in TRIED for specs in of_base.values() for spec in specs]
    options = {name for spec in specs for name in spec.options} - {"modules_to_save"}
    assert not [name for name in options if not any(f"`{name}`" in line for line in CHECKPOINTS)]
    assert not [line for line, has in CHECKPOINTS.items() if not any(map(has, specs))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text) + re.findall(
        r'(?:src|srcset)="(?!https?:)([^"]+)"', text
    ):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_files_that_are_named_are_there(page: Path) -> None:
    """Of `--flag` and `folder/file.ext` between backticks."""
    text = page.read_text()
    flags = {item.replace("_", "-") for item in ServerConfig.__dataclass_fields__} | OTHER_FLAGS
    assert not [flag for flag in re.findall(r"`--([a-z-]+)[ `=]", text) if flag.removeprefix("no-") not in flags]
    files = re.findall(r"(?<![\w./])((?:deploy|dashboards|benchmarks|tests|docs)/[\w/.-]+\.\w+)", text)
    assert not [name for name in files if not (ROOT / name).exists() and not (page.parent / name).exists()]

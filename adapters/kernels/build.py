"""Compile the CPU kernels (native/): one shared object for each instruction set. An explicit step, never on import.

    multilora build-kernels           # for all processors of this architecture
    multilora build-kernels --best    # for this processor

needs a C++17 compiler with OpenMP ($CXX, else c++). What is built already, from the same sources, is left alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
BUILT = SOURCES / "built"
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi")
SANITIZE_FLAGS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
TARGETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512amx": (*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        "avx512vnni": (*AVX512, "-mavx512vnni"),
        "avx512": AVX512,
        "avx2vnni": (*AVX2, "-mavxvnni"),
        "avx2": AVX2,
    },
    "aarch64": {"neondot": ("-march=armv8.2-a+dotprod",), "neon": ()},
}
"""By machine, best first: name -> what the compiler may use beyond the machine's plain instructions."""
MACHINE_NAMES = {"AMD64": "x86_64", "arm64": "aarch64"}


class CannotBuild(Exception):
    """There is no compiler, or it failed; the message says how."""


def targets() -> Mapping[str, tuple[str, ...]]:
    """What can be built for this machine; nothing on machines for which there is no vector code."""
    machine = platform.machine()
    return TARGETS.get(MACHINE_NAMES.get(machine, machine), {})


def built_file(target: str, directory: Path = BUILT, sanitize: bool = False) -> Path:
    """Where the object of `target` lies; its name holds a digest of sources and flags, so that it is never stale."""
    digest = hashlib.sha256(repr(_flags(target, sanitize)).encode())
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + source.read_bytes())
    return directory / f"multilora-{target}-{digest.hexdigest()[:16]}.so"


def build(directory: Path = BUILT, sanitize: bool = False, only: Collection[str] | None = None) -> list[Path]:
    """Build what is missing for this machine, or of the targets `only`; returns all these objects.

    Raises CannotBuild where any failed, after the others: a compiler may be too old for the newest processor.
    """
    directory.mkdir(parents=True, exist_ok=True)
    wanted = [target for target in targets() if only is None or target in only]
    files = {target: built_file(target, directory, sanitize) for target in wanted}
    missing = {target: file for target, file in files.items() if not file.exists()}
    if missing:
        logger.info("compiling the CPU kernels for %s", ", ".join(missing))
    with ThreadPoolExecutor(os.cpu_count() or 1) as compilers:
        compiled = [compilers.submit(_compile, _flags(target, sanitize), file) for target, file in missing.items()]
    failures: list[str] = []
    for future in compiled:
        try:
            future.result()
        except CannotBuild as error:
            failures.append(str(error))
    if failures:
        raise CannotBuild("\n".join(dict.fromkeys(failures)))  # a compiler that is not there is told once
    return list(files.values())


def build_first(wanted: Iterable[str], directory: Path = BUILT) -> list[Path]:
    """Build the first target of `wanted` that the compiler can; none where none is wanted. Raises CannotBuild."""
    failures: list[str] = []
    for target in wanted:
        try:
            built = build(directory, only=[target])
        except CannotBuild as error:
            failures.append(str(error))
            continue
        for failure in failures:
            logger.warning("%s; the next best is %s", failure, target)
        return built
    if failures:
        raise CannotBuild("\n".join(dict.fromkeys(failures)))
    return []


def _flags(target: str, sanitize: bool) -> tuple[str, ...]:
    return (*COMMON_FLAGS, *targets()[target], *(SANITIZE_FLAGS if sanitize else ()))


def _compile(flags: tuple[str, ...], file: Path) -> None:
    """Compile and link; whole or not at all, also when two builds run at once.

    The OpenMP library is not linked: at run time its functions are found in the one that torch has loaded, whatever
    that is called there, so that there is one pool of threads.
    """
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        built, linked = Path(folder, "api.o"), Path(folder, "api.so")
        _run(*flags, "-c", str(SOURCES / "api.cpp"), "-o", str(built))
        _run("-shared", *(flag for flag in flags if flag.startswith("-fsanitize")), str(built), "-o", str(linked))
        linked.rename(file)


def _run(*arguments: str) -> None:
    compiler = os.environ.get("CXX") or "c++"
    try:
        result = subprocess.run([*shlex.split(compiler), *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotBuild(f"no C++ compiler: {compiler!r} cannot be run (set $CXX)") from error
    if result.returncode:
        raise CannotBuild(f"{compiler} failed on the CPU kernels:\n{result.stderr[-4000:]}")


if __name__ == "__main__":  # without torch, as when an image is built
    build()

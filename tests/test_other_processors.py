"""The CPU kernels for processors that are not this one, against loops in double precision.

For ARM in an emulator; for AVX-512, AMX and AVX-VNNI with their instructions by loops (*_by_loops.h), on any processor
with AVX2.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence, Set
from pathlib import Path

import pytest

from adapters.kernels.build import COMMON_FLAGS, TARGETS
from adapters.kernels.library import usable_targets

FORMS = ("form1", "form2", "form3", "form4")
"""float16, bfloat16, INT8, INT8_DYNAMIC (library.py)."""
CROSS = ("cross0", "cross1", "cross2")
"""By the dtype of pages."""
TILES = {"tiles"}
"""Where there are some."""
PARTS = {"linear", *FORMS, "attend", "biased", "turned", "part", "gated", "sampled", *CROSS, "rounded", "faults"}
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
COMPILER = shlex.split(os.environ.get("CXX") or "c++")
HERE = Path(__file__).parent
BY_LOOPS = {
    "avx512": ["-include", str(HERE / "avx512_by_loops.h")],
    "avx512vnni": ["-DVNNI_BY_LOOPS", "-include", str(HERE / "avx512_by_loops.h")],
    "avx512amx": ["-include", str(HERE / "amx_by_loops.h")],
    "avx2vnni": ["-include", str(HERE / "avxvnni_by_loops.h")],
}
"""By target."""


def check(program: Path, compiler: Sequence[str], emulator: Sequence[str], parts: Set[str] = PARTS) -> None:
    """That other_processors.cpp, compiled and run so, has these parts and finds none in error."""
    flags = [flag for flag in COMMON_FLAGS if flag not in ("-fPIC", "-O3")]
    source = str(HERE / "other_processors.cpp")
    subprocess.run([*compiler, *flags, source, "-o", str(program)], check=True)
    output = subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True).stdout
    errors = {line.split()[0]: float(line.split()[1]) for line in output.splitlines()}
    assert errors.keys() == parts
    assert all(error < 2e-6 for error in errors.values()), errors


@pytest.mark.skipif(
    not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)), reason=f"no {CROSS_COMPILER} or {EMULATOR} here"
)
@pytest.mark.parametrize("target", TARGETS["aarch64"])
def test_the_kernels_for_arm_compute_what_loops_compute(tmp_path: Path, target: str) -> None:
    check(tmp_path / "check", [CROSS_COMPILER, *TARGETS["aarch64"][target], "-O2", "-static"], [EMULATOR])


@pytest.mark.skipif("avx2" not in usable_targets() or not shutil.which(COMPILER[0]), reason="no AVX2 or compiler here")
@pytest.mark.parametrize("target", BY_LOOPS)
def test_the_kernels_for_newer_processors_compute_what_loops_compute(tmp_path: Path, target: str) -> None:
    """Not optimised: vectors wider than the processor's take the compiler minutes."""
    flags = [*TARGETS["x86_64"]["avx2"], "-Wno-ignored-attributes", *BY_LOOPS[target]]
    check(tmp_path / "check", [*COMPILER, *flags], [], PARTS | (TILES if target == "avx512amx" else set()))

"""The CPU kernels for ARM, compiled for it and run in an emulator, against loops in double precision."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from adapters.kernels.build import COMMON_FLAGS, TARGETS

CROSS = {"cross0", "cross1", "cross2"}
"""By the dtype of pages."""
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"{COMPILER} and {EMULATOR} are not here"
)
def test_the_kernels_for_arm_compute_what_loops_compute(tmp_path: Path) -> None:
    program = tmp_path / "check"
    flags = [flag for flag in (*COMMON_FLAGS, *TARGETS["aarch64"]["neon"]) if flag not in ("-fPIC", "-O3")]
    source = Path(__file__).with_name("neon_check.cpp")
    subprocess.run([COMPILER, *flags, "-O2", "-static", str(source), "-o", str(program)], check=True)
    output = subprocess.run([EMULATOR, str(program)], check=True, capture_output=True, text=True).stdout
    errors = {line.split()[0]: float(line.split()[1]) for line in output.splitlines()}
    assert errors.keys() == {"linear", "form1", "form2", "form3", "attend", "biased", "gated", *CROSS, "rounded"}
    assert all(error < 2e-6 for error in errors.values()), errors

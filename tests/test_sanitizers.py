"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: they touch nothing beyond what they are given.

They are compiled for it without optimisation, once for each state of the sources (pytest's cache keeps them). Working
memory inside the kernels is rounded up to pages, so that a step beyond it may stay unseen; what callers give is exact.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.kernels import build as building
from adapters.kernels.build import COMMON_FLAGS, SANITIZE_FLAGS, CannotBuild, built_file, targets
from adapters.kernels.library import usable_targets
from tests.sanitized import FAULTS

ROOT = Path(__file__).parent.parent
AVX512 = [target for target in usable_targets() if target.startswith("avx512")]
TARGETS = [target for target in usable_targets() if target not in AVX512[1:]]
"""Each of AVX512 is the next one and more."""


def runtime(name: str) -> str:
    """Where the compiler has a library; skips where it has none."""
    compiler = os.environ.get("CXX", "c++")
    try:
        command = [compiler, f"-print-file-name={name}"]
        file = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"there is no C++ compiler {compiler}")
    if not Path(file).is_absolute():
        pytest.skip(f"{compiler} has no {name}")
    return str(Path(file).resolve())


@pytest.fixture(scope="module", params=TARGETS)
def sanitized(request: pytest.FixtureRequest) -> Path:
    runtime("libasan.so")
    folder = request.config.cache.mkdir("sanitized")
    file = folder / built_file(request.param).name
    if not file.exists():
        for stale in folder.glob(f"multilora-{request.param}-*.so"):
            stale.unlink()
        try:
            building._compile((*COMMON_FLAGS, *targets()[request.param], *SANITIZE_FLAGS, "-O0"), file)
        except CannotBuild as error:
            pytest.skip(f"the compiler has no sanitizers: {error}")
    return file


def run(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    preloaded = f"{runtime('libasan.so')} {runtime('libstdc++.so')}"
    environment = {
        **os.environ,
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # threads that spin at a barrier would take the processor from the others
    }
    command = [sys.executable, "-m", "tests.sanitized", str(file), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=600)


@pytest.mark.parametrize("sanitized", TARGETS[:1], indirect=True)
def test_planted_faults_are_seen(sanitized: Path) -> None:
    result = run(sanitized, "faults")
    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads(result.stdout)
    assert told.keys() == FAULTS.keys()
    for fault, text in told.items():
        assert "AddressSanitizer: heap-buffer-overflow" in text, (fault, text[-2000:])


def test_nothing_beyond_the_buffers_is_touched(sanitized: Path) -> None:
    result = run(sanitized)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout == "clean\n"
    assert "runtime error" not in result.stderr

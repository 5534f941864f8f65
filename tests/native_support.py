"""The compiled CPU kernels that this processor runs, each of them, for the tests of what uses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from adapters.kernels.build import built_file, targets
from adapters.kernels.library import Library

CAPABILITIES = {
    "avx512amx": "amx_bf16",
    "avx512vnni": "avx512_vnni",
    "avx512": "avx512_f",
    "avx2": "avx2",
    "neondot": "dot",
}
"""Target -> what torch calls the processor's capability."""


def runnable_targets() -> list[str]:
    """What can be built for this machine and runs on this processor, whether built or not."""
    found = torch.cpu.get_capabilities()
    return [target for target in targets() if target not in CAPABILITIES or found.get(CAPABILITIES[target])]


@cache
def library_of(target: str) -> Library:
    """The object built for `target`; skips the test where it is not built."""
    file = built_file(target)
    if not file.exists():
        pytest.skip(f"the CPU kernels for {target} are not built: multilora build-kernels")
    return Library(file)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Meanwhile torch, and so the CPU kernels, have `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

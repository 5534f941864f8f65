"""The compiled CPU kernels that this processor runs, each of them, for the tests of what uses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from adapters.kernels.build import built_file
from adapters.kernels.library import Library


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

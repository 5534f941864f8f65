"""Triton kernels without a GPU: run by Triton's interpreter, or compiled ahead of time."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

ARCHS = (80, 90, 100)
"""Of the GPUs that are meant."""


class Case(NamedTuple):
    """What to compile, for which of ARCHS, and what is known of it."""

    source: Any
    arch: int
    known: dict[str, Any]


def compile_cases(cases: Sequence[Case], see: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """What is known of each case, and what `see` sees in what came of it; some at once, since ptxas is a program."""
    import triton
    from triton.backends.compiler import GPUTarget

    def compile_one(case: Case) -> dict[str, Any]:
        return case.known | see(triton.compile(case.source, target=GPUTarget("cuda", case.arch, 32)))

    with ThreadPoolExecutor(os.cpu_count() or 1) as compilers:
        return list(compilers.map(compile_one, cases))


@contextmanager
def interpreted(kernels: str, launcher: str) -> Iterator[ModuleType]:
    """The module `launcher` with the kernels of the module `kernels` in the interpreter; one torch thread meanwhile.

    The interpreter is chosen when a kernel is decorated, so the variable TRITON_INTERPRET would have to be set before
    anything imports triton, and torch._dynamo may have imported it. So the interpreter is switched on here, and the
    functions of Triton's own library that were decorated without it are replaced meanwhile.
    """
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        for name, function in list(vars(tl.standard).items()):
            if isinstance(function, JITFunction):
                replacement = InterpretedFunction(function.fn)
                patch.setattr(tl.standard, name, replacement)
                if hasattr(tl, name):
                    patch.setattr(tl, name, replacement)
        for name in (kernels, launcher):
            patch.delitem(sys.modules, name, raising=False)
        torch.set_num_threads(1)
        try:
            yield importlib.import_module(launcher)
        finally:
            torch.set_num_threads(threads)
            for name in (kernels, launcher):
                patch.delitem(sys.modules, name, raising=False)

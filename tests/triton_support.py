"""Triton kernels without a GPU: run by Triton's interpreter, or compiled ahead of time."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch


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

"""Panics of the tokenizers library, which are no Exceptions: a tokenizer that an adapter brings may fail on a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PANIC = "PanicException"
"""The class is made by each library of Rust; none can be imported."""


@contextmanager
def panics_as(error: Exception) -> Iterator[None]:
    """Raise `error` where a tokenizer panics. Any thread."""
    try:
        yield
    except BaseException as panic:
        if type(panic).__name__ != PANIC:
            raise
        raise error from panic

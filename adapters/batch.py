"""LoraBatch: which tokens of a packed row belong to which adapter slot; the scope in which it is current.

Knows nothing of weights, layers or requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np

NO_SLOT = -1


class Segment(NamedTuple):
    """Tokens start … end − 1 belong to `slot`."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True)
class LoraBatch:
    """The adapters of one forward pass. Tokens in no segment are the base model's and stay untouched."""

    segments: tuple[Segment, ...]
    """Disjoint, in ascending order; only tokens with an adapter."""
    num_tokens: int
    every_row: bool = False
    """Whether the one adapter of all tokens is also that of whatever else goes through a layer in this pass."""
    logit_slots: tuple[int, ...] | None = None
    """The slot of each row that a language-model head computes; None: of none of them an adapter's."""

    @cached_property
    def logits(self) -> LoraBatch | None:
        """The adapters of those rows; made when an adapter on such a head asks for it."""
        return None if self.logit_slots is None else LoraBatch.of_slots(self.logit_slots)

    @cached_property
    def native(self) -> tuple[int, int]:
        """Address and number of the segments as int32 [n, 3] (slot, start, end), valid as long as this object."""
        return self._array.ctypes.data, len(self._array)

    @cached_property
    def _array(self) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        return np.array(self.segments, np.int32).reshape(-1, 3)

    @classmethod
    def of_slots(cls, slots: Sequence[int]) -> LoraBatch:
        """From the slot of each token (NO_SLOT: base only); neighbours of one slot become one segment."""
        segments = []
        start = 0
        for slot, run in groupby(slots):
            end = start + sum(1 for _ in run)
            if slot != NO_SLOT:
                segments.append(Segment(slot, start, end))
            start = end
        return cls(tuple(segments), start)

    def with_logits(self, slots: Sequence[int]) -> LoraBatch:
        """The same, and the slot of each row whose logits are wanted."""
        return replace(self, logit_slots=tuple(slots))

    @classmethod
    def of_one(cls, slot: int, num_tokens: int) -> LoraBatch:
        """All tokens, and every other row of a layer's input, have the adapter in `slot` (NO_SLOT: base only)."""
        segments = () if slot == NO_SLOT else (Segment(slot, 0, num_tokens),)
        return cls(segments, num_tokens, every_row=True)

    def over(self, num_rows: int) -> LoraBatch:
        """The same adapters over a layer's input of `num_rows` rows. Raises RuntimeError where these are no tokens."""
        if num_rows == self.num_tokens:
            return self
        if not self.every_row:
            raise RuntimeError(f"{num_rows} rows in a batch of {self.num_tokens} tokens")
        return LoraBatch(tuple(Segment(slot, 0, num_rows) for slot, _, _ in self.segments), num_rows)


class CurrentBatch(Protocol):
    """Tells the batch that layers compute with."""

    @property
    def current(self) -> LoraBatch | None:
        """None: without adapters."""
        ...


class LoraScope:
    """Holds the batch of the forward pass that is under way. Engine's thread only."""

    def __init__(self) -> None:
        self.current: LoraBatch | None = None

    @contextmanager
    def use(self, batch: LoraBatch) -> Iterator[None]:
        """Make `batch` current; refuses to nest."""
        if self.current is not None:
            raise RuntimeError("a LoraBatch is current already")
        self.current = batch
        try:
            yield
        finally:
            self.current = None

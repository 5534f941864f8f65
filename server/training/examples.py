"""Example: one training item as token ids, and batches of them as tensors. Knows nothing of tasks or files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from server.engine.tasks import InvalidPrompt, Prompt
from server.training.data import InvalidRow

IGNORED = -100
"""A target that counts for nothing, as torch's cross_entropy takes it."""


Ids = tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One item. What `target` and `expected` are, the task knows."""

    text: str
    """Its input."""
    input_ids: Ids
    target: Any
    expected: Any
    """What a person would expect as the answer, as JSON has it."""
    source: str
    """By which it is held out or not: its text, or the whole conversation of which it is a part."""
    others: tuple[Ids, ...] = ()
    """Further texts that are computed with it."""

    @property
    def length(self) -> int:
        """Of its longest text, in tokens."""
        return max(map(len, (self.input_ids, *self.others)))

    @property
    def num_tokens(self) -> int:
        return sum(map(len, (self.input_ids, *self.others)))


@dataclass(frozen=True)
class Examples:
    """All of a run."""

    learn: list[Example]
    held_out: list[Example]
    too_long: int
    """So many were left out."""


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of held-out examples."""

    metrics: dict[str, float]
    predictions: list[Any]
    """One an example, as JSON has it; none where nothing was generated."""


class TrainingTask(Protocol):
    """One kind of task. Engine-less: torch runs in the thread that calls."""

    labels: tuple[str, ...]
    problem_type: str | None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that can be chosen, the task's own first."""
        ...

    def read(self, path: Any) -> list[Example]:
        """Raises InvalidData."""
        ...

    def load(self, location: str, dtype: torch.dtype) -> Any:
        """The base with this task's head, from transformers."""
        ...

    def count(self, batch: Sequence[Example]) -> int:
        """Targets over which `loss` is the mean."""
        ...

    def loss(self, model: Any, batch: Sequence[Example]) -> Tensor: ...

    def evaluate(self, model: Any, examples: Sequence[Example], size: int, generate: bool) -> Evaluation:
        """size: examples computed at once; generate: make answers, where metrics are about them."""
        ...


def prepared(prepare: Callable[[str], Prompt], text: str) -> Prompt:
    """What the server would make of `text`. Raises InvalidRow."""
    try:
        return prepare(text)
    except InvalidPrompt as error:
        raise InvalidRow(str(error)) from error


def held_out(source: str, fraction: float) -> bool:
    """Whether what has this source is among the `fraction` held out: the same in every run, on every machine."""
    return int.from_bytes(hashlib.sha256(f"held out? {source}".encode()).digest()[:8], "big") < fraction * 2**64


def padded(rows: Iterable[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask [n, longest], padded on the right."""
    rows = list(rows)
    mask = pad_rows([[1] * len(row) for row in rows], 0)
    return {"input_ids": pad_rows(rows, pad).to(device), "attention_mask": mask.to(device)}


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """int64 [n, longest]."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def by_length(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar lengths, the longest first, so that memory runs out at once or never."""
    order = sorted(range(len(examples)), key=lambda i: -examples[i].length)
    for start in range(0, len(order), size):
        yield order[start : start + size]

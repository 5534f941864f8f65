"""Plan: which examples each step takes. Follows from the seed, so that a run that goes on takes the same."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from server.training.recipe import Recipe

Batch = list[int]
"""Indices of examples computed at once."""


class Plan:
    """All steps of a run: `steps[i]` is the batches of step i, from 0."""

    def __init__(self, lengths: Sequence[int], recipe: Recipe) -> None:
        """lengths: of each example, in tokens."""
        self.steps: list[list[Batch]] = []
        for epoch in range(recipe.epochs) if not recipe.max_steps else itertools.count():
            rng = random.Random(f"{recipe.seed} {epoch}")
            batches = [*_batches(lengths, recipe.batch_size, recipe.bucket, rng)]
            for start in range(0, len(batches), recipe.accumulation):
                self.steps.append(batches[start : start + recipe.accumulation])
            if not epoch:
                self.steps_per_epoch = len(self.steps)
            if 0 < recipe.max_steps <= len(self.steps):
                del self.steps[recipe.max_steps :]
                break
        self.eval_every = recipe.eval_every or self.steps_per_epoch

    def __len__(self) -> int:
        return len(self.steps)

    def evaluates_after(self, done: int) -> bool:
        """Whether an evaluation follows when so many steps are done."""
        return done % self.eval_every == 0 or done == len(self)


def _batches(lengths: Sequence[int], size: int, bucket: bool, rng: random.Random) -> Iterator[Batch]:
    """Every example once; with `bucket` those of a batch are about equally long. In random order."""
    order = rng.sample(range(len(lengths)), len(lengths))
    if bucket:
        order.sort(key=lambda i: lengths[i])
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if len(batches) > 1 and len(batches[-1]) == 1 < size:  # alone it would have nothing to be told apart from
        batches[-2:] = [batches[-2] + batches[-1]]
    rng.shuffle(batches)
    return iter(batches)

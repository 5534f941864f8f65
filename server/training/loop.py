"""The loop: gradients of the loss with respect to A, B, biases and head, AdamW, evaluations, checkpoints.

Why not transformers' Trainer: batches by length, a loss weighted by targets over accumulated batches, and a checkpoint
without pickle that goes on to the very same result are each a few lines here, and each an override there.
"""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from server.training.baseline import baseline
from server.training.checkpoint import (
    Checkpoint,
    Progress,
    random_state,
    set_random_state,
    write_checkpoint,
)
from server.training.examples import Evaluation, Example, Examples, TrainingTask
from server.training.generation import GENERATED
from server.training.model import copy_of, learnt, restore
from server.training.plan import Plan
from server.training.progress import Bar
from server.training.recipe import LOWER_IS_BETTER, Recipe

ADVICE = "try a lower learning rate, or more examples"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter."""


class Loop:
    """One run. The thread that makes it."""

    def __init__(
        self, recipe: Recipe, task: TrainingTask, model: Any, examples: Examples, identity: dict[str, Any]
    ) -> None:
        """identity: what a checkpoint must agree with."""
        self.recipe = recipe
        self.task = task
        self.model = model
        self.examples = examples
        self.progress = Progress()
        self.plan = Plan([example.length for example in examples.learn], recipe)
        self.metric = recipe.metric or task.metrics[0]
        self.parameters = learnt(model)
        self.best: dict[str, Tensor] = {}
        self._identity = identity
        self._optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        warmup = round(recipe.warmup * len(self.plan))
        name = "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule
        self._share = get_scheduler(name, self._optimizer, warmup, len(self.plan)).lr_lambdas[0]
        """Of the learning rate, at a step from 0."""

    def run(self) -> bool:
        """To the end, or until a signal or patience ends it. Whether it came to its end."""
        done = self.progress
        with _interruptible() as interrupted, Bar(len(self.plan), done.step) as bar:
            while done.step < len(self.plan) and not self._out_of_patience():
                if interrupted():
                    self._write()
                    return False
                started = time.monotonic()
                loss, rate, tokens = self._step(self.plan.steps[done.step])
                done.step, done.tokens = done.step + 1, done.tokens + tokens
                done.history.append({"step": done.step, "loss": loss, "learning_rate": rate})
                bar.advance(loss, rate, tokens)
                evaluates = self.plan.evaluates_after(done.step)
                if evaluates and self.examples.held_out:
                    bar.say(self._evaluate())
                done.seconds += time.monotonic() - started
                every = self.recipe.checkpoint_every
                if done.step % every == 0 if every else evaluates:
                    self._write()
            self._write()
            if interrupted():
                return False
        if self.best:
            restore(self.parameters, self.best)
        return True

    @torch.no_grad()
    def measure(self, examples: Sequence[Example], generate: bool) -> Evaluation:
        """Of the model as it is."""
        self.model.eval()
        with self._precision():
            return self.task.evaluate(self.model, examples, self.recipe.batch_size, generate)

    def measure_baseline(self) -> None:
        """Note what the base does without the adapter. Only before the first step: biases are learnt in their place."""
        if not self.progress.step:
            with self._precision(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias configured", UserWarning)
                self.progress.baseline = baseline(self.task, self.model, self.examples, self.recipe.batch_size)

    def _step(self, batches: Sequence[Sequence[int]]) -> tuple[float, float, int]:
        """One step of the optimiser: the mean loss over its targets, the learning rate, tokens."""
        self.model.train()
        chosen = [[self.examples.learn[i] for i in batch] for batch in batches]
        counts = [self.task.count(batch) for batch in chosen]
        mean = 0.0
        for batch, count in zip(chosen, counts, strict=True):
            with self._precision():
                loss = self.task.loss(self.model, batch) * (count / sum(counts))
            loss.backward()  # type: ignore[no-untyped-call]
            mean += loss.item()
        if not abs(mean) < float("inf"):
            raise FloatingPointError(f"the loss is {mean} at step {self.progress.step + 1}: {ADVICE}")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.max_grad_norm)
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient is {norm:g} at step {self.progress.step + 1}: {ADVICE}")
        rate = self.recipe.learning_rate * self._share(self.progress.step)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return mean, rate, sum(example.num_tokens for batch in chosen for example in batch)

    def _precision(self) -> Any:
        enabled = self.recipe.dtype == "bfloat16"
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=enabled)

    def _evaluate(self) -> str:
        """Note the figures, and the weights when they are the best so far; what to tell of it."""
        state = random_state()
        metrics = self.measure(self.examples.held_out, generate=self.metric in GENERATED).metrics
        set_random_state(state)
        done, value = self.progress, metrics[self.metric]
        if not math.isfinite(value):
            raise FloatingPointError(f"{self.metric} is {value} after step {done.step}: {ADVICE}")
        done.evaluations.append({"step": done.step, **metrics})
        if done.best is None or better(self.metric, value, done.best):
            done.best, done.best_step, done.worse = value, done.step, 0
            if self.recipe.patience:
                self.best = copy_of(self.parameters)
        else:
            done.worse += 1
        return f"step {done.step}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())

    def _out_of_patience(self) -> bool:
        return 0 < self.recipe.patience <= self.progress.worse

    def _write(self) -> None:
        tensors = {f"learnt.{name}": tensor for name, tensor in copy_of(self.parameters).items()}
        for name, parameter in self.parameters.items():
            for part in MOMENTS if self._optimizer.state[parameter] else ():
                tensors[f"{part}.{name}"] = self._optimizer.state[parameter][part].cpu()
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        write_checkpoint(self.recipe.out, Checkpoint(self.progress, self._identity, {**tensors, **random_state()}))

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Be as the run was that wrote `checkpoint`."""
        tensors = checkpoint.tensors
        self.progress = checkpoint.progress
        restore(self.parameters, _part(tensors, "learnt"))
        for name, parameter in self.parameters.items():
            if f"step.{name}" in tensors:
                self._optimizer.state[parameter] = {
                    part: tensors[f"{part}.{name}"].to(parameter.device if part != "step" else "cpu")
                    for part in MOMENTS
                }
        self.best = _part(tensors, "best")
        set_random_state(tensors)


def better(metric: str, value: float, than: float) -> bool:
    return value < than if metric in LOWER_IS_BETTER else value > than


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Within, the first Ctrl-C is noted: the function given tells. A second one interrupts at once."""
    noted = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)

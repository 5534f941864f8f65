"""What the frozen base does, with a linear head alone where the task has one, and what guessing the commonest does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from server.engine.tasks import MULTI_LABEL, REGRESSION
from server.training.classification import SINGLE_LABEL, TextClassification
from server.training.examples import IGNORED, Example, Examples, by_length
from server.training.tagging import TextTagging

Head = TextClassification | TextTagging


@dataclass(frozen=True)
class Features:
    """What a linear head may read, and what it shall say."""

    x: list[NDArray[np.float32]]
    """[n, hidden_size] each, in one or several ways."""
    targets: NDArray[Any]


def baseline(task: Any, model: Any, examples: Examples, size: int) -> dict[str, float]:
    """Metrics of both on the held-out examples; of a task without a head those of the base itself.

    The head is scikit-learn's logistic regression (ridge for numbers) over what the task's own head reads, or over the
    mean of the hidden states where that does better: a pooler that nobody trained tells little. model: the PeftModel;
    size: examples computed at once.
    """
    if not isinstance(task, Head):
        with model.disable_adapter(), torch.no_grad():
            metrics = task.evaluate(model.eval(), examples.held_out, size, generate=True).metrics
        return {f"frozen_{name}": value for name, value in metrics.items()}
    with model.disable_adapter():
        learnt = _features(task, model, examples.learn, size)
        test = _features(task, model, examples.held_out, size)
    metric = "accuracy" if isinstance(task, TextTagging) else task.metrics[0]
    guesses = [_fit(task, x, learnt.targets).predict(x_test) for x, x_test in zip(learnt.x, test.x, strict=True)]
    return {
        f"majority_{metric}": _score(task, test.targets, _commonest(task, learnt.targets, test.targets)),
        f"frozen_{metric}": max(_score(task, test.targets, guess) for guess in guesses),
    }


def _score(task: Head, targets: NDArray[Any], guesses: NDArray[Any]) -> float:
    if isinstance(task, TextTagging):
        return float(np.mean(targets == guesses))
    return task.score(targets, guesses)[task.metrics[0]]


def _commonest(task: Head, learnt: NDArray[Any], test: NDArray[Any]) -> NDArray[Any]:
    """In the form of `test`: the commonest label; of several labels those of most examples; the mean of numbers."""
    if task.problem_type == REGRESSION:
        return np.full(len(test), learnt.mean())
    if task.problem_type == MULTI_LABEL:
        return np.broadcast_to(learnt.mean(0).round(), test.shape)
    return np.full(len(test), np.bincount(learnt).argmax())


def _fit(task: Head, x: NDArray[np.float32], y: NDArray[Any]) -> Any:
    regression: Any = LogisticRegression(max_iter=1000)
    if isinstance(task, TextClassification) and task.problem_type != SINGLE_LABEL:
        regression = Ridge() if y.ndim == 1 else OneVsRestClassifier(regression)
    return make_pipeline(StandardScaler(), regression).fit(x, y)


@torch.no_grad()
def _features(task: Head, model: Any, examples: Sequence[Example], size: int) -> Features:
    """Of every target."""
    model.eval()
    seen: list[torch.Tensor] = []
    hook = _head(model).register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    body = model.base_model.model.base_model
    body_hook = body.register_forward_hook(lambda _module, _arguments, output: seen.append(output.last_hidden_state))
    own, means, targets = [], [], []
    try:
        for indices in by_length(examples, size):
            batch = [examples[i] for i in indices]
            seen.clear()
            task.loss(model, batch)
            hidden, read = (tensor.float().cpu().numpy() for tensor in seen)
            for row, states, example in zip(read, hidden, batch, strict=True):
                length = len(example.input_ids)
                if isinstance(task, TextTagging):
                    labels = np.array(example.target.labels)
                    own.append(row[:length][labels != IGNORED])
                    targets.append(labels[labels != IGNORED])
                else:
                    place = length - 1 if _reads_last(model) else 0
                    own.append((row[place] if row.ndim == 2 else row)[None])
                    means.append(states[:length].mean(0)[None])
                    targets.append(np.array([example.target]))
    finally:
        hook.remove()
        body_hook.remove()
    return Features([np.concatenate(part) for part in (own, means) if part], np.concatenate(targets))


def _head(model: Any) -> nn.Module:
    """The module that peft saves whole."""
    name = next(name for name in ("score", "classifier") if hasattr(model.base_model.model, name))
    head: nn.Module = getattr(model.base_model.model, name)
    return head


def _reads_last(model: Any) -> bool:
    """Whether the head stands on a decoder, so that only the last token has seen the whole text."""
    return hasattr(model.base_model.model, "score")

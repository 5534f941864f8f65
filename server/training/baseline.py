"""What the frozen base does, with a linear head alone where the task has one, and what guessing the commonest does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from server.training.classification import SINGLE_LABEL, TextClassification
from server.training.examples import IGNORED, Example, by_length
from server.training.tagging import TextTagging

Head = TextClassification | TextTagging
Features = NDArray[np.float32]
"""[n, hidden_size]"""


def baseline(task: Any, model: Any, learn: Sequence[Example], test: Sequence[Example]) -> dict[str, float]:
    """Metrics of both on `test`; of a task without a head those of the base itself. model: the PeftModel.

    The head is scikit-learn's logistic regression (ridge for numbers) over what the task's own head reads.
    """
    if not isinstance(task, Head):
        with model.disable_adapter(), torch.no_grad():
            metrics = task.evaluate(model.eval(), test, generate=True).metrics
        return {f"frozen_{name}": value for name, value in metrics.items()}
    with model.disable_adapter():
        x, y = _features(task, model, learn)
        x_test, y_test = _features(task, model, test)
    guess = _fit(task, x, y).predict(x_test)
    if isinstance(task, TextTagging):
        return {
            "majority_accuracy": float(np.mean(y_test == np.bincount(y).argmax())),
            "frozen_accuracy": float(np.mean(guess == y_test)),
        }
    metric = task.metrics[0]
    if task.problem_type == SINGLE_LABEL:
        common = np.full(len(y_test), np.bincount(y).argmax())
    else:
        common = np.broadcast_to(y.mean(0).round() if y.ndim == 2 else y.mean(0), y_test.shape)
    scores = {"majority": task.score(y_test, common), "frozen": task.score(y_test, guess)}
    return {f"{name}_{metric}": values[metric] for name, values in scores.items()}


def _fit(task: Head, x: Features, y: NDArray[Any]) -> Any:
    regression: Any = LogisticRegression(max_iter=1000)
    if isinstance(task, TextClassification) and task.problem_type != SINGLE_LABEL:
        regression = Ridge() if y.ndim == 1 else OneVsRestClassifier(regression)
    return make_pipeline(StandardScaler(), regression).fit(x, y)


@torch.no_grad()
def _features(task: Head, model: Any, examples: Sequence[Example]) -> tuple[Features, NDArray[Any]]:
    """What the task's head reads for each target, and the targets."""
    model.eval()
    seen: list[torch.Tensor] = []
    hook = _head(model).register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    rows, targets = [], []
    try:
        for indices in by_length(examples, 32):
            batch = [examples[i] for i in indices]
            seen.clear()
            task.loss(model, batch)
            for row, example in zip(seen[0].float().cpu().numpy(), batch, strict=True):
                if isinstance(task, TextTagging):
                    labels = np.array(example.target.labels)
                    rows.append(row[: len(labels)][labels != IGNORED])
                    targets.append(labels[labels != IGNORED])
                else:
                    place = len(example.input_ids) - 1 if _reads_last(model) else 0
                    rows.append((row[place] if row.ndim == 2 else row)[None])
                    targets.append(np.array([example.target]))
    finally:
        hook.remove()
    return np.concatenate(rows), np.concatenate(targets)


def _head(model: Any) -> nn.Module:
    """The module that peft saves whole."""
    name = next(name for name in ("score", "classifier") if hasattr(model.base_model.model, name))
    head: nn.Module = getattr(model.base_model.model, name)
    return head


def _reads_last(model: Any) -> bool:
    """Whether the head stands on a decoder, so that only the last token has seen the whole text."""
    return hasattr(model.base_model.model, "score")

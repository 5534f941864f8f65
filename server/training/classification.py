"""SEQ_CLS: one label (`label`), several (`labels`), or a number (`value`) for a `text`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score, root_mean_squared_error
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from adapters.labels import PROBLEM_TYPES
from server.engine.tasks import MULTI_LABEL, REGRESSION, SequenceClassification
from server.training.data import InvalidData, InvalidRow, Row, convert_rows, read_rows
from server.training.examples import Evaluation, Example, by_length, padded, prepared

SINGLE_LABEL = PROBLEM_TYPES[0]
COLUMNS = {"label": SINGLE_LABEL, "labels": MULTI_LABEL, "value": REGRESSION}
METRICS = {
    SINGLE_LABEL: ("accuracy", "f1_macro", "f1_micro"),
    MULTI_LABEL: ("f1_micro", "f1_macro", "accuracy"),
    REGRESSION: ("r2", "pearson", "mae", "rmse"),
}


class TextClassification:
    """transformers' sequence classification, whichever its problem type."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] = ()) -> None:
        """labels: in this order; none: those of the first file, sorted."""
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self.problem_type: str | None = None
        self._prepare = SequenceClassification(tokenizer).prepare

    @property
    def metrics(self) -> tuple[str, ...]:
        """Of the problem type that was read."""
        assert self.problem_type is not None, "nothing was read"
        return (*METRICS[self.problem_type], "loss")

    def read(self, path: Path) -> list[Example]:
        rows = read_rows(path)
        kind = self.problem_type or _problem_type(path, rows[0])
        wanted = convert_rows(path, rows, lambda row: _wanted(row, kind))
        self.problem_type = kind
        if kind == REGRESSION and self.labels not in ((), ("value",)):
            raise InvalidData(f"{path} has values, which have no labels: {', '.join(self.labels)}")
        if not self.labels:
            self.labels = ("value",) if kind == REGRESSION else _all_labels(wanted)
        if not self.labels or (kind == SINGLE_LABEL and len(self.labels) == 1):
            raise InvalidData(f"{path}: there are no two labels, only {self.labels}: nothing to learn")
        pairs = dict(zip((row.line for row in rows), wanted, strict=True))
        return convert_rows(path, rows, lambda row: self._example(row.text("text"), pairs[row.line]))

    def _example(self, text: str, wanted: Any) -> Example:
        """target: the label's index; 0 or 1 for each label; a number."""
        unknown = [label for label in _listed(wanted) if label not in self.labels]
        if unknown:
            raise InvalidRow(f"the label {unknown[0]!r} is none of {', '.join(self.labels)}")
        target: Any = wanted
        if self.problem_type == MULTI_LABEL:
            target = [float(label in wanted) for label in self.labels]
        elif self.problem_type == SINGLE_LABEL:
            target = self.labels.index(wanted)
        return Example(text, tuple(prepared(self._prepare, text).token_ids), target, wanted, text)

    def load(self, location: str, dtype: torch.dtype) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            location, dtype=dtype, num_labels=len(self.labels), problem_type=self.problem_type
        )

    def count(self, batch: Sequence[Example]) -> int:
        return len(batch)

    def loss(self, model: Any, batch: Sequence[Example]) -> Tensor:
        loss: Tensor = self._forward(model, batch).loss
        return loss

    def evaluate(self, model: Any, examples: Sequence[Example], size: int, generate: bool) -> Evaluation:
        """Predictions: each with its logits."""
        del generate
        logits = np.zeros((len(examples), len(self.labels)), np.float32)
        total = 0.0
        for indices in by_length(examples, size):
            output = self._forward(model, [examples[i] for i in indices])
            logits[indices] = output.logits.float().cpu().numpy()
            total += float(output.loss) * len(indices)
        targets = np.array([example.target for example in examples])
        metrics = {"loss": total / len(examples), **self.score(targets, self._guesses(logits))}
        predictions = [{"predicted": self._answer(row), "logits": row.tolist()} for row in logits]
        return Evaluation(metrics, predictions)

    def _forward(self, model: Any, batch: Sequence[Example]) -> Any:
        inputs = padded((example.input_ids for example in batch), self.tokenizer.pad_token_id, model.device)
        kind = torch.long if self.problem_type == SINGLE_LABEL else torch.float32
        labels = torch.tensor([example.target for example in batch], dtype=kind, device=model.device)
        return model(**inputs, labels=labels)

    def _answer(self, logits: NDArray[np.float32]) -> Any:
        if self.problem_type == REGRESSION:
            return float(logits[0])
        if self.problem_type == MULTI_LABEL:
            return [label for label, value in zip(self.labels, logits, strict=True) if value > 0]
        return self.labels[int(logits.argmax())]

    def _guesses(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        """In the form of targets."""
        if self.problem_type == REGRESSION:
            return logits[:, 0]
        return (logits > 0).astype(np.float32) if self.problem_type == MULTI_LABEL else logits.argmax(-1)

    def score(self, targets: NDArray[Any], guesses: NDArray[Any]) -> dict[str, float]:
        """scikit-learn's metrics of guesses in the form of targets."""
        if self.problem_type == REGRESSION:
            return {
                "mae": float(mean_absolute_error(targets, guesses)),
                "rmse": float(root_mean_squared_error(targets, guesses)),
                "r2": float(r2_score(targets, guesses)),
                "pearson": _pearson(targets, guesses),
            }
        return {
            "accuracy": float(accuracy_score(targets, guesses)),
            "f1_macro": float(f1_score(targets, guesses, average="macro", zero_division=0)),
            "f1_micro": float(f1_score(targets, guesses, average="micro", zero_division=0)),
        }


def _problem_type(path: Path, row: Row) -> str:
    """By the column that there is."""
    found = [kind for column, kind in COLUMNS.items() if column in row.values]
    if len(found) != 1:
        raise InvalidData(
            f"{path}:{row.line}: SEQ_CLS needs one of the columns label (a class), labels (a list of classes), "
            f"value (a number), not {', '.join(map(repr, row.values))}"
        )
    return found[0]


def _wanted(row: Row, kind: str) -> Any:
    if kind == SINGLE_LABEL:
        return row.label("label")
    return row.texts("labels") if kind == MULTI_LABEL else row.number("value")


def _listed(wanted: Any) -> list[str]:
    return wanted if isinstance(wanted, list) else [wanted] if isinstance(wanted, str) else []


def _all_labels(wanted: Sequence[Any]) -> tuple[str, ...]:
    """Sorted; numbers as numbers."""
    labels = {label for each in wanted for label in _listed(each)}
    return tuple(sorted(labels, key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label)))


def _pearson(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The correlation; 0 where one of them is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])

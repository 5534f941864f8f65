"""What labels.json, or a transformers config.json beside an adapter, says of a classifier. Knows nothing of tensors."""

from __future__ import annotations

import re
from typing import Any

from adapters.errors import InvalidAdapter

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


def parse_labels(file: str, data: Any, max_labels: int) -> tuple[tuple[str, ...], str | None]:
    """Labels in order, none where the file names none, and the problem type.

    data: a list of labels, or an object with `labels` or `id2label`, and `problem_type`. Raises InvalidAdapter.
    """
    if isinstance(data, list):
        data = {"labels": data}
    if not isinstance(data, dict):
        raise InvalidAdapter([f"{file} is neither a list nor an object"])
    problem_type = data.get("problem_type")
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise InvalidAdapter([f"{file}: problem_type {problem_type!r}, known are {PROBLEM_TYPES}"])
    labels = _label_list(file, data.get("labels", data.get("id2label")))
    if len(labels) > max_labels:
        raise InvalidAdapter([f"{file} has {len(labels)} labels, over the limit {max_labels}"])
    return labels, problem_type


def _label_list(file: str, labels: Any) -> tuple[str, ...]:
    """A list, or {"0": "first", …}, as a tuple in order."""
    if labels is None:
        return ()
    if isinstance(labels, dict):
        numbered = {int(key): value for key, value in labels.items() if re.fullmatch("[0-9]{1,9}", key)}
        if sorted(numbered) != list(range(len(labels))):
            raise InvalidAdapter([f"{file}: the labels are not numbered from 0 without gaps"])
        labels = [numbered[i] for i in range(len(numbered))]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise InvalidAdapter([f"{file}: the labels must be a list of strings"])
    if len(set(labels)) != len(labels):
        raise InvalidAdapter([f"{file}: a label occurs twice"])
    return tuple(labels)

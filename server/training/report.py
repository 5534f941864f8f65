"""What lies beside an adapter: metrics.json, predictions.jsonl, a plot of the loss, labels.json, a README."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.checkpoint import LABELS_FILE
from server.training.checkpoint import Progress
from server.training.examples import Evaluation, Example

METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.jsonl"
PLOT_FILE = "loss.png"
README_FILE = "README.md"
MAX_POINTS = 200
SMOOTHING = 0.95


def write_json(file: Path, content: Any) -> None:
    """What is no number in JSON (NaN, infinity) is null."""
    text = json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_labels(directory: Path, labels: Sequence[str], problem_type: str | None) -> None:
    if labels:
        write_json(
            directory / LABELS_FILE, {"labels": labels, **({"problem_type": problem_type} if problem_type else {})}
        )


def write_predictions(directory: Path, examples: Sequence[Example], evaluation: Evaluation) -> None:
    """One line for each held-out example that has one: text, expected, and what the model said."""
    with (directory / PREDICTIONS_FILE).open("w", encoding="utf-8") as file:
        for example, prediction in zip(examples, evaluation.predictions, strict=False):
            line = {"text": example.text, "expected": example.expected, **prediction}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def thinned(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most MAX_POINTS of it, the last among them."""
    every = -(-len(history) // MAX_POINTS) or 1
    return history[::-1][::every][::-1]


def plot_loss(file: Path, progress: Progress, metric: str) -> None:
    """Training loss, as it was and smoothed, and the key metric of the evaluations."""
    from matplotlib.figure import Figure  # noqa: PLC0415  -- half a second

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [point["step"] for point in progress.history]
    losses = [point["loss"] for point in progress.history]
    axes.plot(steps, losses, color="#b8c4d6", linewidth=0.8, label="loss of each step")
    axes.plot(steps, smoothed(losses), color="#1f4e9c", label="smoothed")
    axes.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    handles, names = axes.get_legend_handles_labels()
    if progress.evaluations:
        right = axes.twinx()
        at = [point["step"] for point in progress.evaluations]
        right.plot(
            at, [point[metric] for point in progress.evaluations], "o-", color="#c2571a", label=f"held-out {metric}"
        )
        right.set_ylabel(f"held-out {metric}")
        more = right.get_legend_handles_labels()
        handles, names = handles + more[0], names + more[1]
    axes.legend(handles, names, loc="upper center", ncols=len(names), frameon=False, bbox_to_anchor=(0.5, 1.12))
    figure.savefig(file, dpi=110)


def smoothed(values: Sequence[float]) -> list[float]:
    """Each with those before it, which count less the longer they are ago; begins without a bias."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        result.append(mean / weight)
    return result


def write_readme(directory: Path, name: str, about: dict[str, Any], figures: dict[str, float], command: str) -> None:
    """about: what to say of data and model, as lines of a table."""
    lines = [f"# {name}", "", "| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in about.items())]
    lines += ["", "| on held-out examples | |", "| --- | --- |"]
    lines += [f"| {metric} | {value:.4g} |" for metric, value in figures.items()]
    lines += ["", f"Made by `{command}`.", "", f"![loss]({PLOT_FILE})"]
    (directory / README_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")

"""Short trainings on the real small bases: each metric gets better, and the server says what the trainer says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from server.training.loop import Loop
from server.training.recipe import Recipe
from server.training.run import Result, train
from tests.support import Live, live_server, relative, service_for
from tests.training.support import parts, recipe_for, rows_for, write_rows

METRICS = {"SEQ_CLS": "accuracy", "TOKEN_CLS": "f1", "CAUSAL_LM": "chrf", "FEATURE_EXTRACTION": "mrr"}
CASES = [("minilm", "SEQ_CLS"), ("minilm", "TOKEN_CLS"), ("minilm", "FEATURE_EXTRACTION"), ("smollm2", "CAUSAL_LM")]
SETTINGS: dict[str, dict[str, Any]] = {
    "SEQ_CLS": {"epochs": 4},
    "TOKEN_CLS": {"epochs": 4},
    "CAUSAL_LM": {"epochs": 2, "learning_rate": 2e-3, "target_modules": ["q_proj", "v_proj"], "max_new_tokens": 8},
    "FEATURE_EXTRACTION": {"epochs": 6, "batch_size": 16},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, tuple[float, Result]]:
    """Of each task its metric before, and what the training gave."""
    results = {}
    for base, task in CASES:
        recipe = recipe_of(base, task, folder)
        results[task] = untrained(recipe), train(recipe)
    return results


def recipe_of(base: str, task: str, folder: Path) -> Recipe:
    data = write_rows(folder / f"{task}.jsonl", rows_for(task, 64 if base == "minilm" else 32))
    return recipe_for(base, task, data, folder / base / task.lower(), **SETTINGS[task])


def untrained(recipe: Recipe) -> float:
    task, examples, model = parts(recipe)
    loop = Loop(recipe, task, model, examples, {})
    return loop.measure(examples.held_out, generate=True).metrics[METRICS[recipe.task]]


@pytest.fixture(scope="module", params=["minilm", "smollm2"])
def serving(
    request: pytest.FixtureRequest, base_location: dict[str, str], folder: Path, trained: dict[str, Any]
) -> Iterator[tuple[Live, list[str]]]:
    """A server of one base with the adapters that were trained on it, and their tasks."""
    base = request.param
    service = service_for(base_location[base], base, adapter_dir=str(folder / base))
    with live_server(service) as live:
        yield live, [task for on, task in CASES if on == base]


@pytest.mark.parametrize("task", METRICS)
def test_a_short_training_improves_the_metric(task: str, trained: dict[str, tuple[float, Result]]) -> None:
    before, result = trained[task]
    after = result.metrics[METRICS[task]]
    assert after > before, f"{METRICS[task]} was {before:.3f}"


@pytest.mark.parametrize("task", METRICS)
def test_what_lies_beside_an_adapter(task: str, trained: dict[str, tuple[float, Result]]) -> None:
    directory = trained[task][1].directory
    report = json.loads((directory / "metrics.json").read_text())
    assert report["metrics"] == trained[task][1].metrics
    assert report["steps"] == report["of_steps"] == report["history"][-1]["step"]
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"| {METRICS[task]} |" in (directory / "README.md").read_text()
    assert {tensor.dtype for tensor in load_file(directory / "adapter_model.safetensors").values()} == {torch.float16}
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] in (
        "sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M-Instruct",
    )  # fmt: skip
    assert config["inference_mode"] is True
    assert not (directory / "checkpoint.safetensors").exists()


def test_the_server_says_what_the_trainer_says(
    serving: tuple[Live, list[str]], trained: dict[str, tuple[float, Result]]
) -> None:
    live, tasks = serving
    for task in tasks:
        directory = trained[task][1].directory
        rows = [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]
        assert len(rows) > 5
        texts = [row["text"] for row in rows]
        body: dict[str, Any] = {"task": directory.name, "inputs": texts, "tokens": task == "TOKEN_CLS"}
        if task == "CAUSAL_LM":
            body["parameters"] = {"max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{live.url}/v1/predict", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        results = answer.json()["results"]
        assert [result["type"] for result in results] == [task] * len(rows)
        CHECKS[task](live, rows, results)


def check_classes(_live: Live, rows: list[Any], results: list[Any]) -> None:
    assert [result["label"] for result in results] == [row["predicted"] for row in rows]
    for row, result in zip(rows, results, strict=True):
        expected = torch.softmax(torch.tensor(row["logits"]), 0)
        assert relative(list(result["scores"].values()), expected) < 1e-4


def check_tags(_live: Live, rows: list[Any], results: list[Any]) -> None:
    served = [[token["label"] for token in result["tokens"]] for result in results]
    assert served == [row["predicted"] for row in rows]


def check_texts(_live: Live, rows: list[Any], results: list[Any]) -> None:
    assert [result["text"] for result in results] == [row["predicted"] for row in rows]


def check_ranks(live: Live, rows: list[Any], results: list[Any]) -> None:
    body = {"task": "feature_extraction", "inputs": [row["expected"] for row in rows]}
    positives = httpx.post(f"{live.url}/v1/predict", json=body).json()["results"]
    anchors, others = (np.array([result["embedding"] for result in each]) for each in (results, positives))
    scores = anchors @ others.T
    assert (1 + (scores > scores.diagonal()[:, None]).sum(1)).tolist() == [row["rank"] for row in rows]


CHECKS = {
    "SEQ_CLS": check_classes,
    "TOKEN_CLS": check_tags,
    "CAUSAL_LM": check_texts,
    "FEATURE_EXTRACTION": check_ranks,
}


@pytest.mark.parametrize("kind", ["labels", "value"])
def test_several_labels_and_numbers_are_learnt_and_served(
    kind: str, base_location: dict[str, str], tmp_path: Path
) -> None:
    rows = rows_for("SEQ_CLS", 64)
    for row in rows:
        label, thing = row.pop("label"), row["text"].split()[2]
        row[kind] = [label, thing] if kind == "labels" else 2.0 * (label == "warm")
    data = write_rows(tmp_path / "data.jsonl", rows)
    recipe = recipe_for("minilm", "SEQ_CLS", data, tmp_path / "adapters" / "made", epochs=8, baseline=True)
    result = train(recipe)
    metric = {"labels": "f1_micro", "value": "r2"}[kind]
    assert result.metrics[metric] > max(0.6, result.baseline[f"majority_{metric}"])
    made = [json.loads(line) for line in (result.directory / "predictions.jsonl").read_text().splitlines()]
    service = service_for(base_location["minilm"], "minilm", adapter_dir=str(tmp_path / "adapters"))
    with live_server(service) as live:
        body = {"task": "made", "inputs": [row["text"] for row in made]}
        results = httpx.post(f"{live.url}/v1/predict", json=body).json()["results"]
    for row, served in zip(made, results, strict=True):
        logits = torch.tensor(row["logits"])
        expected = torch.sigmoid(logits) if kind == "labels" else logits
        assert relative(list(served["scores"].values()), expected) < 1e-4

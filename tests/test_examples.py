"""The example adapters: whole, small, as good as their READMEs say, and served by their bases."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters.adapter import Limits
from adapters.checkpoint import read_checkpoint
from examples.train import HERE, NAMES
from server.engine.base_model import load_base

SEVEN = {
    "minilm/sentiment", "minilm/question-type", "minilm/address-tags",
    "smollm2/question-type", "smollm2/address-tags", "smollm2/translate-fr", "smollm2/support-chat",
}  # fmt: skip
FLOORS = {
    ("minilm/question-type", "accuracy"): 0.93,
    ("minilm/sentiment", "two-class accuracy"): 0.88,
    ("smollm2/translate-fr", "chrf"): 45,
}
MAX_BYTES = 20e6


def figures(name: str) -> dict[str, float]:
    """Those of the README."""
    table = (HERE / name / "README.md").read_text().split("| on held-out examples | |")[1]
    return {
        key: float(value) for key, value in re.findall(r"^\| ([\w -]+) \| (-?\d[\d.e+-]*) \|$", table, re.MULTILINE)
    }


def test_there_are_seven() -> None:
    assert set(NAMES) == SEVEN


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_says_what_was_measured(name: str) -> None:
    report = json.loads((HERE / name / "metrics.json").read_text())
    assert report["steps"] == report["of_steps"]
    assert report["held_out"] >= 100
    measured, said = {**report["metrics"], **report["baseline"]}, figures(name)
    assert {key: float(f"{value:.4g}") for key, value in measured.items()}.items() <= said.items()
    text = (HERE / name / "README.md").read_text()
    assert "| licence of the data | " in text
    assert f"python -m examples.train {name}" in text


@pytest.mark.parametrize("name", NAMES)
def test_lora_beats_the_frozen_base(name: str) -> None:
    """With a head, by accuracy; where it generates, by the loss of what a person would have it say."""
    found = figures(name)
    if "frozen_accuracy" in found:
        assert found["accuracy"] > max(found["frozen_accuracy"], found["majority_accuracy"]) + 0.02
    else:
        assert found["loss"] < 0.8 * found["frozen_loss"]


@pytest.mark.parametrize(("name", "metric"), FLOORS)
def test_figures_that_were_promised(name: str, metric: str) -> None:
    assert figures(name)[metric] >= FLOORS[name, metric]


def test_all_are_small_and_show_no_data_that_is_not_ours() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=HERE, capture_output=True, text=True, check=True)
    files = [HERE / name for name in listed.stdout.split("\0") if name]
    assert sum(file.stat().st_size for file in files) < MAX_BYTES
    assert not [file for file in files if file.name == "predictions.jsonl"]


@pytest.mark.parametrize("base", ["minilm", "smollm2"])
def test_each_loads_on_its_base(base: str, base_location: dict[str, str]) -> None:
    layout = load_base(base_location[base]).layout
    directories = [HERE / name for name in NAMES if name.startswith(f"{base}/")]
    assert len(directories) == {"minilm": 3, "smollm2": 4}[base]
    for directory in directories:
        adapter = read_checkpoint(directory, layout, Limits())
        tensors = load_file(directory / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        config = json.loads((directory / "adapter_config.json").read_text())
        assert "/" in config["base_model_name_or_path"]
        assert not Path(config["base_model_name_or_path"]).is_absolute()
        assert (len(adapter.info.labels) > 1) == (config["task_type"] != "CAUSAL_LM")

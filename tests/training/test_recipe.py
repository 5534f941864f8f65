"""Recipes: flags over a YAML file over the defaults, and what is refused."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest

from server.training.recipe import InvalidRecipe, Recipe, add_flags, load_recipe

NEEDED = ["--task", "SEQ_CLS", "--data", "data.jsonl", "--out", "out"]


def load(*flags: str) -> Recipe:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return load_recipe(vars(parser.parse_args(flags)))


def test_flags_over_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "base: minilm\ntask: SEQ_CLS\ndata: rows.csv\nrank: 4\nlearning_rate: 1e-3\ntarget_modules: [query, value]\n"
        "use_rslora: true\n"
    )
    recipe = load("--config", str(file), "--out", "there", "--rank", "16", "--no-use-rslora")
    assert (recipe.base, recipe.rank, recipe.learning_rate, recipe.use_rslora) == ("minilm", 16, 1e-3, False)
    assert (recipe.target_modules, recipe.batch_size) == (["query", "value"], 16)
    assert (recipe.data, recipe.out) == (tmp_path / "rows.csv", Path("there"))


def test_lists_have_commas_between() -> None:
    recipe = load(*NEEDED, "--target-modules", "q_proj,v_proj", "--labels", "good,bad")
    assert (recipe.target_modules, recipe.labels) == (["q_proj", "v_proj"], ["good", "bad"])


def test_the_command_trains_so_again() -> None:
    recipe = load(*NEEDED, "--rank", "4", "--target-modules", "q_proj,v_proj", "--baseline", "--no-bucket")
    words = shlex.split(recipe.command)
    assert words[:2] == ["multilora", "train"]
    again = load(*words[2:])
    assert again.decisive == recipe.decisive


def test_every_field_has_a_flag() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert {*Recipe.model_fields} <= {action.dest for action in parser._actions}
    assert "--gradient-checkpointing" in parser.format_help()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "task: Field required; data: Field required; out: Field required"),
        ([*NEEDED, "--rank", "0"], "rank: Input should be greater than or equal to 1"),
        ([*NEEDED, "--rank", "many"], "rank: Input should be a valid integer"),
        ([*NEEDED, "--eval-fraction", "1"], "eval-fraction: Input should be less than 1"),
        ([*NEEDED, "--resume", "--overwrite"], "contradict"),
        ([*NEEDED, "--labels", "a,b,a"], "a label occurs twice"),
        ([*NEEDED, "--serve-at", "http://x", "--name", "a b"], "the name 'a b' is none that a server takes"),
        ([*NEEDED[2:], "--task", "CAUSAL_LM", "--labels", "a,b"], "CAUSAL_LM has no labels"),
        ([*NEEDED[2:], "--task", "FEATURE_EXTRACTION", "--batch-size", "1"], "batch_size must be over 1"),
    ],
)
def test_what_is_refused(flags: list[str], reason: str) -> None:
    with pytest.raises(InvalidRecipe, match=reason):
        load(*flags)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("rnak: 3\n", "rnak: Extra inputs"),
        ("- a\n", "no.* mapping"),
        ("a: [\n", "is not YAML"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_refused(content: Any, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InvalidRecipe, match=reason):
        load("--config", str(file), *NEEDED)

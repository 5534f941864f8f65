"""Trainings on tiny bases: rows that a tiny model can learn, recipes of seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from server.bases import load_tokenizer, resolve_base
from server.engine.base_model import read_config
from server.training.model import build_model
from server.training.prepare import choose_padding, longest, make_task, split_examples
from server.training.recipe import Recipe, make_recipe

COLOURS = {"red": "warm", "orange": "warm", "yellow": "warm", "blue": "cold", "green": "cold", "violet": "cold"}
THINGS = ("fox", "dog", "house", "car", "hat", "cup")
WORDS = ("oak", "elm", "ash", "fir", "yew", "box", "one", "two", "three", "four", "five", "six")
CODES = dict(zip([*COLOURS, *THINGS], WORDS, strict=True))
"""Words that no base knows to belong together."""


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def rows_for(task: str, count: int = 48) -> list[dict[str, Any]]:
    """Rows with something in them that can be learnt."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        colour, thing = rng.choice(sorted(COLOURS)), rng.choice(THINGS)
        words = ["the", colour, thing, str(number)]
        text = " ".join(words)
        if task == "SEQ_CLS":
            rows.append({"text": text, "label": COLOURS[colour]})
        elif task == "TOKEN_CLS":
            rows.append({"tokens": words, "tags": ["O", "colour", "thing", "O"]})
        elif task == "CAUSAL_LM":
            rows.append({"prompt": text, "completion": COLOURS[colour]})
        else:
            rows.append({"anchor": text, "positive": f"{CODES[colour]} {CODES[thing]}"})
    return rows


def recipe_for(base: str, task: str, data: Path, out: Path, **settings: Any) -> Recipe:
    """Small and quick; settings go over it."""
    quick: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "eval_fraction": 0.25}
    return make_recipe({**quick, "base": base, "task": task, "data": data, "out": out, **settings})


def parts(recipe: Recipe) -> tuple[Any, Any, Any]:
    """Task, examples and model, as a run makes them."""
    source = resolve_base(recipe.base)
    tokenizer = load_tokenizer(source.location)
    config = read_config(source.location)
    choose_padding(tokenizer, config.pad_token_id)
    task = make_task(recipe, source, config, tokenizer)
    examples = split_examples(recipe, task, longest(recipe, config, tokenizer))
    return task, examples, build_model(recipe, task, source, tokenizer, torch.device("cpu"))

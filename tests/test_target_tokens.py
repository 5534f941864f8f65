"""What targets begin with and never hold is what transformers' `generate` makes of a base's generation_config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from server.engine.stack import CannotServe
from server.engine.target_tokens import forbidden, start_ids, unheeded
from tests.bases import ENCODER_DECODERS

NAMED = {base.name: base for base in ENCODER_DECODERS}


def saved(name: str, directory: Path, **generation: Any) -> Any:
    """A base loaded from a directory whose generation_config.json says this, and no more."""
    NAMED[name].save(directory)
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return AutoModelForSeq2SeqLM.from_pretrained(directory).eval()


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"decoder_start_token_id": 4}, (4,)),
        ({"decoder_start_token_id": 4, "bos_token_id": 6}, (4,)),
        ({"bos_token_id": 6}, (6,)),
        ({"decoder_start_token_id": 4, "forced_bos_token_id": 7}, (4, 7)),
        ({"bos_token_id": 6, "forced_bos_token_id": 7}, (6, 7)),
        ({"decoder_start_token_id": 0, "forced_bos_token_id": 0}, (0, 0)),
    ],
)
def test_a_target_begins_as_generate_does(
    generation: dict[str, int], expected: tuple[int, ...], tmp_path: Path
) -> None:
    """Whatever config.json says beside."""
    model = saved("BART", tmp_path, **generation)
    assert start_ids(model) == expected
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, num_beams=1, do_sample=False)[0].tolist()
    assert ids[: len(expected)] == list(expected)


def test_a_base_without_a_first_token_is_refused(tmp_path: Path) -> None:
    model = saved("T5", tmp_path, eos_token_id=1)
    with pytest.raises(ValueError, match="has to be defined for encoder-decoder generation"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
    with pytest.raises(CannotServe, match="names no token that a target starts with"):
        start_ids(model)


def test_single_tokens_are_forbidden(tmp_path: Path) -> None:
    model = saved("T5", tmp_path, bad_words_ids=[[3], [4, 5]], suppress_tokens=[7, 8])
    assert forbidden(model) == {3, 7, 8}


@pytest.mark.parametrize(
    ("generation", "names"),
    [
        ({}, []),
        ({"num_beams": 1, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "forced_eos_token_id": 2}, []),
        ({"num_beams": 4, "no_repeat_ngram_size": 3}, ["num_beams", "no_repeat_ngram_size"]),
        ({"min_length": 5, "bad_words_ids": [[3], [4, 5]]}, ["min_length", "bad_words_ids of several tokens"]),
        ({"begin_suppress_tokens": [3]}, ["begin_suppress_tokens"]),
    ],
)
def test_what_is_not_carried_out_is_named(generation: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    assert unheeded(saved("T5", tmp_path, **generation)) == names

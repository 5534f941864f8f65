"""How bases number a sequence's tokens is learned from the bases themselves."""

from __future__ import annotations

import pytest
import torch

from server.engine.positions import Positions, learn_positions
from tests.bases import DECODERS, ENCODERS, PADDED_ENCODERS, VOCABULARY, TinyBase

CPU = torch.device("cpu")
FROM_TWO = {"RoBERTa", "XLM-R"}
"""Padding has the id and the position 1."""


@pytest.mark.parametrize("base", [*DECODERS, *ENCODERS, *PADDED_ENCODERS], ids=lambda base: base.name)
def test_the_rule_is_learned(base: TinyBase) -> None:
    model = base.build()
    learned = learn_positions(model.base_model, VOCABULARY, model.config.pad_token_id, CPU)
    assert learned == (Positions(2, 1) if base.name in FROM_TWO else Positions())


def test_a_base_without_padding_is_counted_from_zero() -> None:
    roberta = next(base for base in ENCODERS if base.name == "RoBERTa").build()
    for pad_id in (None, VOCABULARY):
        assert learn_positions(roberta.base_model, VOCABULARY, pad_id, CPU) == Positions()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Positions(), [0, 1, 2, 3, 4, 5]),
        (Positions(first=2), [2, 3, 4, 5, 6, 7]),
        (Positions(first=2, skipped=1), [2, 1, 3, 1, 1, 4]),
    ],
)
def test_any_part_of_a_sequence_has_the_positions_of_the_whole(rule: Positions, expected: list[int]) -> None:
    ids = [7, 1, 8, 1, 1, 9]
    for start in range(len(ids)):
        for end in range(start, len(ids) + 1):
            assert rule.of(lambda a, b: ids[a:b], start, end) == expected[start:end]

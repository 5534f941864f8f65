"""Restraints: every row of logits is changed by its own biases, penalties and end tokens, and no other."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from server.engine.request import CAUSAL_LM, SamplingParams, Sequence
from server.engine.restraints import is_restrained, restrain
from server.engine.token_counts import TokenCounts

VOCABULARY = 50
CHOICES: dict[str, list[Any]] = {
    "logit_bias": [(), ((4, 2.5), (7, -100.0), (49, 1.0))],
    "repetition_penalty": [1.0, 1.3, 0.7],
    "frequency_penalty": [0.0, 0.5, -0.25],
    "presence_penalty": [0.0, 0.75],
    "min_tokens": [0, 2, 1000],
    "ignore_eos": [False, True],
    "stop_token_ids": [frozenset(), frozenset([7, 11])],
}


def random_sequence(rng: random.Random) -> Sequence:
    params = SamplingParams(max_tokens=2000, **{name: rng.choice(values) for name, values in CHOICES.items()})
    made = Sequence(0, CAUSAL_LM, rng.choices(range(VOCABULARY), k=rng.randint(1, 20)), None, params)
    made.output_ids.extend(rng.choices(range(VOCABULARY), k=rng.choice([0, 1, 30])))
    made.eos_ids, made.forbidden = frozenset([0, VOCABULARY + 3]), frozenset(rng.sample(range(VOCABULARY), k=2))
    return made


def expected_row(row: torch.Tensor, sequence: Sequence, p: SamplingParams) -> torch.Tensor:
    """Token by token."""
    y = row.clone()
    for token, bias in p.logit_bias:
        y[token] += bias
    early = len(sequence.output_ids) < p.min_tokens
    ends = p.stop_token_ids | (frozenset() if p.ignore_eos else sequence.eos_ids)
    times = Counter(sequence.output_ids)
    for token in range(len(y)):
        if token in sequence.forbidden or (early and token in ends):
            y[token] = float("-inf")
        if token in sequence.prompt_ids or token in times:
            y[token] = y[token] / p.repetition_penalty if y[token] > 0 else y[token] * p.repetition_penalty
        if token in times:
            y[token] -= times[token] * p.frequency_penalty + p.presence_penalty
    return y


@pytest.mark.parametrize("seed", range(20))
def test_each_row_by_its_own(seed: int) -> None:
    rng = random.Random(seed)
    sequences = [random_sequence(rng) for _ in range(7)]
    logits = torch.randn(7, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    chosen = rng.sample(range(7), k=rng.randint(0, 7))
    before = logits.clone()
    for _ in range(2):  # as a sequence grows, with what was counted before
        restrained = {row: (sequences[row], p) for row in chosen if (p := sequences[row].params)}
        restrain(logits, restrained)
        for row, sequence in enumerate(sequences):
            expected = expected_row(before[row], *restrained[row]) if row in chosen else before[row]
            torch.testing.assert_close(logits[row], expected)
            sequence.output_ids.extend(rng.choices(range(VOCABULARY), k=5))
        logits.copy_(before)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, False),
        ({"temperature": 0.0, "top_p": 0.5, "logprobs": 3}, False),
        ({"logit_bias": ((1, 1.0),)}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"min_tokens": 2}, True),
        ({"min_tokens": 1}, False),
    ],
)
def test_which_rows_are_restrained(own: dict[str, Any], expected: bool) -> None:
    params = SamplingParams(max_tokens=9, **own)
    made = Sequence(0, CAUSAL_LM, [1, 2], None, params, output_ids=[3])
    assert is_restrained(made, params) == expected


def test_what_its_base_never_generates_restrains_a_row() -> None:
    params = SamplingParams(max_tokens=9)
    assert is_restrained(Sequence(0, CAUSAL_LM, [1], None, params, forbidden=frozenset([5])), params)


def test_counts_grow_with_the_output() -> None:
    rng = random.Random(1)
    prompt, output = rng.choices(range(30), k=12), []
    counts = TokenCounts(prompt)
    for _ in range(40):
        output += rng.choices(range(60), k=rng.randint(0, 3))
        ids, times = counts.after(output)
        expected = dict.fromkeys(prompt, 0) | Counter(output)
        assert dict(zip(ids.tolist(), times.tolist(), strict=True)) == expected
        assert len(set(ids.tolist())) == len(ids)


def test_a_token_that_is_never_generated_touches_no_other_row() -> None:
    params = SamplingParams(max_tokens=9, repetition_penalty=2.0)
    logits = torch.ones(2, VOCABULARY)
    restrain(logits, {0: (Sequence(0, CAUSAL_LM, [VOCABULARY, 3], None, params), params)})
    assert logits[0, 3] == 0.5
    assert float(logits.sum()) == 2 * VOCABULARY - 0.5

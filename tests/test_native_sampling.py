"""Tokens that the CPU kernels draw against an oracle in double precision."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.kernels.library import Draw, Library
from server.engine.request import CAUSAL_LM, NOT_FINITE, SamplingParams, Sequence
from server.engine.sampler import sample
from tests.native_support import torch_threads
from tests.test_decoder_stack import engine_with
from tests.test_fused import model_of

NEAR = 1e-6
"""Relative: what rounding may decide otherwise."""
LOWEST = -87.33
"""Below it e^x is 0 (native/vector.h)."""


@dataclass(frozen=True)
class Rule:
    """library.Draw."""

    temperature: float = 1.0
    min_p: float = 0.0
    top_p: float = 1.0
    uniform: float = 0.5
    top_k: int = 0


RULES = {
    "plain": Rule(),
    "cold": Rule(temperature=0.05),
    "hot": Rule(temperature=4.0),
    "min-p": Rule(min_p=0.1),
    "top-k": Rule(top_k=5),
    "top-k of many": Rule(top_k=600, temperature=3.0),
    "top-p": Rule(top_p=0.7),
    "almost all": Rule(top_p=0.999, temperature=2.0),
    "almost none": Rule(top_p=1e-6),
    "everything": Rule(1.3, 0.001, 0.9, top_k=40),
    "coldest": Rule(temperature=1e-5),
    "all of min-p": Rule(min_p=1.0),
    "top-k of all": Rule(top_k=2**31 - 1),
    "as many as blocks": Rule(top_k=4),
    "one more": Rule(top_k=5, top_p=0.9),
    "nearly 1": Rule(top_p=1 - 1e-8),
    "nearly 0": Rule(top_p=1e-50),
}
UNIFORMS = (0.0, 1e-9, 0.1, 0.5, 0.77, 0.999, 1 - 2**-53)


def numbers(kind: str, vocabulary: int) -> Tensor:
    """Of steps of 1/64, so that what is not equal differs by more than rounding."""
    x = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 3
    if kind == "equal":
        x = torch.full((vocabulary,), -7.0)
    elif kind == "forbidden":
        x[torch.arange(vocabulary) % 3 != vocabulary % 3] = float("-inf")
        x[-1] = 1.0
    elif kind == "one":
        x[vocabulary // 2] = 90.0
    return (x * 64).round() / 64


def oracle(x: NDArray[np.float64], rule: Rule, min_p: float, top_p: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Tokens that may be drawn, in the order in which they are inverted, and their cumulated probabilities.

    min_p, top_p: instead of the rule's own.
    """
    powers = (x - x.max()) / rule.temperature
    weights = np.exp(powers)
    weights[(weights < min(min_p, 1.0)) | (powers < LOWEST)] = 0
    order = np.flatnonzero(weights)
    if rule.top_k or rule.top_p < 1:
        order = order[np.argsort(-weights[order], kind="stable")][: rule.top_k or None]
        sums = weights[order].cumsum()
        order = order[: 1 + int((sums < top_p * sums[-1]).sum())]
    sums = weights[order].cumsum()
    return order, sums / sums[-1]


def acceptable(x: Tensor, rule: Rule) -> set[int]:
    """What the oracle draws for numbers that differ by no more than rounding."""
    found: set[int] = set()
    for a, b in itertools.product((1 - NEAR, 1.0, 1 + NEAR), repeat=2):
        order, sums = oracle(x.double().numpy(), rule, rule.min_p * a, rule.top_p * b)
        first, last = np.searchsorted(sums, (rule.uniform - NEAR, rule.uniform + NEAR), side="right")
        found |= set(order[first : last + 1].tolist())
    return found


def draw(library: Library, rows: Tensor, rules: list[Rule]) -> list[int]:
    draws = (Draw * len(rules))(*(Draw(*astuple(rule)) for rule in rules))
    tokens = torch.full((len(rules) + 1,), -7)
    library.sample(rows.data_ptr(), *rows.shape, ctypes.addressof(draws), tokens.data_ptr())
    *found, after = tokens.tolist()
    assert after == -7
    return found


@pytest.mark.parametrize("vocabulary", [1, 3, 31, 255, 256, 257, 1000, 20_011])
@pytest.mark.parametrize("kind", ["random", "equal", "forbidden", "one"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_tokens_are_the_oracles(library: Library, rule: Rule, kind: str, vocabulary: int) -> None:
    x = numbers(kind, vocabulary)
    rules = [replace(rule, uniform=uniform) for uniform in UNIFORMS]
    found = draw(library, x.repeat(len(rules), 1), rules)
    for each, token in zip(rules, found, strict=True):
        assert token in acceptable(x, each), each


@pytest.mark.parametrize("vocabulary", [1, 3, 40, 257, 49_152])
@pytest.mark.parametrize("kind", ["random", "equal", "forbidden", "one"])
def test_without_temperature_the_first_of_the_greatest(library: Library, kind: str, vocabulary: int) -> None:
    x = numbers(kind, vocabulary)
    assert draw(library, x[None], [Rule(temperature=0.0)]) == [int(x.argmax())]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_no_row_depends_on_its_neighbours(library: Library, threads: int) -> None:
    rules = [
        replace(rule, uniform=uniform)
        for rule, uniform in itertools.product([*RULES.values(), Rule(temperature=0.0)], (0.2, 0.6))
    ]
    rows = torch.randn(len(rules), 3001, generator=torch.Generator().manual_seed(1)) * 2
    alone = [draw(library, row[None], [rule])[0] for row, rule in zip(rows, rules, strict=True)]
    with torch_threads(threads):
        assert draw(library, rows, rules) == alone


def test_the_smallest_set_that_has_top_p(library: Library) -> None:
    """0.3 in fp32 is more than that."""
    rows, rule = torch.zeros(1, 10), Rule(top_p=0.3, uniform=0.9)
    assert draw(library, rows, [rule]) == [2]
    sequence = Sequence(0, CAUSAL_LM, [1], None, SamplingParams(max_tokens=1, top_p=0.3))
    assert {sample(rows.clone(), [sequence], library)[0].token_id for _ in range(200)} == {0, 1, 2}


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("vocabulary", "place"), [(1000, 700), (1003, 1002), (1003, 0), (3, 2), (3, 0), (1, 0)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_told_and_harms_no_other(
    library: Library, fault: float, vocabulary: int, place: int, temperature: float
) -> None:
    rows = torch.randn(3, vocabulary)
    rows[1, place] = fault
    if fault < 0:
        rows[1] = fault
    changed: dict[str, Any] = {"logit_bias": ((place, -5.0),), "logprobs": 1}
    for own in ({}, {"top_p": 0.5}, {"top_k": 3}, {"logprobs": 1}, changed, {"min_p": 0.1, "repetition_penalty": 1.1}):
        rule = SamplingParams(max_tokens=1, temperature=temperature, seed=1, **own)
        results = sample(rows.clone(), [Sequence(i, CAUSAL_LM, [0], None, rule) for i in range(3)], library)
        assert [result.error for result in results] == [None, NOT_FINITE, None]


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", [0, 1])
def test_what_is_not_finite_is_told_where_no_token_may_be(library: Library, fault: float, bad: int) -> None:
    """And in a row that stays as it is beside one that is changed."""
    for kernels in (None, library):
        rows = torch.randn(2, 300)
        rows[bad, 7] = fault
        sequences = [Sequence(i, CAUSAL_LM, [1], None, SamplingParams(max_tokens=1)) for i in range(2)]
        sequences[1].forbidden = frozenset({7})
        errors = [result.error for result in sample(rows, sequences, kernels)]
        assert errors == [NOT_FINITE if row == bad else None for row in range(2)]


@pytest.mark.parametrize("own", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 2}])
def test_where_nothing_is_allowed_no_token_is_given(library: Library, own: dict[str, Any]) -> None:
    for kernels in (None, library):
        sequences = [Sequence(i, CAUSAL_LM, [1], None, SamplingParams(max_tokens=1, **own)) for i in range(2)]
        sequences[1].forbidden = frozenset(range(300))
        errors = [result.error for result in sample(torch.randn(2, 300), sequences, kernels)]
        assert errors == [None, "no token is allowed here"]


def test_an_engine_draws_by_the_kernels(library: Library) -> None:
    assert engine_with(library, model_of("LlamaConfig", {})).runner.library is library

"""The sampler against transformers' own logits processors, and its independence from neighbours."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adapters.kernels.library import Library, usable_targets
from server.engine import sampler
from server.engine.request import CAUSAL_LM, RowResult, SamplingParams, Sequence
from tests.native_support import library_of

VOCABULARY = 40
DRAWS = 4000
BY_TORCH = "torch"


class Kernels:
    """Which draw in the test that runs; None: torch does."""

    library: Library | None = None


@pytest.fixture(autouse=True, params=[BY_TORCH, *usable_targets()])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernels, "library", None if request.param == BY_TORCH else library_of(request.param))


by_torch = pytest.mark.parametrize("kernels", [BY_TORCH], indirect=True)


def sample(values: torch.Tensor, sequences: list[Sequence]) -> list[RowResult]:
    return sampler.sample(values, sequences, Kernels.library)


def sequence(output: list[int] | None = None, prompt: list[int] | None = None, **params: Any) -> Sequence:
    made = Sequence(0, CAUSAL_LM, prompt or [1, 2, 3], None, SamplingParams(**{"max_tokens": 100, **params}))
    made.output_ids.extend(output or [])
    made.eos_ids = frozenset([0])
    return made


def logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def token(values: torch.Tensor, made: Sequence) -> int:
    result = sample(values.clone(), [made])[0].token_id
    assert result is not None
    return result


def test_a_bias_is_added_to_its_row_only() -> None:
    values = logits(rows=3)
    biases = ((4, 2.5), (7, -100.0), (9, 1.0))
    plain, biased = sequence(temperature=1.0, seed=1), sequence(temperature=1.0, seed=1, logit_bias=biases)
    expected = values[1].clone()
    for place, bias in biases:
        expected[place] += bias
    probs = expected.softmax(-1)
    counts: Counter[int | None] = Counter()
    for _ in range(DRAWS):
        _, second, third = sample(values.clone(), [plain, biased, sequence(temperature=0.0)])
        counts[second.token_id] += 1
        assert third.token_id == int(values[2].argmax())
    frequencies = torch.tensor([counts[i] / DRAWS for i in range(VOCABULARY)])
    assert float((frequencies - probs).abs().max()) < 0.03
    assert counts[7] == 0


RESTRICTIONS = [
    ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    ({"top_k": 5}, [TopKLogitsWarper(5)]),
    ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
    ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
    ({"temperature": 1.5, "top_k": 8, "top_p": 0.7},
     [TemperatureLogitsWarper(1.5), TopKLogitsWarper(8), TopPLogitsWarper(0.7)]),
]  # fmt: skip


@pytest.mark.parametrize(("params", "warpers"), RESTRICTIONS)
def test_drawn_frequencies_are_those_of_transformers(params: dict[str, Any], warpers: list[Any]) -> None:
    values = logits()
    expected = values.clone()
    for warper in warpers:
        expected = warper(torch.tensor([[1]]), expected)
    probs = expected.softmax(-1)[0]
    made = sequence(seed=1, **params)
    drawn = Counter(token(values, made) for _ in range(DRAWS))
    assert all(probs[token_id] > 0 for token_id in drawn), "a token outside the restricted set was drawn"
    for token_id in range(VOCABULARY):
        share, p = drawn[token_id] / DRAWS, float(probs[token_id])
        assert abs(share - p) < 5 * (p * (1 - p) / DRAWS) ** 0.5 + 1e-3


def test_greedy_takes_the_largest() -> None:
    values = logits(3)
    assert token(values, sequence(temperature=0.0)) == int(values.argmax())


@by_torch
@pytest.mark.parametrize("vocabulary", [1, 40, 511, 512, 513, 1024, 49152])
@pytest.mark.parametrize("numbers", ["random", "ties", "none", "the last"])
def test_the_greatest_is_that_of_the_whole_row(vocabulary: int, numbers: str) -> None:
    values = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    if numbers == "ties":
        values = values.round()
    elif numbers == "none":
        values.fill_(float("-inf"))
    elif numbers == "the last":
        values[:, -1] = 100
    assert sampler.greatest(values).tolist() == [row.index(max(row)) for row in values.tolist()]


def test_top_k_of_one_is_greedy_whatever_the_seed() -> None:
    values = logits(4)
    assert {token(values, sequence(seed=seed, top_k=1)) for seed in range(20)} == {int(values.argmax())}


def test_the_smallest_top_p_leaves_one_token() -> None:
    values = logits(5)
    assert {token(values, sequence(seed=seed, top_p=1e-6)) for seed in range(20)} == {int(values.argmax())}


def test_repetition_penalty_is_transformers() -> None:
    values = logits(6)
    prompt, output = [1, 2, 3], [7, 8, 7]
    expected = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([prompt + output]), values.clone())
    made = sequence(output, prompt, temperature=0.0, repetition_penalty=1.8)
    changed = values.clone()
    sample(changed, [made])
    torch.testing.assert_close(changed, expected)


def test_frequency_and_presence_count_the_output_only() -> None:
    values = logits(7)
    changed = values.clone()
    sample(changed, [sequence([7, 8, 7], [9, 9], temperature=0.0, frequency_penalty=0.5, presence_penalty=0.25)])
    expected = values.clone()
    expected[0, 7] -= 2 * 0.5 + 0.25
    expected[0, 8] -= 0.5 + 0.25
    torch.testing.assert_close(changed, expected)


@pytest.mark.parametrize(("output", "ends"), [([], False), ([5, 5], True)])
def test_no_end_before_min_tokens(output: list[int], ends: bool) -> None:
    values = logits(8)
    values[0, 0] = values[0, 11] = 50.0  # the end token, and a stop token
    made = sequence(output, temperature=0.0, min_tokens=2, stop_token_ids=frozenset([11]))
    assert (token(values, made) in (0, 11)) == ends


def test_min_tokens_without_any_end_token_changes_nothing() -> None:
    values = logits(8)
    made = sequence(temperature=0.0, min_tokens=2, ignore_eos=True)
    assert token(values, made) == int(values.argmax())


def test_a_seed_gives_the_same_tokens_alone_and_among_others() -> None:
    values = logits(9, rows=6)
    params: list[dict[str, Any]] = [
        {"seed": 1}, {"seed": 2, "top_p": 0.5}, {"temperature": 0.0}, {"seed": 3, "min_p": 0.1, "temperature": 2.0},
        {"seed": 4, "top_k": 3}, {"seed": 5, "repetition_penalty": 1.3},
    ]  # fmt: skip
    together = [sequence(**p) for p in params]
    alone = [sequence(**p) for p in params]
    for _ in range(20):
        tokens = [result.token_id for result in sample(values.clone(), together)]
        assert tokens == [token(values[row : row + 1], made) for row, made in enumerate(alone)]


def test_different_seeds_differ() -> None:
    values = logits(10)
    drawn = {tuple(token(values, made) for _ in range(8)) for made in (sequence(seed=s) for s in range(10))}
    assert len(drawn) == 10


def test_logprobs_are_those_before_penalties_and_temperature() -> None:
    values = logits(11, rows=2)
    made = [sequence([5], temperature=0.3, seed=1, repetition_penalty=5.0, logprobs=4), sequence(temperature=0.0)]
    first, second = sample(values.clone(), made)
    expected = values[0].log_softmax(-1)
    assert first.logprobs is not None
    assert first.logprobs.token_id == first.token_id
    assert first.logprobs.logprob == pytest.approx(float(expected[first.logprobs.token_id]))
    top, ids = expected.topk(4)
    assert [token_id for token_id, _ in first.logprobs.top] == ids.tolist()
    assert [value for _, value in first.logprobs.top] == pytest.approx(top.tolist())
    assert second.logprobs is None


@by_torch
@pytest.mark.parametrize("params", [{"top_p": 0.5}, {"top_p": 0.99}, {"top_k": 3}, {"top_k": 20, "top_p": 0.9}, {}])
def test_a_few_candidates_give_what_the_whole_vocabulary_gives(
    monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    values = logits(6, rows=16)
    made = [sequence(seed=row, **params) for row in range(16)]
    whole = [result.token_id for result in sample(values.clone(), made)]
    monkeypatch.setattr(sampler, "CANDIDATES", 4)
    again = [sequence(seed=row, **params) for row in range(16)]
    assert [result.token_id for result in sample(values.clone(), again)] == whole
    assert len(set(whole)) > 1


@by_torch
@pytest.mark.parametrize("count", [1, 40, 255, 256, 257, 1000])
def test_inversion_finds_the_first_place_above_and_none_of_probability_zero(count: int) -> None:
    probs = torch.rand(5, count, generator=torch.Generator().manual_seed(count))
    probs[:, count // 2 :] *= torch.rand(5, count - count // 2) > 0.5
    probs[:, -1] = 0.0 if count > 1 else 1.0
    probs[:, 0] = 0.0 if count > 2 else 1.0
    sums = probs.double().cumsum(-1)
    for u in (0.0, 0.25, 0.5, 1 - 2**-53):
        uniform = torch.full((5,), u, dtype=torch.float64)
        places = sampler._invert(probs, uniform)
        assert bool((probs.gather(-1, places[:, None]) > 0).all())
        expected = (sums > u * sums[:, -1:]).to(torch.uint8).argmax(-1)
        assert torch.equal(places, expected) or u > 0.99  # there rounding may choose the place before

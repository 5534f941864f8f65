"""Greedy generation gives `peft`'s tokens, alone, among 31 others, in chunks, and after preemption."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from server.bases import load_tokenizer
from server.engine.request import CAUSAL_LM, FEATURE_EXTRACTION, SamplingParams
from tests.support import Runner, Spec, make_adapter, peft_model, random_ids

SPECS = [
    Spec("a", CAUSAL_LM, 4, ["q_proj", "v_proj"], options={"lora_alpha": 128}),
    Spec("b", CAUSAL_LM, 16, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    Spec("c", CAUSAL_LM, 64, ["gate_proj", "down_proj"], options={"lora_alpha": 512}),
    Spec("d", CAUSAL_LM, 8, "all-linear", options={"use_rslora": True}),
    Spec("e", CAUSAL_LM, 32, ["q_proj", "o_proj"], options={"lora_alpha": 1024}),
]
NAMES = [None, *(spec.name for spec in SPECS)]
NEW_TOKENS = 24
TEXT = (
    "The lighthouse keeper had counted ships for thirty years, and none of them had ever stopped. One evening in "
    "late autumn, when the wind came from the north and the gulls kept to the rocks, a small boat with a torn sail "
    "turned towards the harbour. He put down his pen, took the lamp from its hook and walked down to the pier, where "
    "the tide was already licking the lowest steps."
)


@pytest.fixture(scope="module", params=["tiny-llama", "smollm2"])
def case(request: Any, base_location: dict[str, str], tmp_path_factory: Any) -> dict[str, Any]:
    """32 prompts over six models, and what peft generates for six of them."""
    base = request.param
    location, folder = base_location[base], tmp_path_factory.mktemp(base)
    scale = 1.0 if base == "tiny-llama" else 0.2
    checkpoints = {spec.name: make_adapter(location, folder, spec, scale) for spec in SPECS}
    words = load_tokenizer(location)(TEXT)["input_ids"] if base == "smollm2" else random_ids(200, 0)
    prompts = [words[i : i + 5 + 7 * (i % 6) + i] for i in range(32)]
    expected, on_one_prompt = {}, set()
    for i, name in enumerate(NAMES):
        model = peft_model(location, checkpoints[name] if name else None, CAUSAL_LM)
        expected[i] = peft_tokens(model, prompts[i])
        on_one_prompt.add(tuple(peft_tokens(model, prompts[10])))
    assert len(on_one_prompt) == len(NAMES), "the adapters must differ on one prompt"
    return {"location": location, "checkpoints": checkpoints, "prompts": prompts, "expected": expected}


def peft_tokens(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def run(case: dict[str, Any], count: int, first: int = 0, **settings: Any) -> tuple[list[list[int]], Runner]:
    """Tokens of prompts first … first + count − 1, all submitted at once."""
    runner = Runner(case["location"], **settings)
    for checkpoint in case["checkpoints"].values():
        runner.load(checkpoint)
    # peft suppresses the end token so that all answers have one length; so do we
    params = SamplingParams(max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, temperature=0.0)
    rows = [
        runner.submit(CAUSAL_LM, case["prompts"][i], NAMES[i % len(NAMES)], params) for i in range(first, first + count)
    ]
    runner.submit(FEATURE_EXTRACTION, case["prompts"][0])
    runner.drain()
    return [row.output_ids for row in rows], runner


def test_same_tokens_as_peft_among_31_others(case: dict[str, Any]) -> None:
    tokens, runner = run(case, 32)
    assert max(len(step.counts) for step in runner.engine.steps) >= 32
    for i, expected in case["expected"].items():
        assert tokens[i] == expected, NAMES[i]


def test_same_tokens_alone(case: dict[str, Any]) -> None:
    for i in range(3):
        tokens, _ = run(case, 1, first=i)
        assert tokens[0] == case["expected"][i]


def test_same_tokens_in_chunks(case: dict[str, Any]) -> None:
    tokens, runner = run(case, 12, max_num_batched_tokens=13)
    assert max(step.num_tokens for step in runner.engine.steps) <= 13
    for i, expected in case["expected"].items():
        assert tokens[i] == expected


def test_same_tokens_after_preemption(case: dict[str, Any]) -> None:
    page_bytes = Runner(case["location"]).engine.cache.backend.bytes_per_block
    tokens, runner = run(case, 12, kv_cache_bytes=14 * page_bytes, max_model_len=128)
    assert runner.engine.scheduler.preemptions > 0
    assert sum(step.preempted for step in runner.engine.steps) > 0
    for i, expected in case["expected"].items():
        assert tokens[i] == expected


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 13}, {"kv_cache_bytes": 0}])
def test_the_prompts_own_logprobs_are_pefts(case: dict[str, Any], settings: dict[str, Any]) -> None:
    """Whole, in chunks, and computed again after preemption; rows that want none run beside."""
    if "kv_cache_bytes" in settings:
        page_bytes = Runner(case["location"]).engine.cache.backend.bytes_per_block
        settings = {"kv_cache_bytes": 14 * page_bytes, "max_model_len": 128}
    runner = Runner(case["location"], **settings)
    for checkpoint in case["checkpoints"].values():
        runner.load(checkpoint)
    wants = SamplingParams(max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, temperature=0.0, prompt_logprobs=3)
    rows = [
        runner.submit(
            CAUSAL_LM, case["prompts"][i], NAMES[i % 6], wants if i < 6 else replace(wants, prompt_logprobs=None)
        )
        for i in range(12)
    ]
    nothing = runner.submit(CAUSAL_LM, case["prompts"][1], NAMES[1], replace(wants, max_tokens=0, min_tokens=0))
    runner.drain()
    assert bool(runner.engine.scheduler.preemptions) == ("max_model_len" in settings)
    for i, row in enumerate(rows):
        told = [output.prompt_logprobs for output in runner.outputs[row.id]]
        assert not any(told[1:]), "with the first news only"
        if i >= 6:
            assert not told[0]
            continue
        assert row.output_ids == case["expected"][i]
        expected = peft_logprobs(case, i)
        assert [entry.token_id for entry in told[0]] == case["prompts"][i][1:]
        for place, entry in enumerate(told[0]):
            assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=1e-3)
            values, ids = expected[place].topk(3)
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-3)
            assert entry.top[0][0] == int(ids[0]) or values[0] - values[1] < 1e-3
    (only,) = runner.outputs[nothing.id]
    assert (only.token_id, only.finish_reason, nothing.output_ids) == (None, "length", [])
    assert [e.logprob for e in only.prompt_logprobs] == pytest.approx(
        [e.logprob for e in runner.outputs[rows[1].id][0].prompt_logprobs], abs=1e-4
    )


@torch.no_grad()
def peft_logprobs(case: dict[str, Any], i: int) -> torch.Tensor:
    """[n − 1, vocabulary] of the i-th prompt."""
    name = NAMES[i]
    model = peft_model(case["location"], case["checkpoints"][name] if name else None, CAUSAL_LM)
    logits = model(input_ids=torch.tensor([case["prompts"][i]])).logits[0, :-1]
    return logits.float().log_softmax(-1)

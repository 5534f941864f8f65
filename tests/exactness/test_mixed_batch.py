"""Every row of a mixed batch equals `peft` with that row's adapter alone, on tiny and on real bases."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.engine.request import CAUSAL_LM, FEATURE_EXTRACTION, SEQ_CLS, TOKEN_CLS, SamplingParams
from tests.support import Runner, Spec, make_adapter, peft_model, peft_values, random_ids, relative

LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DECODER = [
    Spec("chat-4", CAUSAL_LM, 4, LLAMA_LINEARS),
    Spec("chat-64", CAUSAL_LM, 64, ["q_proj", "v_proj"], options={"use_rslora": True}),
    Spec("chat-mixed", CAUSAL_LM, 8, LLAMA_LINEARS,
         options={"rank_pattern": {"q_proj": 24, r"layers\.1\.mlp\.up_proj": 5}, "alpha_pattern": {"down_proj": 3}}),
    Spec("chat-dora", CAUSAL_LM, 8, LLAMA_LINEARS, options={"use_dora": True}),
    Spec("sort-16", SEQ_CLS, 16, "all-linear", labels=7),
    Spec("sort-regexp", SEQ_CLS, 12, r".*\.self_attn\.(q|k)_proj", labels=2),
    Spec("tag-32", TOKEN_CLS, 32, LLAMA_LINEARS, labels=5),
    Spec("embed-8", FEATURE_EXTRACTION, 8, LLAMA_LINEARS),
]  # fmt: skip
ENCODER = [
    Spec("sort-4", SEQ_CLS, 4, ["query", "value"], labels=2),
    Spec("sort-dense", SEQ_CLS, 16, ["query", "key", "value", "dense"], labels=9),
    Spec("sort-bias", SEQ_CLS, 8, ["query", "output.dense"], labels=3, options={"bias": "lora_only"}),
    Spec("sort-all", SEQ_CLS, 8, ["query", "dense"], labels=4, options={"bias": "all", "use_dora": True,
         "modules_to_save": ["classifier", "pooler"]}),
    Spec("tag-64", TOKEN_CLS, 64, ["query", "key", "value", "intermediate.dense"], labels=6),
    Spec("tag-pattern", TOKEN_CLS, 8, ["query", "value"], labels=4,
         options={"rank_pattern": {"layer.0.attention.self.query": 20}, "use_rslora": True}),
    Spec("embed-32", FEATURE_EXTRACTION, 32, ["query", "dense"]),
]  # fmt: skip
SPECS = {"tiny-llama": DECODER, "smollm2": DECODER, "tiny-bert": ENCODER, "minilm": ENCODER}


@pytest.mark.parametrize("base", SPECS)
def test_each_row_equals_peft_alone(base: str, base_location: dict[str, str], tmp_path: Path) -> None:
    location, specs = base_location[base], SPECS[base]
    scale = 1.0 if base.startswith("tiny") else 0.1
    checkpoints = {spec.name: make_adapter(location, tmp_path, spec, scale) for spec in specs}
    runner = Runner(location)
    for checkpoint in checkpoints.values():
        runner.load(checkpoint)
    vocabulary = min(runner.base.vocabulary_size, 30000)
    prompts = [random_ids(n, n, vocabulary) for n in (9, 30)]

    base_task = CAUSAL_LM if runner.base.causal else FEATURE_EXTRACTION
    asked: list[tuple[str | None, str, list[int]]] = [(spec.name, spec.task, ids) for spec in specs for ids in prompts]
    asked += [(None, task, ids) for task in {base_task, FEATURE_EXTRACTION} for ids in prompts]
    everything = SamplingParams(max_tokens=1, temperature=0.0, logprobs=vocabulary if vocabulary < 400 else 200)
    rows = [
        (name, task, ids, runner.submit(task, ids, name, everything if task == CAUSAL_LM else None))
        for name, task, ids in asked
    ]
    runner.drain()
    assert len(runner.engine.steps) == 1, "all rows must have shared one forward pass"

    expected = {}
    for spec in [*specs, None]:
        tasks = [spec.task] if spec else sorted({base_task, FEATURE_EXTRACTION})
        for task in tasks:
            name = spec.name if spec else None
            model = peft_model(location, checkpoints[name] if name else None, task, spec.labels if spec else 0)
            for ids in prompts:
                expected[name, task, len(ids)] = peft_values(model, task, ids, runner.base.pooling)
    assert_all_differ(expected)

    for name, task, ids, sequence in rows:
        reference = expected[name, task, len(ids)]
        if task == CAUSAL_LM:
            entry = runner.outputs[sequence.id][-1].logprobs
            assert entry is not None
            assert entry.token_id == int(reference.argmax())
            top = [token for token, _ in entry.top]
            logprobs = reference - np.logaddexp.reduce(reference.astype(np.float64))
            assert relative([value for _, value in entry.top], logprobs[top]) < 1e-4, name
        else:
            got = runner.values(sequence)
            assert got.shape == reference.shape
            assert relative(got, reference) < 1e-4, name


def assert_all_differ(expected: dict[tuple[str | None, str, int], Any]) -> None:
    """The oracle's own answers must differ between adapters and from the base, or nothing is tested."""
    for a, b in combinations(expected, 2):
        if a[1:] == b[1:] and expected[a].shape == expected[b].shape:
            assert relative(expected[a], expected[b]) > 1e-2, (a, b)

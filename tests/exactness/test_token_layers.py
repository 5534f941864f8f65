"""Every architecture of tests/bases.py, its embedding and its language-model head adapted, whatever their names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.engine.request import CAUSAL_LM, FEATURE_EXTRACTION, SamplingParams
from tests.bases import DECODERS, ENCODERS, PADDED_ENCODERS, VOCABULARY, TinyBase
from tests.exactness.test_base_matrix import peft_tokens
from tests.support import Runner, Spec, make_adapter, peft_model, peft_values, random_ids, relative

NEW_TOKENS = 14
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, temperature=0.0, logprobs=VOCABULARY)


def names_in(model: Any) -> list[str]:
    """Of the embedding and, where there is one, of the head."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [name for layer in layers if layer is not None for name, each in model.named_modules() if each is layer]


def specs_for(base: TinyBase, task: str) -> list[Spec]:
    embedding, *head = names_in(base.build())
    others = base.targets if isinstance(base.targets, list) else [_some_linear(base)]
    last = [name.rpartition(".")[2] for name in (embedding, *head)]
    kinds: dict[str, tuple[list[str], dict[str, Any]]] = {
        "embedding": ([*others, embedding], {}),
        "tokens": (others, {"trainable_token_indices": {last[0]: [7, 3, 11]}}),
        "own": (others, {"modules_to_save": last}),
    }
    if head:
        kinds["both"] = ([embedding, *head], {"use_rslora": True})
    return [Spec(name, task, 3, targets, options={**base.lora, **more}) for name, (targets, more) in kinds.items()]


def _some_linear(base: TinyBase) -> str:
    """The end of a linear layer's name."""
    return next(name for name in base.wrap().layout.linears if not name.startswith("pooler")).rpartition(".")[2]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("base", [*DECODERS, *ENCODERS, *PADDED_ENCODERS], ids=lambda base: base.name)
def test_embedding_and_head_equal_pefts_in_a_mixed_batch(base: TinyBase, tmp_path: Path) -> None:
    task = CAUSAL_LM if base.generates else FEATURE_EXTRACTION
    location = base.save(tmp_path / "base")
    checkpoints = {spec.name: make_adapter(location, tmp_path, spec) for spec in specs_for(base, task)}
    runner = Runner(location)
    for checkpoint in checkpoints.values():
        runner.load(checkpoint)
    rows: list[tuple[str | None, list[int]]] = [
        (name, [*random_ids(n, n, VOCABULARY), 3, 7, 11]) for n in (6, 18) for name in (None, *checkpoints)
    ]
    sequences = [runner.submit(task, ids, name, GREEDY if base.generates else None) for name, ids in rows]
    runner.drain()
    seen: dict[str | None, Any] = {}
    for (name, ids), sequence in zip(rows, sequences, strict=True):
        model = peft_model(location, checkpoints[name] if name else None, task)
        expected = peft_values(model, task, ids, runner.base.pooling)
        if base.generates:
            first = runner.outputs[sequence.id][0].logprobs
            assert first is not None
            got = [value for _, value in sorted(first.top)]
            expected = expected - _log_sum_exp(expected)
            assert sequence.output_ids == peft_tokens(model, ids), name
        else:
            got = runner.values(sequence)
        assert relative(got, expected) < 1e-4, name
        if len(ids) == 9:
            assert all(relative(got, other) > 1e-2 for other in seen.values()), name
            seen[name] = got


def _log_sum_exp(logits: Any) -> float:
    return float(np.logaddexp.reduce(np.asarray(logits, dtype=np.float64)))


def test_the_bias_of_a_head_is_the_adapters(tmp_path: Path) -> None:
    base = next(base for base in DECODERS if base.name == "Phi")
    location = base.save(tmp_path / "base")
    specs = [
        Spec("lora_only", CAUSAL_LM, 3, ["q_proj", "lm_head"], options={"bias": "lora_only"}),
        Spec("all", CAUSAL_LM, 3, ["q_proj"], options={"bias": "all"}),
        Spec("all-on-own", CAUSAL_LM, 3, ["q_proj"], options={"bias": "all", "modules_to_save": ["lm_head"]}),
        Spec("of-b", CAUSAL_LM, 3, ["lm_head"], options={"lora_bias": True}),
        Spec("dora", CAUSAL_LM, 3, ["lm_head"], options={"use_dora": True, "bias": "lora_only"}),
        Spec("more-tokens", CAUSAL_LM, 3, ["q_proj"], vocabulary=103),
        Spec(
            "more-tokens-lora", CAUSAL_LM, 3, ["embed_tokens", "lm_head"], options={"bias": "lora_only"}, vocabulary=103
        ),
    ]
    checkpoints = {spec.name: make_adapter(location, tmp_path, spec) for spec in specs}
    runner = Runner(location)
    for checkpoint in checkpoints.values():
        runner.load(checkpoint)
    ids = random_ids(9, 9, VOCABULARY)
    sequences = {}
    for spec in specs:
        params = replace(GREEDY, logprobs=spec.vocabulary or VOCABULARY)
        sequences[spec.name] = runner.submit(CAUSAL_LM, ids, spec.name, params)
    runner.drain()
    for spec in specs:
        model = peft_model(location, checkpoints[spec.name], CAUSAL_LM, vocabulary=spec.vocabulary)
        expected = peft_values(model, CAUSAL_LM, ids, "")
        first = runner.outputs[sequences[spec.name].id][0].logprobs
        assert first is not None
        got = [value for _, value in sorted(first.top)]
        assert relative(got, expected - _log_sum_exp(expected)) < 1e-4, spec.name
        assert sequences[spec.name].output_ids == peft_tokens(model, ids), spec.name

"""Every architecture of tests/bases.py, LoRA on all its linear layers: mixed batches give what `peft` gives alone."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForMaskedLM,
)

from adapters.errors import InvalidAdapter
from server.engine.request import CAUSAL_LM, FEATURE_EXTRACTION, SEQ_CLS, TOKEN_CLS, Batch, SamplingParams
from tests.bases import DECODERS, ENCODERS, PADDED_ENCODERS, VOCABULARY, TinyBase
from tests.support import Runner, Spec, make_adapter, peft_model, peft_values, random_ids, relative

RANKS = (3, 8, 16)
LENGTHS = (9, 21)
"""Both longer than the windows; with what is generated, the second lies on more than two pages."""
NEW_TOKENS = 14
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, temperature=0.0)
Row = tuple[str | None, list[int]]
Computed = tuple[Batch, Tensor, Tensor | None]


def record(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list[Computed]:
    """From now on every forward pass of the engine: its batch, hidden states [T, d] and logits."""
    passes: list[Computed] = []
    forward = runner.engine.runner.forward

    def recording(batch: Batch, *rest: Any) -> tuple[Tensor, Tensor | None]:
        hidden, logits = forward(batch, *rest)
        passes.append((batch, hidden.clone(), None if logits is None else logits.clone()))
        return hidden, logits

    monkeypatch.setattr(runner.engine.runner, "forward", recording)
    return passes


def prepared(base: TinyBase, task: str, folder: Path) -> tuple[Runner, dict[str | None, Any], list[Row]]:
    """An engine with adapters, what peft makes of each, and the rows of a mixed batch."""
    location = base.save(folder / "base")
    specs = [Spec(f"rank-{rank}", task, rank, base.targets, options=base.lora) for rank in RANKS]
    checkpoints = {spec.name: make_adapter(location, folder, spec) for spec in specs}
    runner = Runner(location)
    for checkpoint in checkpoints.values():
        runner.load(checkpoint)
    names: list[str | None] = [None, *checkpoints]
    models = {name: peft_model(location, checkpoints[name] if name else None, task) for name in names}
    rows = [(name, random_ids(n, n, VOCABULARY)) for n in LENGTHS for name in names]
    return runner, models, rows


@torch.no_grad()
def hidden_states(model: Any, ids: list[int]) -> Tensor:
    """[n, d] of one row alone."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    states: Tensor = inner.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return states


def assert_all_differ(values: dict[str | None, Tensor]) -> None:
    """The oracle's answers must differ between adapters and from the base, or nothing is tested."""
    for a, b in combinations(values.values(), 2):
        assert relative(a, b) > 1e-2


def assert_hidden_states(batch: Batch, hidden: Tensor, models: dict[str | None, Any], rows: dict[int, Row]) -> None:
    """The first pass holds every row from its beginning."""
    assert {item.sequence.id for item in batch.items} == rows.keys()
    start = 0
    for item in batch.items:
        name, ids = rows[item.sequence.id]
        assert (item.start, item.count) == (0, len(ids))
        assert relative(hidden[start : start + len(ids)], hidden_states(models[name], ids)) < 1e-4, name
        start += len(ids)


def peft_tokens(model: Any, ids: list[int]) -> list[int]:
    inputs = torch.tensor([ids])
    output = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "base",
    DECODERS,
    ids=lambda base: base.name,
)
def test_a_decoder_in_a_mixed_batch_equals_peft_alone(
    base: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, models, rows = prepared(base, CAUSAL_LM, tmp_path)
    assert_all_differ({name: hidden_states(model, rows[0][1]) for name, model in models.items()})
    passes = record(runner, monkeypatch)
    sequences = [runner.submit(CAUSAL_LM, ids, name, GREEDY) for name, ids in rows]
    runner.drain()
    batch, hidden, logits = passes[0]
    by_id = {sequence.id: row for sequence, row in zip(sequences, rows, strict=True)}
    assert_hidden_states(batch, hidden, models, by_id)
    assert logits is not None
    for item, got in zip(batch.items, logits, strict=True):
        name, ids = by_id[item.sequence.id]
        assert relative(got, peft_values(models[name], CAUSAL_LM, ids, "last")) < 1e-4, name
    for (name, ids), sequence in zip(rows, sequences, strict=True):
        assert sequence.output_ids == peft_tokens(models[name], ids), name


@pytest.mark.parametrize("base", [*ENCODERS, *PADDED_ENCODERS], ids=lambda base: base.name)
def test_an_encoder_in_a_mixed_batch_equals_peft_alone(
    base: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, models, rows = prepared(base, FEATURE_EXTRACTION, tmp_path)
    assert runner.engine.runner.padded == (base in PADDED_ENCODERS)
    pad, longest = runner.base.pad_id, runner.engine.max_model_len
    assert pad is not None
    assert longest == 64 - runner.base.positions.first
    with_padding = [pad, *random_ids(5, 5, VOCABULARY), pad, pad, *random_ids(4, 4, VOCABULARY), pad]
    rows += [(name, ids) for ids in (with_padding, random_ids(longest, 1, VOCABULARY)) for name in models]
    assert_all_differ({name: hidden_states(model, rows[0][1]) for name, model in models.items()})
    passes = record(runner, monkeypatch)
    sequences = [runner.submit(FEATURE_EXTRACTION, ids, name) for name, ids in rows]
    runner.drain()
    ((batch, hidden, _),) = passes
    by_id = {sequence.id: row for sequence, row in zip(sequences, rows, strict=True)}
    assert_hidden_states(batch, hidden, models, by_id)
    for (name, ids), sequence in zip(rows, sequences, strict=True):
        assert relative(runner.values(sequence), peft_values(models[name], FEATURE_EXTRACTION, ids, "mean")) < 1e-4


@pytest.mark.parametrize("base", PADDED_ENCODERS, ids=lambda base: base.name)
def test_biases_and_magnitudes_on_a_padded_encoder_equal_pefts(base: TinyBase, tmp_path: Path) -> None:
    """Whose norms and layers also run over rows that are no tokens."""
    location = base.save(tmp_path / "base")
    specs = [
        Spec("all", FEATURE_EXTRACTION, 4, base.targets, options={"bias": "all"}),
        Spec("dora", FEATURE_EXTRACTION, 4, base.targets, options={"use_dora": True}),
        Spec("plain", FEATURE_EXTRACTION, 4, base.targets),
    ]
    checkpoints = {spec.name: make_adapter(location, tmp_path, spec) for spec in specs}
    runner = Runner(location)
    for checkpoint in checkpoints.values():
        runner.load(checkpoint)
    rows = [(name, random_ids(n, n, VOCABULARY)) for name in (*checkpoints, None) for n in (5, 9)]
    sequences = [runner.submit(FEATURE_EXTRACTION, ids, name) for name, ids in rows]
    runner.drain()
    for (name, ids), sequence in zip(rows, sequences, strict=True):
        oracle = peft_model(location, None if name is None else checkpoints[name], FEATURE_EXTRACTION)
        expected = peft_values(oracle, FEATURE_EXTRACTION, ids, "mean")
        assert relative(runner.values(sequence), expected) < 1e-4, name


DENSE_HEADS = tuple(base for base in (*ENCODERS, *PADDED_ENCODERS) if base.name in ("BERT", "RoBERTa", "XLM-R"))
"""Encoders whose heads are whole in `classifier`, or have the base's pooler before it."""
CLASSIFIERS = [
    pytest.param(base, task, id=f"{base.name}-{task}")
    for task, known, bases in (
        (SEQ_CLS, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, (*DECODERS, *DENSE_HEADS)),
        (TOKEN_CLS, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, (*DECODERS, *ENCODERS, *PADDED_ENCODERS)),
    )
    for base in bases
    if type(base.config()) in known and base.name != "ModernBERT"
]
"""As transformers has them."""


@pytest.mark.parametrize(("base", "task"), CLASSIFIERS)
def test_a_classifier_equals_peft(base: TinyBase, task: str, tmp_path: Path) -> None:
    location = base.save(tmp_path / "base")
    spec = Spec("classifier", task, 4, base.targets, labels=5, options=base.lora)
    checkpoint = make_adapter(location, tmp_path, spec)
    runner = Runner(location)
    runner.load(checkpoint)
    ids = random_ids(9, 9, VOCABULARY)
    sequence = runner.submit(task, ids, "classifier")
    runner.drain()
    expected = peft_values(peft_model(location, checkpoint, task, 5), task, ids, "")
    assert expected.shape == ((5,) if task == SEQ_CLS else (9, 5))
    assert relative(runner.values(sequence), expected) < 1e-4


def test_a_tagger_with_layers_that_the_checkpoint_does_not_hold_is_refused(tmp_path: Path) -> None:
    """ModernBERT's classifiers keep a dense layer of the published base's language-model head before their own."""
    base = next(base for base in ENCODERS if base.name == "ModernBERT")
    AutoModelForMaskedLM.from_config(base.config()).save_pretrained(tmp_path / "base")
    checkpoint = make_adapter(tmp_path / "base", tmp_path, Spec("tag", TOKEN_CLS, 4, ["Wqkv"], labels=5))
    with pytest.raises(InvalidAdapter, match=r"the head lacks .head\.dense\.weight.: it must be saved"):
        Runner(tmp_path / "base").load(checkpoint)

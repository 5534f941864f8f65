"""TaskHead: what stands before a head's last layer is what transformers' own model for the task has there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
    Wav2Vec2Config,
    XLMRobertaConfig,
)

from server.engine.request import SEQ_CLS, TOKEN_CLS
from server.engine.task_heads import TaskHead, find_task_heads

COMMON: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
MODERN = {**COMMON, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**COMMON),
    "roberta": lambda: RobertaConfig(**COMMON),
    "xlm-roberta": lambda: XLMRobertaConfig(**COMMON),
    "electra": lambda: ElectraConfig(**COMMON, embedding_size=16),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=99, dim=32, hidden_dim=48, n_layers=2, n_heads=4, initializer_range=0.2, max_position_embeddings=64
    ),
    "deberta-v2": lambda: DebertaV2Config(**COMMON),
    "modernbert": lambda: ModernBertConfig(**MODERN),
}
INNER = {
    "bert": {"bert.pooler.dense.weight", "bert.pooler.dense.bias"},
    "roberta": {"classifier.dense.weight", "classifier.dense.bias"},
    "xlm-roberta": {"classifier.dense.weight", "classifier.dense.bias"},
    "electra": {"classifier.dense.weight", "classifier.dense.bias"},
    "distilbert": {"pre_classifier.weight", "pre_classifier.bias"},
    "deberta-v2": {"pooler.dense.weight", "pooler.dense.bias"},
    "modernbert": {"head.dense.weight", "head.norm.weight"},
}
MODELS = {SEQ_CLS: AutoModelForSequenceClassification, TOKEN_CLS: AutoModelForTokenClassification}


@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_features_of_single_tokens_are_those_of_the_tasks_model(name: str, task: str) -> None:
    config = CONFIGS[name]()
    config.num_labels = 3
    torch.manual_seed(4)
    model = MODELS[task].from_config(config).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.2)
    head = TaskHead(config, task)
    expected_inner = INNER[name] if task == SEQ_CLS or name == "modernbert" else set()
    assert set(head.form.inner) == expected_inner
    assert head.uses_pooler == (name == "bert" and task == SEQ_CLS)
    weights = dict(model.named_parameters())
    inner = {each: weights[each] for each in head.form.inner}
    assert {each: tuple(weight.shape) for each, weight in inner.items()} == head.form.inner
    last = model.get_submodule(head.form.last)

    ids = torch.randint(3, 99, (4, 7))
    everything = torch.ones_like(ids)
    hidden = model.base_model(input_ids=ids, attention_mask=everything).last_hidden_state
    expected = model(input_ids=ids, attention_mask=everything).logits
    rows = hidden[:, 0] if task == SEQ_CLS else hidden.flatten(0, 1)
    got = last(head.features(inner, rows)).view(expected.shape)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert relative_spread(expected) > 1e-2, "the rows must differ"


def relative_spread(values: torch.Tensor) -> float:
    return float((values - values.flatten(0, -2).mean(0)).abs().max() / values.abs().max())


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda: AlbertConfig(**COMMON, embedding_size=16), id="its pooler is more than a module"),
        pytest.param(lambda: ModernBertConfig(**MODERN, classifier_pooling="mean"), id="it reads all tokens"),
    ],
)
def test_a_head_that_is_not_understood_is_told_with_its_reason(config: Callable[[], Any]) -> None:
    heads, unserved = find_task_heads(config())
    assert set(heads) == {TOKEN_CLS}
    assert set(unserved) == {SEQ_CLS}
    assert "each token's hidden states alone" in unserved[SEQ_CLS]


def test_a_base_without_a_model_for_the_task_has_no_head() -> None:
    heads, unserved = find_task_heads(Wav2Vec2Config())
    assert heads == {}
    assert all("Unrecognized configuration class" in unserved[task] for task in (SEQ_CLS, TOKEN_CLS))


def test_the_bases_config_and_the_random_numbers_stay_as_they_are() -> None:
    config = BertConfig(**COMMON)
    before, state = config.to_dict(), torch.get_rng_state()
    find_task_heads(config)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)

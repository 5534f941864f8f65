"""TaskHead: what a task's model computes between a base's hidden states and the last layer of its head.

Some models have a dense layer and tanh, gelu or relu there, some the body's pooler. None of that is written here: it is
transformers' own model for the task that computes it, with hidden states that it is given in the place of its body, and
with an adapter's weights in the place of its own. Knows nothing of slots.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adapters.layout import BaseLayout, HeadForm
from server.engine.request import SEQ_CLS, TOKEN_CLS

PROBE_LABELS = 11
"""A number of outputs that no other layer has."""
PROBE_TOKENS = 5
PROBE_VOCABULARY = 16
TOLERANCE = 1e-5
MODELS: Mapping[str, Any] = {SEQ_CLS: AutoModelForSequenceClassification, TOKEN_CLS: AutoModelForTokenClassification}


class UnknownHead(Exception):
    """What stands before the last layer is not known; the message says why."""


class GivenHidden(nn.Module):
    """Stands for a body: it returns the hidden states that it was given, and what its pooler makes of them."""

    def __init__(self, pooler: nn.Module | None) -> None:
        super().__init__()
        self.pooler = pooler
        self.hidden = torch.empty(0)

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPooling:
        pooled = None if self.pooler is None else self.pooler(self.hidden)
        return BaseModelOutputWithPooling(last_hidden_state=self.hidden, pooler_output=pooled)


class TaskHead:
    """The head of one task on one base, without its last layer. Engine's thread only."""

    def __init__(self, config: PretrainedConfig, task: str) -> None:
        """config: of the base. Raises UnknownHead unless, on a small model with random weights, hidden states of single
        tokens (for SEQ_CLS the first one) give what the task's model gives for the whole sequence; and what
        transformers raises where there is no such model.
        """
        self.task = task
        model = _small_model(config, task)
        last = _last_layer(model)
        ids = torch.arange(PROBE_TOKENS)[None] % PROBE_VOCABULARY
        everything = torch.ones_like(ids)
        expected = model(input_ids=ids, attention_mask=everything).logits.reshape(-1, PROBE_LABELS)
        hidden = model.base_model(input_ids=ids, attention_mask=everything).last_hidden_state[0]
        self._body = model.base_model_prefix
        classifier = model.get_submodule(last)
        setattr(model, self._body, GivenHidden(getattr(model.base_model, "pooler", None)))
        model.set_submodule(last, nn.Identity())
        self._model = model
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        got = classifier(self.features(weights, hidden[:1] if task == SEQ_CLS else hidden))
        if got.shape != expected.shape or not _equal(got, expected):
            raise UnknownHead("it does more than can be done with each token's hidden states alone")
        self.form = HeadForm(last, {name: tuple(weight.shape) for name, weight in weights.items()})
        self._model = model.to("meta")
        self.uses_pooler = bool(weights) and all(name.startswith(f"{self._body}.") for name in weights)
        """Whether all that stands there is the pooler, which the base has too."""

    def features(self, inner: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """What the last layer reads: [n, d] for hidden states [n, hidden_size] of single tokens. fp32.

        inner: all of `form.inner`.
        """
        body = self._model.get_submodule(self._body)
        assert isinstance(body, GivenHidden)
        body.hidden = hidden.float()[:, None]
        ids = torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)
        try:
            arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            output = torch.func.functional_call(self._model, dict(inner), (), arguments)
        finally:
            body.hidden = torch.empty(0)
        logits: Tensor = output.logits
        return logits.reshape(len(hidden), -1)


@torch.inference_mode()
def find_task_heads(config: PretrainedConfig) -> tuple[dict[str, TaskHead], dict[str, str]]:
    """Heads by task, and for the other tasks why they are not served. Any thread."""
    heads, unserved = {}, {}
    for task in MODELS:
        try:
            heads[task] = TaskHead(config, task)
        except Exception as error:  # transformers' code for any architecture may raise anything
            reason = str(error).partition("\n")[0] or type(error).__name__
            unserved[task] = f"on this base {task} adapters are not served, for the head is not understood: {reason}"
    return heads, unserved


def with_heads(
    layout: BaseLayout, heads: Mapping[str, TaskHead], unserved: Mapping[str, str], has_pooler: bool
) -> BaseLayout:
    """`layout` with what find_task_heads found. has_pooler: whether the base's own is what stands before a head."""
    forms = {task: replace(head.form, given=head.uses_pooler and has_pooler) for task, head in heads.items()}
    return replace(layout, heads=forms, unserved=unserved)


def _small_model(config: PretrainedConfig, task: str) -> Any:
    """The task's model in small, with random weights: one layer, few words."""
    small = copy.deepcopy(config)
    small.num_labels = PROBE_LABELS
    small.num_hidden_layers = 1
    small.vocab_size = PROBE_VOCABULARY
    if (small.pad_token_id or 0) >= PROBE_VOCABULARY:
        small.pad_token_id = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[task].from_config(small, attn_implementation="eager")
    return model.float().eval()


def _last_layer(model: Any) -> str:
    """The name of the linear layer that makes the labels' logits."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == PROBE_LABELS
    ]
    if len(found) != 1 or found[0].startswith(f"{model.base_model_prefix}."):
        raise UnknownHead(f"{found or 'no linear layer'} make its logits")
    name: str = found[0]
    return name


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())

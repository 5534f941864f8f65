"""BaseLayout: which linear layers a base model has, under which names, with which shapes.

Knows nothing of adapters. It is what a checkpoint is checked against, and what slots are made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from adapters.values import digest_of

ONE_STEP = ("SEQ_CLS", "TOKEN_CLS")
GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
"""Tasks whose models have a language-model head, and run many steps."""


@dataclass(frozen=True)
class LinearShape:
    """One linear layer y = x Wᵀ (+ bias) of the base, whichever way W lies."""

    d_in: int
    d_out: int
    has_bias: bool


@dataclass(frozen=True)
class HeadForm:
    """The head of a task's model on this base: which layer makes the logits, and what stands before it."""

    last: str
    """The linear layer's name in the task's model."""
    inner: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the parameters before it, by name in the task's model."""
    given: bool = False
    """Whether the base has `inner` itself (its pooler), so that an adapter need not bring it."""


@dataclass(frozen=True)
class TokenLayer:
    """The input embedding, as the linear layer that it is for one-hot rows, or the language-model head."""

    name: str
    """The embedding's in the body, the head's in the model with it."""
    shape: LinearShape
    digest: Callable[[], str | None] = field(default=lambda: None, compare=False)
    """Of its weights (values.digest_of), where these are known. Any thread."""

    def names(self, prefix: str) -> tuple[str, str]:
        """As a checkpoint may call it. prefix: of the body."""
        return self.name, f"{prefix}.{self.name}"


@dataclass(frozen=True)
class BaseLayout:
    """The adaptable layers of a base model's body (the model without a language-model head).

    Names are those inside the body. A checkpoint may name the same layer with `prefix` before it, as the task
    models of transformers do (`model.layers.0…` in LlamaForCausalLM, `layers.0…` in LlamaModel); where the whole model
    is its own body, `prefix` is empty.
    """

    linears: Mapping[str, LinearShape]
    prefix: str
    """Empty where the task's model is its own body."""
    hidden_size: int
    generates: bool
    """Whether the base has a language-model head."""
    norms: Mapping[str, int] = field(default_factory=dict)
    """Layer norms over what each token is as a whole, with a bias, which an adapter may replace; the length of each."""
    heads: Mapping[str, HeadForm] = field(default_factory=dict)
    """By task; where there is none, the head is one layer, `score` or `classifier`."""
    unserved: Mapping[str, str] = field(default_factory=dict)
    """Tasks whose adapters this base cannot serve, and why."""
    encodes_first: bool = False
    """Whether it has an encoder and a decoder."""
    embedding: TokenLayer | None = None
    """None: the base's tokens become vectors in a way that no adapter can change."""
    output: TokenLayer | None = None
    """The language-model head; None likewise."""
    tied: bool = False
    """Whether these two have the same weights."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """What adapters on this base may be for; the first is that of one that does not say it."""
        if self.encodes_first:
            return ("SEQ_2_SEQ_LM",)
        return ("CAUSAL_LM", *ONE_STEP, "FEATURE_EXTRACTION") if self.generates else ("FEATURE_EXTRACTION", *ONE_STEP)

    def in_task(self, name: str) -> str:
        """What the task's model calls the body's module `name`."""
        return f"{self.prefix}.{name}" if self.prefix else name

    def find(self, name: str) -> str | None:
        """The body's name for a linear layer that a checkpoint calls `name`; None where the base has none."""
        return self._find(name, self.linears)

    def find_norm(self, name: str) -> str | None:
        """The same for one of `norms`."""
        return self._find(name, self.norms)

    def _find(self, name: str, among: Mapping[str, object]) -> str | None:
        inner = name.removeprefix(f"{self.prefix}.")
        return next((known for known in (name, inner) if known in among), None)


def layout_of(
    body: nn.Module, prefix: str, hidden_size: int, generates: bool, apart: nn.Module | None = None
) -> BaseLayout:
    """The layout of `body`: every linear layer in it (`as_linear`), and its norms. Call before it is patched.

    apart: the language-model head, which some bodies hold too.
    """
    linears = {
        name: LinearShape(linear.in_features, linear.out_features, linear.bias is not None)
        for name, module in body.named_modules()
        if module is not apart and (linear := as_linear(module)) is not None
    }
    embedded = {module.embedding_dim for module in body.modules() if isinstance(module, nn.Embedding)}
    norms = {
        name: module.normalized_shape[0]
        for name, module in body.named_modules()
        if type(module) is nn.LayerNorm and module.bias is not None
        if len(module.normalized_shape) == 1 and module.normalized_shape[0] in {hidden_size, *embedded}
    }  # not those over the parts of an attention's heads
    return BaseLayout(linears, prefix, hidden_size, generates, norms)


def with_token_layers(layout: BaseLayout, model: Any, body: nn.Module) -> BaseLayout:
    """`layout` with the embedding of `body`, and the language-model head of `model` where that generates.

    Only such as adapters can change exactly: a look-up of rows, times `embed_scale` where the layer has that, and a
    linear layer. model: transformers' own, before it is patched.
    """
    embedding: Any = model.get_input_embeddings()
    inside = _name_of(embedding, body) if _looks_up_rows(embedding) else None
    if inside is not None:
        shape = LinearShape(embedding.num_embeddings, embedding.embedding_dim, False)
        layout = replace(layout, embedding=TokenLayer(inside, shape, _digest(embedding)))
    output: Any = model.get_output_embeddings() if layout.generates else None
    outside = _name_of(output, model) if type(output) is nn.Linear else None
    if outside is not None:
        shape = LinearShape(output.in_features, output.out_features, output.bias is not None)
        tied = layout.embedding is not None and embedding.weight is output.weight
        digest = layout.embedding.digest if layout.embedding is not None and tied else _digest(output)
        layout = replace(layout, output=TokenLayer(outside, shape, digest), tied=tied)
    return layout


def _digest(module: nn.Module) -> Callable[[], str | None]:
    """Computed now: the weights may not stay."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    found = None if weight.is_meta else digest_of(weight)
    return lambda: found


def _looks_up_rows(embedding: Any) -> bool:
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        return False
    return type(embedding) is nn.Embedding or isinstance(getattr(embedding, "embed_scale", None), Tensor | float)


def _name_of(module: nn.Module, root: nn.Module) -> str | None:
    return next((name for name, each in root.named_modules() if each is module), None)


def as_linear(module: nn.Module) -> nn.Linear | None:
    """`module` as a linear layer y = x Wᵀ + bias that shares its memory; None where it is none that can be adapted.

    An nn.Linear is one itself. transformers' Conv1D is one whose W lies transposed, [d_in, d_out]: the weights that
    PEFT's `fan_in_fan_out` speaks of. A and B of an adapter are the same for both kinds.
    """
    if type(module) is nn.Linear:
        return module
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if type(module).__name__ != "Conv1D" or not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    assert isinstance(bias, nn.Parameter)
    d_in, d_out = weight.shape
    linear = nn.Linear(d_in, d_out, device=torch.device("meta"))
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=False)
    linear.bias = bias
    return linear


@contextmanager
def shared_inputs(body: nn.Module, names: Iterable[str]) -> Iterator[list[list[str]]]:
    """Find out which of the layers `names` read the very same tensor one after another, in a forward pass of `body`.

    The list is filled at the end: groups of two layers or more, in the order in which they are called. A layer that was
    called more than once is in none.
    """
    calls: list[tuple[str, Tensor]] = []
    groups: list[list[str]] = []

    def note(name: str) -> Any:
        return lambda _module, arguments: calls.append((name, arguments[0]))

    hooks = [body.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()
    called = [name for name, _ in calls]
    for _, run in groupby(calls, key=lambda call: id(call[1])):  # `calls` keeps them alive, so ids are unique
        found = [name for name, _ in run if called.count(name) == 1]
        if len(found) > 1:
            groups.append(found)

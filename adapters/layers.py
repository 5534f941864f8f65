"""LoraLinear and patch_model: put the LoRA term into a transformers model that knows nothing of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from adapters.batch import CurrentBatch, LoraBatch, LoraScope
from adapters.dora import rescale
from adapters.kernels.contract import AddLora, LoraWeights
from adapters.kernels.library import Library
from adapters.layout import as_linear
from adapters.memory import LargePages, MappedFiles
from adapters.packed import PackedLinear, can_pack
from adapters.products import NativeProducts, PlainProducts, Products, can_pack_natively
from adapters.slots import LoraSlots, RowBiases


class LoraGroup:
    """Linear layers that read the same tensor (query, key and value), computed when the first of them is asked.

    For each layer y = x Wᵀ + bias, plus each token's adapter: y += scaling · (x Aᵀ) Bᵀ, then DoRA's gain where that has
    one. Which token has which adapter is the scope's current batch; with none, or for tokens in no segment, a layer is
    the base's product alone. Where the batch has no tokens nothing is computed: x holds no rows that anybody reads.
    """

    def __init__(
        self, products: Products, weights: Sequence[LoraWeights], scope: CurrentBatch, add_lora: AddLora
    ) -> None:
        self.products = products
        self.weights = tuple(weights)
        self.scope = scope
        self.add_lora = add_lora
        self.fused = products.fused
        """Whether `products` adds the LoRA term and applies DoRA's gain; else `add_lora` and `rescale` do."""
        self._x: Tensor | None = None
        self._batch: LoraBatch | None = None
        self._ys: list[Tensor | None] = []

    def output(self, index: int, x: Tensor) -> Tensor:
        """The output of layer `index` for x: [..., d_in], as many rows as the current batch has tokens."""
        if len(self.weights) == 1:
            return self.compute(x)[0]
        batch = self.scope.current
        if self._x is not x or self._batch is not batch or self._ys[index] is None:
            self._x, self._batch, self._ys = x, batch, [*self.compute(x)]
        y = self._ys[index]
        assert y is not None
        self._ys[index] = None
        if all(other is None for other in self._ys):
            self._x = self._batch = None
        return y

    def compute(self, x: Tensor) -> list[Tensor]:
        """[..., d_out] of every layer."""
        batch = self.scope.current
        if batch is None or not batch.segments:
            if batch is not None and not batch.num_tokens:
                return [x.new_zeros(*x.shape[:-1], weights.d_out) for weights in self.weights]
            return self.products.compute(x, None)
        batch = batch.over(x.shape[:-1].numel())
        if self.fused:
            return self.products.compute(x, batch)
        ys = self.products.compute(x, None)
        rows = [y.view(-1, weights.d_out) for y, weights in zip(ys, self.weights, strict=True)]
        self.add_lora(rows, x.reshape(-1, self.weights[0].d_in), self.weights, batch)
        for part, weights in zip(rows, self.weights, strict=True):
            if weights.rescaled:
                rescale(part, weights, batch)
        return ys

    def base_outputs(self, x: Tensor) -> list[Tensor]:
        """[..., d_out] of every layer without adapters, whatever the current batch."""
        return self.products.compute(x, None)


class LoraLinear(nn.Module):
    """One layer of a LoraGroup, in the place of the base's linear layer."""

    def __init__(self, base: nn.Module | None, group: LoraGroup, index: int) -> None:
        super().__init__()
        self.base = base
        """The base's own layer, where it is still needed."""
        self.group = group
        self.index = index
        self.in_features = group.weights[index].d_in
        self.out_features = group.weights[index].d_out
        if isinstance(base, nn.Linear):
            self.weight = base.weight.detach().new_empty(0)
            """Some models ask for its dtype; it holds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_in] -> [..., d_out]."""
        return self.group.output(self.index, x)


class AddBiases:
    """A hook on a norm: adds what each token's adapter changes of its bias."""

    def __init__(self, biases: RowBiases, scope: LoraScope) -> None:
        self.biases = biases
        self.scope = scope

    def __call__(self, _module: nn.Module, _arguments: object, y: Tensor) -> None:
        """y: [..., d], a row for each token of the current batch, or as LoraBatch.over has it; changed in place."""
        batch = self.scope.current
        if batch is None or not self.biases.used:
            return
        rows = y.view(-1, y.shape[-1])
        for slot, start, end in batch.over(len(rows)).segments:
            bias = self.biases.terms[slot]
            if bias is not None:
                rows[start:end] += bias


@dataclass(frozen=True)
class Computing:
    """How layers are computed; chosen once, at start."""

    add_lora: AddLora
    library: Library | None = None
    """The CPU kernels, where the base's products are theirs too."""
    pack: bool = False
    """Without `library`: oneDNN on packed weights, where that is served."""
    quantize: str = ""
    """With `library`: one of products.QUANTIZED; by default W is held exactly."""


def patch_model(  # noqa: PLR0913, PLR0917
    body: nn.Module,
    slots: LoraSlots,
    scope: LoraScope,
    computing: Computing,
    groups: Sequence[Sequence[str]] = (),
    elsewhere: Mapping[str, LoraScope] = MappingProxyType({}),
) -> None:
    """Replace every linear layer for which there are slots by a LoraLinear, and pack; norms get AddBiases. Engine's
    thread, once.

    groups: names of layers that share an input; every other layer stands alone.
    elsewhere: the scope of layers that read other rows than the tokens of `scope`'s batch.
    """
    grouped = {name for names in groups for name in names}
    alone = (name for name in slots.weights if name not in grouped and name not in slots.tokens.weights)
    for names in (*groups, *([name] for name in alone)):
        linears = [_linear(body, name) for name in names]
        weights, own = [slots.weights[name] for name in names], elsewhere.get(names[0], scope)
        group = LoraGroup(PlainProducts(linears), weights, own, computing.add_lora)
        for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
            body.set_submodule(name, LoraLinear(linear, group, index))
        slots.magnitudes.use(names, group.base_outputs)
    for name, biases in slots.biases.items():
        body.get_submodule(name).register_forward_hook(AddBiases(biases, scope))
    pack_model(body, computing)


def pack_model(body: nn.Module, computing: Computing) -> None:
    """Pack the weights of a patched model's layers, where that is served; its own are let go. Engine's thread, once."""
    memory, files = LargePages(), MappedFiles()
    layers: dict[LoraGroup, list[LoraLinear]] = {}
    for layer in body.modules():
        if isinstance(layer, LoraLinear) and isinstance(layer.base, nn.Linear):  # a head in the body is packed already
            layers.setdefault(layer.group, []).append(layer)
    for group, members in layers.items():
        members.sort(key=lambda layer: layer.index)
        linears = [layer.base for layer in members if isinstance(layer.base, nn.Linear)]
        if computing.library is not None and all(map(can_pack_natively, linears)):
            group.products = NativeProducts(computing.library, linears, group.weights, memory, computing.quantize)
            for layer in members:
                layer.base = None
        elif computing.pack and all(map(can_pack, linears)):
            packed = [PackedLinear(linear) for linear in linears]
            group.products = PlainProducts(packed)
            for layer, base in zip(members, packed, strict=True):
                layer.base = base
        else:
            continue
        group.fused = group.products.fused
        for linear in linears:
            files.leave(linear.weight)


def is_tied(embedding: nn.Module, head: nn.Linear) -> bool:
    """Whether this is a plain look-up of the rows of the head's weights."""
    return type(embedding) is nn.Embedding and embedding.max_norm is None and embedding.weight is head.weight


def _linear(body: nn.Module, name: str) -> nn.Linear:
    linear = as_linear(body.get_submodule(name))
    assert linear is not None
    return linear

"""LoraLinear and patch_model: put the LoRA term into a transformers model that knows nothing of it."""

from __future__ import annotations

from torch import Tensor, nn

from adapters.batch import LoraScope
from adapters.kernels.contract import AddLora, LoraWeights
from adapters.packed import PackedLinear, can_pack
from adapters.slots import LoraSlots


class LoraLinear(nn.Module):
    """y = x Wᵀ + bias, plus each token's adapter: y += scaling · (x Aᵀ) Bᵀ.

    Which token has which adapter is the scope's current batch; with none, or for tokens in no segment, the layer is
    the base's product alone.
    """

    def __init__(
        self, base: nn.Linear | PackedLinear, weights: LoraWeights, scope: LoraScope, add_lora: AddLora
    ) -> None:
        super().__init__()
        self.base = base
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.lora = weights
        self.scope = scope
        self.add_lora = add_lora

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_in] with as many rows as the current batch has tokens. Returns [..., d_out]."""
        y: Tensor = self.base(x)
        batch = self.scope.current
        if batch is None or not batch.segments:
            return y
        rows = y.view(-1, self.out_features)
        if len(rows) != batch.num_tokens:
            raise RuntimeError(f"{len(rows)} rows in a batch of {batch.num_tokens} tokens")
        self.add_lora(rows, x.reshape(-1, self.in_features), self.lora, batch)
        return y


def patch_model(body: nn.Module, slots: LoraSlots, scope: LoraScope, add_lora: AddLora, pack: bool = False) -> None:
    """Replace every linear layer for which there are slots by a LoraLinear around it. Engine's thread, once.

    pack: around a PackedLinear, where that is served; the model's own weights of those layers are then let go.
    """
    for name, weights in slots.weights.items():
        base = body.get_submodule(name)
        assert isinstance(base, nn.Linear)
        inner = PackedLinear(base) if pack and can_pack(base) else base
        body.set_submodule(name, LoraLinear(inner, weights, scope, add_lora))


def pack_head(model: nn.Module) -> None:
    """Give a language-model head a packed copy of its weights, where that is served. Engine's thread, once."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, nn.Linear) and can_pack(head):
        model.set_output_embeddings(PackedLinear(head))  # type: ignore[operator]

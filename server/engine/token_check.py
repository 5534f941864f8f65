"""Whether a base reads its embedding, and calls its language-model head, as adapters on them need it: once in a pass.

Knows nothing of adapters.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from adapters.layout import BaseLayout
from server.engine.base_model import BaseModel


@torch.inference_mode()
def with_used_token_layers(base: BaseModel) -> BaseLayout:
    """The base's layout without a layer that a forward pass of transformers' model does not call just once.

    Engine's thread, before the model is patched.
    """
    layout = base.layout
    ids = torch.zeros(1, 2, dtype=torch.int64, device=base.device)
    targets = {} if base.stacks is None else {"decoder_input_ids": ids}
    if layout.embedding is not None:
        embedding = base.body.get_submodule(layout.embedding.name)
        if _calls(base.body, embedding, input_ids=ids) != 1:
            layout = replace(layout, embedding=None, tied=False)
    if layout.output is not None:
        output = base.model.get_submodule(layout.output.name)
        if _calls(base.model, output, input_ids=ids, **targets) != 1:
            layout = replace(layout, output=None, tied=False)
    return layout


def _calls(model: nn.Module, layer: nn.Module, **inputs: torch.Tensor) -> int:
    calls: list[None] = []
    hook = layer.register_forward_hook(lambda *_: calls.append(None))
    try:
        model(**inputs)
    finally:
        hook.remove()
    return len(calls)

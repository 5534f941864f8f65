"""Placement: each tensor of a checkpoint to its module in the base, or a reason why there is none.

Knows nothing of files. A checkpoint is served only when every tensor found its place, and every target its tensors.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from adapters.adapter import Head, Limits, LoraPair, OwnTokens
from adapters.config import LoraConfig
from adapters.config_fields import ALL_LINEAR
from adapters.head_placement import ROOT, HeadPlacement
from adapters.layout import BaseLayout, LinearShape
from adapters.patterns import ends_in
from adapters.token_placement import TIED_NAME, TokenPlacement
from adapters.values import widened

FP32_MAX = torch.finfo(torch.float32).max
SWITCHED = {"lora_B.bias": "lora_bias", "lora_magnitude_vector": "use_dora"}
"""What a target has only with a field of the config -> the field."""
EMBEDDING_PARTS = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}
"""As PEFT calls the factors on an embedding -> as on other layers."""
SEEN_NAMES = 4096
"""Adapters of one base name their tensors alike."""


class Placement:
    """Sorts the tensors of one checkpoint to the base's modules; collects what does not fit."""

    def __init__(self, config: LoraConfig, layout: BaseLayout, limits: Limits) -> None:
        self.config = config
        self.layout = layout
        self.limits = limits
        self.reasons: list[str] = []
        self.pairs: dict[str, LoraPair] = {}
        self.biases: dict[str, Tensor] = {}
        self.coverage: dict[str, str] = {}
        self.tokens: OwnTokens | None = None
        self.vocabulary_size = 0
        """As AdapterInfo has it."""
        self._layers = dict(layout.linears)
        """What LoRA may be on, as far as the task's model has it."""
        self._token_layers: dict[str, str] = {}
        """Those of them that know tokens: `embedding` or `output`, by name."""
        self._prefixed = False
        """Whether the checkpoint names modules as a task's model does, with the body's name before theirs."""

    def place(self, tensors: Mapping[str, Tensor], task_type: str) -> Head | None:
        """Fill `pairs`, `biases`, `tokens`, `coverage`, `reasons`; the head, where `task_type` needs one that fits."""
        head = HeadPlacement(self.config, self.layout, self.limits, task_type)
        token_layers = TokenPlacement(self.config, self.layout, task_type)
        modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            where = head.take(key, tensor) or token_layers.take(key, tensor)
            module, part = _split_key(key)
            if where is not None:
                self.coverage[key] = where
            elif part is not None:
                if part in modules[module]:
                    self.reasons.append(f"{module!r} has {part} twice")
                modules[module][part] = tensor
                self.coverage[key] = f"{part} of {module}"
            else:
                self.reasons.append(f"tensor {key!r} has no place in this base")
        self._add_token_layers(token_layers)
        self._prefixed = any(module.startswith(f"{self.layout.prefix}.") for module in modules)
        adapted = set()
        for module, parts in modules.items():
            if parts.keys() == {"bias"} and self.config.bias == "all":
                self._place_bias(module, parts["bias"])
            else:
                self._place_module(module, parts)
                adapted.add(module)
        self._check_completeness(adapted)
        self._settle_tokens()
        made = head.make(token_layers.names)
        self.reasons += [*head.reasons, *token_layers.reasons]
        return made

    def _add_token_layers(self, own: TokenPlacement) -> None:
        """Embedding and language-model head, of the size that they have in this adapter."""
        self.tokens = own.make()
        self.vocabulary_size = own.size(self.tokens)
        for kind, layer in own.layers.items():
            whole = None if self.tokens is None else getattr(self.tokens, kind)
            shape = layer.shape
            if whole is not None and kind == "embedding":
                shape = replace(shape, d_in=len(whole))
            elif whole is not None:
                shape = replace(shape, d_out=len(whole))
            self._layers[layer.name] = shape
            self._token_layers[layer.name] = kind

    def _check_tying(self) -> None:
        """With `ensure_weight_tying` PEFT gives a tied head the embedding's LoRA, if it knows the embedding's name."""
        embedding, output = self.layout.embedding, self.layout.output
        if not self.config.ensure_weight_tying or not self.layout.tied or embedding is None or output is None:
            return
        first, second = self.pairs.get(embedding.name), self.pairs.get(output.name)
        if second is not None and (first is None or not _are_tied(first, second)):
            self.reasons.append(f"ensure_weight_tying, but the LoRA on {output.name!r} is not that of the embedding")
        elif first is not None and second is None and ends_in(embedding.name, [TIED_NAME]):
            self.reasons.append(f"ensure_weight_tying, but there is no LoRA on {output.name!r}")

    def _settle_tokens(self) -> None:
        """What rows and whole layers have to do with LoRA on them."""
        self._check_tying()
        if self.tokens is None:
            return
        for name, kind in self._token_layers.items():
            pair = self.pairs.get(name)
            if pair is None:
                continue
            if getattr(self.tokens, f"{kind}_rows") is not None:
                self.reasons.append(f"{name!r} has both LoRA and tokens' rows, which PEFT does not compute either")
            if kind == "output" and self.tokens.output is not None and pair.bias is not None:
                self.tokens = replace(self.tokens, output_bias=pair.bias)
                pair.bias = None

    def _place_bias(self, module: str, bias: Tensor) -> None:
        """That of a module without LoRA, in the place of the base's."""
        linear, norm = self._find(module), self.layout.find_norm(module)
        d = self.layout.norms[norm] if norm else self._layers[linear].d_out if linear else 0
        if linear is None and norm is None:
            self.reasons.append(f"the bias of {module!r} is that of no linear layer and no norm of this base's body")
        elif linear in self.pairs or norm in self.biases:
            self.reasons.append(f"{module!r} occurs twice")
        elif tuple(bias.shape) != (d,):
            self.reasons.append(f"bias of {module!r} has shape {tuple(bias.shape)}, this base needs ({d},)")
        elif norm is not None:
            self.biases[norm] = bias
        elif linear is not None:
            shape = self._layers[linear]
            if not shape.has_bias:
                self.reasons.append(f"the base's {module!r} has no bias to replace")
            # kernels know no term without factors: these are zero
            a, b = (torch.zeros(size, dtype=torch.float16) for size in ((1, shape.d_in), (shape.d_out, 1)))
            self.pairs[linear] = LoraPair(a, b, 1.0, bias)

    def _place_module(self, module: str, parts: Mapping[str, Tensor]) -> None:
        name = self._find(module)
        if name is None:
            self.reasons.append(f"the base has no linear layer {module!r}")
            return
        if name in self.pairs:
            self.reasons.append(f"{module!r} occurs twice")
            return
        kind = self._token_layers.get(name)
        if not self._is_target(name, module) and not self._is_tied_to_a_target(kind):
            self.reasons.append(f"{module!r} is not among target_modules")
            return
        if kind is not None and (unserved := self._unserved(kind)):
            self.reasons += [f"{field} on {module!r} is not supported" for field in unserved]
            return
        if kind == "embedding":
            parts = {EMBEDDING_PARTS.get(part, f"{part} of a linear layer"): tensor for part, tensor in parts.items()}
        needed = ["lora_A", "lora_B", *(part for part, field in SWITCHED.items() if getattr(self.config, field))]
        missing = [part for part in needed if part not in parts]
        if missing:
            self.reasons.append(f"{module!r} lacks {' and '.join(missing)}")
            return
        reasons = self._wrong_shapes(module, parts, self._layers[name])
        self.reasons.extend(reasons)
        scaling = self.config.scaling_of(module)
        if not abs(scaling) < FP32_MAX:
            self.reasons.append(f"the scaling {scaling} of {module!r} is beyond fp32")
        if not reasons:
            self.pairs[name] = LoraPair(
                parts["lora_A"],
                parts["lora_B"],
                scaling,
                parts.get("bias"),
                parts.get("lora_B.bias"),
                parts.get("lora_magnitude_vector"),
            )

    def _wrong_shapes(self, module: str, parts: Mapping[str, Tensor], shape: LinearShape) -> list[str]:
        rank = self.config.rank_of(module)
        reasons = []
        if rank > self.limits.max_lora_rank:
            reasons.append(f"rank {rank} of {module!r} is over the limit {self.limits.max_lora_rank}")
        factors = {"lora_A": (rank, shape.d_in), "lora_B": (shape.d_out, rank)}
        for part, tensor in parts.items():
            expected = factors.get(part, (shape.d_out,))
            if tuple(tensor.shape) != expected:
                reasons.append(f"{part} of {module!r} has shape {tuple(tensor.shape)}, this base needs {expected}")
        unknown = parts.keys() - {*factors, *SWITCHED, "bias"}
        reasons += [f"{module!r} has {part}, which no layer of its kind has" for part in sorted(unknown)]
        for part, field in SWITCHED.items():
            if part in parts and not getattr(self.config, field):
                reasons.append(f"{module!r} has {part} but the config does not say {field}")
        if "bias" in parts and self.config.bias == "none":
            reasons.append(f"{module!r} has a bias but the config says bias: {self.config.bias!r}")
        if "bias" in parts and not shape.has_bias:
            reasons.append(f"the base's {module!r} has no bias to replace")
        return reasons

    def _find(self, module: str) -> str | None:
        """The layer that a checkpoint calls so."""
        name = self.layout.find(module)
        layers = (self.layout.embedding, self.layout.output)
        found = (layer.name for layer in layers if layer is not None and module in layer.names(self.layout.prefix))
        name = name or next(found, None)
        return name if name in self._layers else None

    def _is_target(self, name: str, module: str) -> bool:
        """`name`: the layer's own; `module`: as PEFT called it. All linear layers are those of the body."""
        targets = self.config.target_modules
        if name in self._token_layers and isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            return False
        return self.config.is_target(module)

    def _is_tied_to_a_target(self, kind: str | None) -> bool:
        """Whether it is the language-model head, and has the embedding's LoRA with `ensure_weight_tying`."""
        return kind == "output" and self.layout.tied and self.config.ensure_weight_tying

    def _unserved(self, kind: str) -> list[str]:
        """What this adapter has that is not served on a layer of this kind; PEFT has no `lora_bias` on embeddings."""
        fields = ["use_dora", "lora_bias"] if kind == "embedding" else []
        if kind == "output" and self.tokens is not None and self.tokens.output is not None:
            fields = ["use_dora"]  # its norms would be those of weights that are not the base's
        return [field for field in fields if getattr(self.config, field)]

    def _check_completeness(self, modules: set[str]) -> None:
        """A layer is covered in every block or in none, and every named target somewhere."""
        if not modules:
            self.reasons.append("it holds no LoRA weights")
        present = {self._find(module) or module for module in modules}
        kinds = {_kind(name) for name in present}
        wanted = {name for name in self._layers if self._is_target(name, self._name_in_task(name))}
        for name in self._layers:
            if name in wanted and name not in present and (name in self._token_layers or _kind(name) in kinds):
                self.reasons.append(f"{name!r} is a target but its weights are missing")
        if isinstance(self.config.target_modules, tuple):
            for target in self.config.target_modules:
                named = {name for name in self._layers if ends_in(self._name_in_task(name), [target])}
                left_out = not self.config.is_target(target) or (named and not named & wanted)
                if not left_out and not any(ends_in(module, [target]) for module in modules):
                    self.reasons.append(f"target_modules names {target!r}, for which there are no weights")

    def _name_in_task(self, name: str) -> str:
        """What PEFT called the body's module `name`."""
        return self.layout.in_task(name) if self._prefixed and self._token_layers.get(name) != "output" else name


def _are_tied(embedding: LoraPair, output: LoraPair) -> bool:
    """Whether the head's weights change just as the embedding's do."""
    pairs = ((embedding.b.T, output.a), (embedding.a.T, output.b))
    return all(np.array_equal(widened(a), widened(b)) for a, b in pairs) and embedding.scaling == output.scaling


@lru_cache(SEEN_NAMES)
def _split_key(key: str) -> tuple[str, str | None]:
    """(module, `lora_A` | `lora_B` | `bias` | one of SWITCHED or EMBEDDING_PARTS), or (key, None) for anything else."""
    name = key.removeprefix(ROOT)
    match = re.fullmatch(r"(.+)\.(lora_embedding_[AB])(?:\.default)?", name)
    if match:
        return match[1], match[2]
    match = re.fullmatch(r"(.+)\.(lora_[AB])(?:\.default)?(?:\.(weight|bias))?", name)  # AdaLoRA has no `.weight`
    if match and (match[2], match[3]) != ("lora_A", "bias"):
        return match[1], f"{match[2]}.bias" if match[3] == "bias" else match[2]
    match = re.fullmatch(r"(.+)\.(lora_magnitude_vector)(?:\.default)?(?:\.weight)?", name)
    if match:
        return match[1], match[2]
    match = re.fullmatch(r"(.+?)(?:\.base_layer)?\.bias", name)
    return (match[1], "bias") if match else (key, None)


@lru_cache(SEEN_NAMES)
def _kind(module: str) -> str:
    return re.sub(r"\d+", "#", module)

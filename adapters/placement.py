"""Placement: each tensor of a checkpoint to its module in the base, or a reason why there is none.

Knows nothing of files. A checkpoint is served only when every tensor found its place, and every target its tensors.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from adapters.adapter import Head, Limits, LoraPair
from adapters.config import LoraConfig
from adapters.head_placement import ROOT, HeadPlacement
from adapters.layout import BaseLayout, LinearShape
from adapters.patterns import ends_in

FP32_MAX = torch.finfo(torch.float32).max
SWITCHED = {"lora_B.bias": "lora_bias", "lora_magnitude_vector": "use_dora"}
"""What a target has only with a field of the config -> the field."""
SEEN_NAMES = 4096
"""Adapters of one base name their tensors alike."""
# The bits of the exponent: all set in infinities and NaN.
EXPONENTS = {
    torch.float16: (np.int16, 0x7C00),
    torch.bfloat16: (np.int16, 0x7F80),
    torch.float32: (np.int32, 0x7F800000),
}


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
        self._prefixed = False
        """Whether the checkpoint names modules as a task's model does, with the body's name before theirs."""

    def place(self, tensors: Mapping[str, Tensor], task_type: str) -> Head | None:
        """Fill `pairs`, `biases`, `coverage`, `reasons`; return the head, where `task_type` needs one and it fits."""
        head = HeadPlacement(self.config, self.layout, self.limits, task_type)
        modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            where = head.take(key, tensor)
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
        self._prefixed = any(module.startswith(f"{self.layout.prefix}.") for module in modules)
        adapted = set()
        for module, parts in modules.items():
            if parts.keys() == {"bias"} and self.config.bias == "all":
                self._place_bias(module, parts["bias"])
            else:
                self._place_module(module, parts)
                adapted.add(module)
        self._check_completeness(adapted)
        made = head.make()
        self.reasons += head.reasons
        return made

    def _place_bias(self, module: str, bias: Tensor) -> None:
        """That of a module without LoRA, in the place of the base's."""
        linear, norm = self.layout.find(module), self.layout.find_norm(module)
        d = self.layout.norms[norm] if norm else self.layout.linears[linear].d_out if linear else 0
        if linear is None and norm is None:
            self.reasons.append(f"the bias of {module!r} is that of no linear layer and no norm of this base's body")
        elif linear in self.pairs or norm in self.biases:
            self.reasons.append(f"{module!r} occurs twice")
        elif tuple(bias.shape) != (d,):
            self.reasons.append(f"bias of {module!r} has shape {tuple(bias.shape)}, this base needs ({d},)")
        elif norm is not None:
            self.biases[norm] = bias
        elif linear is not None:
            shape = self.layout.linears[linear]
            if not shape.has_bias:
                self.reasons.append(f"the base's {module!r} has no bias to replace")
            # kernels know no term without factors: these are zero
            a, b = (torch.zeros(size, dtype=torch.float16) for size in ((1, shape.d_in), (shape.d_out, 1)))
            self.pairs[linear] = LoraPair(a, b, 1.0, bias)

    def _place_module(self, module: str, parts: Mapping[str, Tensor]) -> None:
        name = self.layout.find(module)
        if name is None:
            self.reasons.append(f"the base has no linear layer {module!r}")
            return
        if name in self.pairs:
            self.reasons.append(f"{module!r} occurs twice")
            return
        if not self.config.is_target(module):
            self.reasons.append(f"{module!r} is not among target_modules")
            return
        needed = ["lora_A", "lora_B", *(part for part, field in SWITCHED.items() if getattr(self.config, field))]
        missing = [part for part in needed if part not in parts]
        if missing:
            self.reasons.append(f"{module!r} lacks {' and '.join(missing)}")
            return
        reasons = self._wrong_shapes(module, parts, self.layout.linears[name])
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
        for part, field in SWITCHED.items():
            if part in parts and not getattr(self.config, field):
                reasons.append(f"{module!r} has {part} but the config does not say {field}")
        if "bias" in parts and self.config.bias == "none":
            reasons.append(f"{module!r} has a bias but the config says bias: {self.config.bias!r}")
        if "bias" in parts and not shape.has_bias:
            reasons.append(f"the base's {module!r} has no bias to replace")
        return reasons

    def _check_completeness(self, modules: set[str]) -> None:
        """A layer is covered in every block or in none, and every named target somewhere."""
        if not modules:
            self.reasons.append("it holds no LoRA weights")
        present = {self.layout.find(module) or module for module in modules}
        kinds = {_kind(name) for name in present}
        wanted = {name for name in self.layout.linears if self.config.is_target(self._name_in_task(name))}
        for name in self.layout.linears:
            if name in wanted and name not in present and _kind(name) in kinds:
                self.reasons.append(f"{name!r} is a target but its weights are missing")
        if isinstance(self.config.target_modules, tuple):
            for target in self.config.target_modules:
                named = {name for name in self.layout.linears if ends_in(self._name_in_task(name), [target])}
                left_out = not self.config.is_target(target) or (named and not named & wanted)
                if not left_out and not any(ends_in(module, [target]) for module in modules):
                    self.reasons.append(f"target_modules names {target!r}, for which there are no weights")

    def _name_in_task(self, name: str) -> str:
        """What PEFT called the body's module `name`."""
        return f"{self.layout.prefix}.{name}" if self._prefixed else name


@lru_cache(SEEN_NAMES)
def _split_key(key: str) -> tuple[str, str | None]:
    """(module, `lora_A` | `lora_B` | `bias` | one of SWITCHED), or (key, None) for anything else."""
    name = key.removeprefix(ROOT)
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


def bad_values(tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors of other dtypes than fp32, fp16, bf16, or with NaN or infinite elements (numpy: one thread)."""
    reasons = []
    for key, tensor in tensors.items():
        if tensor.dtype not in EXPONENTS:
            reasons.append(f"tensor {key!r} has dtype {tensor.dtype}, known are {[*map(str, EXPONENTS)]}")
            continue
        integer, mask = EXPONENTS[tensor.dtype]
        bits = tensor.contiguous().view(torch.int16 if integer is np.int16 else torch.int32).numpy()
        if bool(np.any((bits & integer(mask)) == integer(mask))):
            reasons.append(f"tensor {key!r} has NaN or infinite elements")
    return reasons

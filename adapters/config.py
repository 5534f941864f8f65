"""LoraConfig: what an `adapter_config.json` of PEFT means. Knows nothing of tensors or files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.config_fields import ALL_LINEAR, malformed, off, several, unsupported
from adapters.errors import InvalidAdapter
from adapters.patterns import WHOLE, covers, ends_in, first_match, layer_index, match

INPUT_EMBEDDING = ""
"""Stands for its name in `token_indices`, where the config gives none."""


@dataclass(frozen=True)
class LoraConfig:
    """The mathematics of one adapter: y = x Wᵀ + scaling · (x Aᵀ) Bᵀ on the target modules, and what stands beside it.

    scaling = alpha / rank, or alpha / √rank with `use_rslora`.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    """Names (a module's whole name, or its end after a dot), or one regular expression for the whole name."""
    task_type: str | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    """Of the base's own biases the adapter has: none, those of its targets (`lora_only`), or `all`."""
    lora_bias: bool = False
    """Whether B has a bias: y += scaling · b_bias."""
    use_dora: bool = False
    """Whether outputs are rescaled (dora.py)."""
    modules_to_save: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] | str = ()
    """As `target_modules`: no targets, whatever that says."""
    layers_to_transform: tuple[int, ...] | None = None
    """Of modules that are targets by the end of their names, those in these layers; None: in all."""
    layers_pattern: tuple[str, ...] = ()
    """Expressions for the name of the list in which layers are counted; none: any."""
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Tokens that have rows of their own (`trainable_token_indices`), by the name of the layer or INPUT_EMBEDDING."""
    ensure_weight_tying: bool = False
    """Whether what the embedding has of the adapter, the output head that is tied to it has too."""

    def rank_of(self, module: str) -> int:
        """The rank on `module`, by `rank_pattern` where a pattern matches."""
        return self.rank_pattern.get(first_match(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """The factor of B·A on `module`."""
        alpha = self.alpha_pattern.get(first_match(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def is_target(self, module: str) -> bool:
        """Whether PEFT would put LoRA on the linear layer `module` (its name inside the task's model).

        Source: peft/tuners/tuners_utils.py, check_target_module_exists. Raises InvalidAdapter for an expression that
        takes too long.
        """
        if self._is_left_out(module):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == ALL_LINEAR or match(WHOLE, self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        return ends_in(module, self.target_modules) and self._is_in_a_chosen_layer(module)

    def _is_left_out(self, module: str) -> bool:
        if isinstance(self.exclude_modules, str):
            excluded = match(WHOLE, self.exclude_modules, module) is not None
        else:
            excluded = ends_in(module, self.exclude_modules)
        return excluded or any(covers(saved, module) for saved in self.modules_to_save)

    def _is_in_a_chosen_layer(self, module: str) -> bool:
        if self.layers_to_transform is None:
            return True
        return layer_index(self.layers_pattern, module) in self.layers_to_transform


def parse_config(data: Any) -> LoraConfig:
    """Read the content of an `adapter_config.json`.

    Raises InvalidAdapter with every reason at once.
    """
    if not isinstance(data, dict):
        raise InvalidAdapter(["adapter_config.json is not a JSON object"])
    reasons = [*unsupported(data), *malformed(data)]
    if reasons:
        raise InvalidAdapter(reasons)
    return LoraConfig(
        rank=data["r"],
        alpha=data["lora_alpha"],
        target_modules=_names(data["target_modules"]),
        task_type=data.get("task_type"),
        use_rslora=bool(data.get("use_rslora")),
        rank_pattern=dict(data.get("rank_pattern") or {}),
        alpha_pattern=dict(data.get("alpha_pattern") or {}),
        bias=data.get("bias", "none"),
        lora_bias=bool(data.get("lora_bias")),
        use_dora=bool(data.get("use_dora")),
        modules_to_save=tuple(dict.fromkeys(data.get("modules_to_save") or ())),
        exclude_modules=_names(data.get("exclude_modules") or ()),
        layers_to_transform=_layers(data.get("layers_to_transform")),
        layers_pattern=several(data.get("layers_pattern")),
        token_indices=_token_indices(data.get("trainable_token_indices")),
        ensure_weight_tying=bool(data.get("ensure_weight_tying")),
    )


def _names(value: Any) -> tuple[str, ...] | str:
    """One expression, or several names."""
    return value if isinstance(value, str) else tuple(value)


def _layers(value: Any) -> tuple[int, ...] | None:
    if off(value):
        return None
    return tuple(value) if isinstance(value, list) else (value,)


def _token_indices(value: Any) -> dict[str, tuple[int, ...]]:
    if off(value):
        return {}
    named = value if isinstance(value, dict) else {INPUT_EMBEDDING: value}
    return {name: tuple(ids) for name, ids in named.items()}

"""LoraConfig: what an `adapter_config.json` of PEFT means.

Knows nothing of tensors or files. Every field of PEFT's LoraConfig stands in one of three lists here: honoured,
without effect at inference, or refused by name when it is switched on. A field in none of them is refused too,
unless it is off (null, false, empty).
Source: peft/tuners/lora/config.py, peft 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import InvalidAdapter
from adapters.patterns import KEY, LAYER, WHOLE, bad_expression, covers, ends_in, first_match, layer_index, match

TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")
ALL_LINEAR = "all-linear"
BIASES = ("none", "lora_only", "all")
SWITCHES = ("use_rslora", "lora_bias", "use_dora")

HONOURED = frozenset(
    {
        "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "lora_bias",
        "use_dora", "modules_to_save", "init_lora_weights",
    }
)  # fmt: skip

WITHOUT_EFFECT = frozenset(
    {
        # where it came from
        "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
        # training only
        "lora_dropout", "megatron_config", "megatron_core", "ensure_weight_tying",
        # how A and B were initialised; a kind that changes the base is refused through init_lora_weights
        "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        # which way W lies is known from the layer itself; PEFT corrects the field by it (lora/layer.py)
        "fan_in_fan_out",
        # read only when its switch (refused below) is on
        "qalora_group_size",
    }
)  # fmt: skip

REFUSED_WHEN_ON = (
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip

OTHER_METHODS = {
    "LOHA": ": its change of W is an element-wise product, of no low rank",
    "LOKR": ": its change of W is a Kronecker product, of no low rank",
    "OFT": ": it multiplies W instead of adding to it",
    "BOFT": ": it multiplies W instead of adding to it",
    "IA3": ": it rescales activations and adds nothing of low rank",
    "VERA": ": its factors are shared and random, and need not be saved with it",
    "PROMPT_TUNING": ": it adds tokens to the prompt",
    "P_TUNING": ": it adds tokens to the prompt",
    "PREFIX_TUNING": ": it adds keys and values to the cache",
}
"""Methods of PEFT that people have checkpoints of, and why they are no LoRA."""

# These change the base's weights when training begins, so A and B alone do not describe the adapter.
INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


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
    reasons = [*_unsupported(data), *_malformed(data)]
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
        layers_pattern=_several(data.get("layers_pattern")),
    )


def _names(value: Any) -> tuple[str, ...] | str:
    """One expression, or several names."""
    return value if isinstance(value, str) else tuple(value)


def _layers(value: Any) -> tuple[int, ...] | None:
    if _off(value):
        return None
    return tuple(value) if isinstance(value, list) else (value,)


def _several(value: Any) -> tuple[str, ...]:
    """One or several expressions."""
    if _off(value):
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _unsupported(data: Mapping[str, Any]) -> list[str]:
    """Everything that is switched on and that we do not serve, by name."""
    reasons = []
    if data.get("peft_type") != "LORA":
        why = OTHER_METHODS.get(str(data.get("peft_type")), "")
        reasons.append(f"peft_type {data.get('peft_type')!r} is not supported, only 'LORA' and 'ADALORA'{why}")
    task_type = data.get("task_type")
    if task_type is not None and task_type not in TASK_TYPES:
        reasons.append(f"task_type {task_type!r} is not supported, only {', '.join(TASK_TYPES)}")
    reasons += [f"{name} is not supported" for name in REFUSED_WHEN_ON if not _off(data.get(name))]
    if data.get("init_lora_weights", True) not in INITS_THAT_KEEP_THE_BASE:
        reasons.append(
            f"init_lora_weights {data['init_lora_weights']!r} changed the base model's weights: "
            "convert it to a plain LoRA when saving (path_initial_model_for_weight_conversion)"
        )
    known = HONOURED | WITHOUT_EFFECT | set(REFUSED_WHEN_ON)
    reasons += [f"unknown field {name!r}" for name in data if name not in known and not _off(data[name])]
    return reasons


def _malformed(data: Mapping[str, Any]) -> list[str]:
    """Fields with values outside their range or type."""
    reasons = []
    if not _positive_int(data.get("r")):
        reasons.append(f"r must be a positive whole number, not {data.get('r')!r}")
    if not is_finite(data.get("lora_alpha")):
        reasons.append(f"lora_alpha must be a finite number, not {data.get('lora_alpha')!r}")
    if data.get("bias", "none") not in BIASES:
        reasons.append(f"bias {data['bias']!r} is not supported, only {', '.join(BIASES)}")
    for switch in SWITCHES:
        if not isinstance(data.get(switch), bool | None):
            reasons.append(f"{switch} must be true or false, not {data[switch]!r}")
    if data.get("use_dora") is True and data.get("lora_bias") is True:
        reasons.append("use_dora does not go with lora_bias, neither here nor in PEFT")
    reasons += _malformed_targets(data.get("target_modules"))
    if not _off(data.get("exclude_modules")):
        reasons += _malformed_names("exclude_modules", data["exclude_modules"])
    reasons += _malformed_layers(data)
    saved = data.get("modules_to_save")
    if saved is not None and not _strings(saved):
        reasons.append("modules_to_save must be a list of names")
    reasons += _malformed_pattern("rank_pattern", data.get("rank_pattern"), _positive_int)
    reasons += _malformed_pattern("alpha_pattern", data.get("alpha_pattern"), is_finite)
    return reasons


def _malformed_targets(targets: Any) -> list[str]:
    return _malformed_names("target_modules", targets or None)


def _malformed_names(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return bad_expression(name, value)
    return [] if _strings(value) else [f"{name} must be a list of names or a regular expression"]


def _malformed_layers(data: Mapping[str, Any]) -> list[str]:
    """layers_to_transform and layers_pattern, which PEFT takes only together with names in target_modules."""
    layers, patterns = data.get("layers_to_transform"), data.get("layers_pattern")
    reasons = []
    if not _off(layers) and not all(_whole(layer) for layer in (layers if isinstance(layers, list) else [layers])):
        reasons.append("layers_to_transform must be a whole number or a list of them")
    if not _off(patterns):
        if not isinstance(patterns, str) and not _strings(patterns):
            reasons.append("layers_pattern must be a name or a list of names")
        else:
            reasons += [r for each in _several(patterns) for r in bad_expression("layers_pattern", each, LAYER)]
        if _off(layers):
            reasons.append("layers_pattern says nothing without layers_to_transform")
    if not (_off(layers) and _off(patterns)) and isinstance(data.get("target_modules"), str):
        reasons.append("layers_to_transform and layers_pattern need names in target_modules, not an expression")
    return reasons


def _malformed_pattern(name: str, pattern: Any, valid: Any) -> list[str]:
    if pattern is None:
        return []
    if not isinstance(pattern, dict):
        return [f"{name} must be an object"]
    reasons = [f"{name}[{key!r}] has the value {v!r}" for key, v in pattern.items() if not valid(v)]
    return reasons + [reason for key in pattern for reason in bad_expression(name, key, KEY)]


def _off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive_int(value: Any) -> bool:
    return _whole(value) and 0 < value < 1 << 31


def is_finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)

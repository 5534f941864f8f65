"""What PEFT's LoraConfig may say: each field is honoured, without effect at inference, or refused when it is on.

A field in none of these lists is refused too, unless it is off (null, false, empty). Knows nothing of what honoured
fields mean. Source: peft/tuners/lora/config.py, peft 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adapters.patterns import KEY, LAYER, bad_expression

TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")
ALL_LINEAR = "all-linear"
BIASES = ("none", "lora_only", "all")
SWITCHES = ("use_rslora", "lora_bias", "use_dora", "ensure_weight_tying")

HONOURED = frozenset(
    {
        "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "lora_bias",
        "use_dora", "modules_to_save", "init_lora_weights", "trainable_token_indices", "ensure_weight_tying",
    }
)  # fmt: skip

WITHOUT_EFFECT = frozenset(
    {
        # where it came from
        "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
        # training only
        "lora_dropout", "megatron_config", "megatron_core",
        # how A and B were initialised; a kind that changes the base is refused through init_lora_weights
        "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        # which way W lies is known from the layer itself; PEFT corrects the field by it (lora/layer.py)
        "fan_in_fan_out",
        # read only when its switch (refused below) is on
        "qalora_group_size",
    }
)  # fmt: skip

REFUSED_WHEN_ON = (
    "layer_replication", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config",
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


def unsupported(data: Mapping[str, Any]) -> list[str]:
    """Everything that is switched on and that we do not serve, by name."""
    reasons = []
    if data.get("peft_type") != "LORA":
        why = OTHER_METHODS.get(str(data.get("peft_type")), "")
        reasons.append(f"peft_type {data.get('peft_type')!r} is not supported, only 'LORA' and 'ADALORA'{why}")
    task_type = data.get("task_type")
    if task_type is not None and task_type not in TASK_TYPES:
        reasons.append(f"task_type {task_type!r} is not supported, only {', '.join(TASK_TYPES)}")
    reasons += [f"{name} is not supported" for name in REFUSED_WHEN_ON if not off(data.get(name))]
    if data.get("init_lora_weights", True) not in INITS_THAT_KEEP_THE_BASE:
        reasons.append(
            f"init_lora_weights {data['init_lora_weights']!r} changed the base model's weights: "
            "convert it to a plain LoRA when saving (path_initial_model_for_weight_conversion)"
        )
    known = HONOURED | WITHOUT_EFFECT | set(REFUSED_WHEN_ON)
    reasons += [f"unknown field {name!r}" for name in data if name not in known and not off(data[name])]
    return reasons


def malformed(data: Mapping[str, Any]) -> list[str]:
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
    if not off(data.get("exclude_modules")):
        reasons += _malformed_names("exclude_modules", data["exclude_modules"])
    reasons += _malformed_layers(data)
    saved = data.get("modules_to_save")
    if saved is not None and not _strings(saved):
        reasons.append("modules_to_save must be a list of names")
    reasons += _malformed_tokens(data.get("trainable_token_indices"))
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
    if not off(layers) and not all(_whole(layer) for layer in (layers if isinstance(layers, list) else [layers])):
        reasons.append("layers_to_transform must be a whole number or a list of them")
    if not off(patterns):
        if not isinstance(patterns, str) and not _strings(patterns):
            reasons.append("layers_pattern must be a name or a list of names")
        else:
            reasons += [r for each in several(patterns) for r in bad_expression("layers_pattern", each, LAYER)]
        if off(layers):
            reasons.append("layers_pattern says nothing without layers_to_transform")
    if not (off(layers) and off(patterns)) and isinstance(data.get("target_modules"), str):
        reasons.append("layers_to_transform and layers_pattern need names in target_modules, not an expression")
    return reasons


def _malformed_tokens(indices: Any) -> list[str]:
    """trainable_token_indices: token ids, or lists of them by the names of layers."""
    if off(indices):
        return []
    lists = [*indices.values()] if isinstance(indices, dict) else [indices]
    if not all(isinstance(ids, list) and all(_whole(i) and i >= 0 for i in ids) for ids in lists):
        return ["trainable_token_indices must be a list of token ids, or an object of such lists"]
    if any(len(set(ids)) < len(ids) for ids in lists):
        return ["trainable_token_indices names a token twice"]
    return []


def _malformed_pattern(name: str, pattern: Any, valid: Any) -> list[str]:
    if pattern is None:
        return []
    if not isinstance(pattern, dict):
        return [f"{name} must be an object"]
    reasons = [f"{name}[{key!r}] has the value {v!r}" for key, v in pattern.items() if not valid(v)]
    return reasons + [reason for key in pattern for reason in bad_expression(name, key, KEY)]


def off(value: Any) -> bool:
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


def several(value: Any) -> tuple[str, ...]:
    """One or several expressions."""
    if off(value):
        return ()
    return (value,) if isinstance(value, str) else tuple(value)

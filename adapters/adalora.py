"""AdaLoRA as LoRA: y += alpha / (init_r + 1e-5) · (x (E ⊙ A)ᵀ) Bᵀ, so that with E folded into A it is LoRA.

Each module has the rank that was left to it, also none. Source: peft/tuners/adalora (layer.py, and model.py for what a
saved rank allocation means). Knows nothing of files or of the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.config_fields import is_finite
from adapters.errors import InvalidAdapter
from adapters.values import widened

METHOD = "ADALORA"
FOLDED = "lora_E, folded into lora_A"
TRAINING = frozenset({"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"})
NOT_WITH_IT = ("alpha_pattern", "use_rslora", "use_dora", "lora_bias")
"""Fields of LoRA that PEFT's AdaLoRA passes over."""
KEY = r"(.+)\.lora_E(\.default)?"


def fold(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of the LoRA that computes the same; A in fp32. Raises InvalidAdapter.

    config, tensors: of a checkpoint whose peft_type is METHOD. Any thread; numpy, no torch operation that would enter
    the thread pool.
    """
    reasons = [f"{name} has no meaning with {METHOD}" for name in NOT_WITH_IT if config.get(name)]
    init_r, alpha = config.get("init_r"), config.get("lora_alpha")
    if not isinstance(init_r, int) or not 0 < init_r < 1 << 31:
        reasons.append(f"init_r must be a positive whole number, not {init_r!r}")
    if not is_finite(alpha):
        reasons.append(f"lora_alpha must be a finite number, not {alpha!r}")
    folded = {key: tensor for key, tensor in tensors.items() if not re.fullmatch(KEY, key)}
    ranks: dict[str, int] = {}
    for key in tensors.keys() - folded.keys():
        match = re.fullmatch(KEY, key)
        assert match is not None
        a_key, b_key = (f"{match[1]}.lora_{part}{match[2] or ''}" for part in "AB")
        a, b, e = tensors.get(a_key), tensors.get(b_key), tensors[key]
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or tuple(e.shape) != (len(a), 1):
            reasons.append(f"{key!r} does not fit to its lora_A and lora_B")
            continue
        ranks[match[1].removeprefix("base_model.model.")] = len(a)
        folded[a_key] = torch.from_numpy(widened(a) * widened(e))
        if not len(a):  # no rank is left: factors that are zero
            folded[a_key], folded[b_key] = torch.zeros(1, a.shape[1]), torch.zeros(len(b), 1)
    modules = [match[1] for key in tensors if (match := re.fullmatch(r"(.+)\.lora_A(?:\.default)?(?:\.weight)?", key))]
    without = [m for m in modules if f"{m}.lora_E" not in tensors and f"{m}.lora_E.default" not in tensors]
    reasons += [f"{module!r} lacks lora_E" for module in without]
    if reasons:
        raise InvalidAdapter(reasons)
    return _lora_config(config, ranks), folded


def _lora_config(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in {*TRAINING, "init_r", "rank_pattern"}}
    patterns = {re.escape(module): rank for module, rank in ranks.items()}
    alpha, init_r = config["lora_alpha"], config["init_r"]
    return {
        **kept,
        "peft_type": "LORA",
        "r": init_r,
        "rank_pattern": {module: max(rank, 1) for module, rank in patterns.items()},
        "alpha_pattern": {
            module: rank * (alpha if alpha > 0 else rank) / (init_r + 1e-5) for module, rank in patterns.items()
        },
    }

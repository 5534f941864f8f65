"""merge: several adapters into a new checkpoint, without the base. Knows nothing of slots or of the store.

Each adapter i adds scaling_i · B_i A_i to a layer's W. With weights w_i, and √|w_i · scaling_i| on both factors (its
sign on A), as peft/tuners/lora/model.py has them in add_weighted_adapter and peft/utils/merge_utils.py computes them:

    cat             A = all w_i · scaling_i · A_i, one below the other, B = all B_i side by side: just Σ w_i · ΔW_i
    linear          A = Σ A_i, B = Σ B_i, weighted: cheap, and not the sum of the products
    ties            of each factor the `density` largest numbers, those of the sign that has the majority, their mean
    dare_linear     of each factor a random share `density`, divided by that; then as linear
    dare_ties       the same; then as ties
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.adapter import Adapter, LoraPair
from adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from adapters.composition import is_plain, stacked
from adapters.errors import InvalidAdapter
from adapters.layout import BaseLayout

METHODS = ("cat", "linear", "ties", "dare_linear", "dare_ties")


@dataclass(frozen=True)
class Merging:
    """How adapters are merged."""

    method: str = "cat"
    density: float = 0.5
    """The share of numbers that stays, in (0, 1); not of `cat` and `linear`."""
    seed: int = 0
    """Of the random choice of `dare_linear` and `dare_ties`."""


def merge(
    adapters: Sequence[Adapter], weights: Sequence[float], layout: BaseLayout, directory: Path, how: Merging
) -> None:
    """Write the checkpoint of `adapters`, each times its weight, into `directory`, which is made. Factors in fp32.

    adapters: plain LoRA of one task on the base of `layout`. Raises InvalidAdapter with every reason, OSError. A thread
    that may run parallel torch operations.
    """
    reasons = _reasons(adapters, weights, how)
    if reasons:
        raise InvalidAdapter(reasons)
    generator = torch.Generator().manual_seed(how.seed)
    tensors, ranks = {}, {}
    for name in (*layout.linears, *(layer.name for layer in (layout.embedding, layout.output) if layer)):
        pairs = [
            (adapter.pairs[name], w) for adapter, w in zip(adapters, weights, strict=True) if name in adapter.pairs
        ]
        if not pairs:
            continue
        a, b = stacked(pairs) if how.method == "cat" else _combine(pairs, how, generator)
        module = _name_in_task(name, layout, adapters[0].info.task_type)
        part = "lora_embedding_{}" if layout.embedding and name == layout.embedding.name else "lora_{}.weight"
        tensors[f"base_model.model.{module}.{part.format('A')}"] = a.contiguous()
        tensors[f"base_model.model.{module}.{part.format('B')}"] = b.contiguous()
        ranks[module] = len(a)
    directory.mkdir(parents=True)
    save_file(tensors, directory / WEIGHTS_FILE)
    (directory / CONFIG_FILE).write_text(json.dumps(_config(adapters[0], ranks), indent=2))


def _name_in_task(name: str, layout: BaseLayout, task_type: str) -> str:
    """What PEFT calls a layer in the task's model."""
    outside = layout.output is not None and name == layout.output.name
    return name if outside or task_type == "FEATURE_EXTRACTION" else layout.in_task(name)


def _reasons(adapters: Sequence[Adapter], weights: Sequence[float], how: Merging) -> list[str]:
    reasons = []
    if not adapters or len(adapters) != len(weights):
        return [f"{len(adapters)} adapters cannot be merged with {len(weights)} weights"]
    if how.method not in METHODS:
        reasons.append(f"the method {how.method!r} is not supported, only {', '.join(METHODS)}")
    if not all(map(math.isfinite, weights)):
        reasons.append("the weights must be finite")
    if how.method not in ("cat", "linear") and not 0 < how.density < 1:
        reasons.append(f"the density must lie between 0 and 1, not {how.density}")
    if len({adapter.info.task_type for adapter in adapters}) > 1:
        reasons.append("the adapters have different tasks")
    for number, adapter in enumerate(adapters):
        if not is_plain(adapter):
            reasons.append(f"adapter {number} has a head, biases, magnitudes or tokens: only plain LoRA is merged")
        elif adapter.info.tokenizer:
            reasons.append(f"adapter {number} has a tokenizer of its own, which cannot be merged")
    return reasons if how.method == "cat" else reasons + _uneven_ranks(adapters)


def _uneven_ranks(adapters: Sequence[Adapter]) -> list[str]:
    reasons = []
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.pairs):
        ranks = {len(adapter.pairs[name].a) for adapter in adapters if name in adapter.pairs}
        if len(ranks) > 1:
            reasons.append(f"the ranks on {name!r} differ ({sorted(ranks)}), which only `cat` takes")
    return reasons


def _config(first: Adapter, ranks: Mapping[str, int]) -> dict[str, object]:
    """alpha = rank everywhere: the scaling is in the factors."""
    rank = max(ranks.values())
    pattern = {f"^{module}$".replace(".", r"\."): r for module, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": first.info.task_type,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "bias": "none",
        "inference_mode": True,
    }


def _combine(
    pairs: Sequence[tuple[LoraPair, float]], how: Merging, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A and B, each of its own kind."""
    factors = [weight * pair.scaling for pair, weight in pairs]
    roots = torch.tensor([math.sqrt(abs(factor)) for factor in factors])
    signs = torch.tensor([1.0 if factor >= 0 else -1.0 for factor in factors])
    sum_up = _disjoint_mean if how.method.endswith("ties") else _weighted_sum
    merged = []
    for parts, weights in (([p.a for p, _ in pairs], roots * signs), ([p.b for p, _ in pairs], roots)):
        pruned = torch.stack([_pruned(part.float(), how, generator) for part in parts])
        merged.append(sum_up(pruned, weights[:, None, None]))
    return merged[0], merged[1]


def _pruned(part: Tensor, how: Merging, generator: torch.Generator) -> Tensor:
    if how.method == "linear":
        return part
    if how.method == "ties":
        kept = torch.zeros(part.numel())
        kept[part.abs().flatten().topk(int(how.density * part.numel())).indices] = 1
        return part * kept.view(part.shape)
    kept = torch.bernoulli(torch.full(part.shape, how.density), generator=generator)
    return part * kept / how.density


def _weighted_sum(parts: Tensor, weights: Tensor) -> Tensor:
    return (parts * weights).sum(0)


def _disjoint_mean(parts: Tensor, weights: Tensor) -> Tensor:
    """The mean of those weighted numbers whose sign is that of the unweighted sum."""
    majority = torch.where(parts.sum(0) >= 0, 1, -1)
    agreeing = parts.sign() == majority
    return (parts * weights * agreeing).sum(0) / agreeing.sum(0).clamp(min=1.0)

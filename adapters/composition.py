"""Composition: several adapters as one, Σ w_i · ΔW_i, for as long as a request needs it. The base is not touched.

Each adapter i adds scaling_i · B_i A_i to a layer's W, so that

    A = all w_i · scaling_i · A_i, one below the other        B = all B_i side by side        scaling = 1

adds their weighted sum: an adapter like any other, of stacked ranks (`cat` of peft's add_weighted_adapter).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterInfo, Limits, LoraPair
from adapters.arena import POOL_DTYPES, build_arena
from adapters.config import LoraConfig
from adapters.config_fields import ALL_LINEAR
from adapters.errors import InvalidAdapter
from adapters.version import AdapterVersion, Source

MAX_PARTS = 8


@dataclass(frozen=True)
class Composed(Source):
    """No file: what is made of `parts`, which are held as long as it is known."""

    parts: tuple[tuple[AdapterVersion, float], ...] = ()
    """Each with its weight."""


def composed_source(parts: Sequence[tuple[AdapterVersion, float]]) -> tuple[AdapterInfo, Composed]:
    """Under which digest, and from where, a composition is read. Its digest is that of the parts' and the weights."""
    infos = [version.info for version, _ in parts]
    content = [[version.digest, weight] for version, weight in parts]
    digest = hashlib.sha256(f"composition {json.dumps(content)}".encode()).hexdigest()
    num_bytes = 2 * sum(info.num_bytes for info in infos)  # in fp32, where the parts may have 16 bits
    info = AdapterInfo(
        digest, infos[0].task_type, sum(info.rank for info in infos), (), infos[0].problem_type, num_bytes
    )
    return info, Composed(Path("composed", digest), parts=tuple(parts))


def check_composition(adapters: Sequence[Adapter], weights: Sequence[float], limits: Limits) -> None:
    """Raises InvalidAdapter with every reason why these cannot be composed."""
    reasons = []
    if not 1 <= len(adapters) <= MAX_PARTS:
        reasons.append(f"{len(adapters)} adapters cannot be composed, at most {MAX_PARTS}")
    if not all(map(math.isfinite, weights)):
        reasons.append("the weights must be finite")
    tasks = {adapter.info.task_type for adapter in adapters}
    if len(tasks) > 1:
        reasons.append(f"the adapters have different tasks: {', '.join(sorted(tasks))}")
    for number, adapter in enumerate(adapters):
        if not is_plain(adapter):
            reasons.append(f"adapter {number} has a head, biases, magnitudes or tokens: only plain LoRA is composed")
        elif adapter.info.tokenizer:
            reasons.append(f"adapter {number} has a tokenizer of its own")
    rank = sum(adapter.info.rank for adapter in adapters)
    if rank > limits.max_lora_rank:
        reasons.append(f"the ranks together are {rank}, over the limit {limits.max_lora_rank}")
    if reasons:
        raise InvalidAdapter(reasons)


def compose(adapters: Sequence[Adapter], weights: Sequence[float], info: AdapterInfo, limits: Limits) -> Adapter:
    """One adapter of several. Raises InvalidAdapter. Any thread; runs no parallel torch operation."""
    check_composition(adapters, weights, limits)
    pairs = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.pairs):
        mine = [(adapter.pairs[name], w) for adapter, w in zip(adapters, weights, strict=True) if name in adapter.pairs]
        pairs[name] = LoraPair(*stacked(mine), 1.0)
    arena = build_arena(pairs, POOL_DTYPES[limits.lora_dtype], pinned=limits.pinned)
    config = LoraConfig(rank=info.rank, alpha=info.rank, target_modules=ALL_LINEAR, task_type=info.task_type)
    return Adapter(info, config, arena.pairs, None, memory=arena.memory)


def stacked(pairs: Sequence[tuple[LoraPair, float]]) -> tuple[Tensor, Tensor]:
    """A [Σ rank, d_in], B [d_out, Σ rank] of pairs with their weights, in fp32."""
    a = torch.cat([pair.a.float() * (weight * pair.scaling) for pair, weight in pairs])
    return a, torch.cat([pair.b.float() for pair, _ in pairs], dim=1)


def is_plain(adapter: Adapter) -> bool:
    """Whether it is LoRA alone."""
    vectors = [vector for p in adapter.pairs.values() for vector in (p.bias, p.b_bias, p.magnitude)]
    without_parts = adapter.head is None and adapter.tokens is None and not adapter.biases
    return without_parts and all(vector is None for vector in vectors)

"""Small bases and adapters built in memory, for the tests of slots, layers and the registry; resident memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.adapter import Adapter, AdapterInfo, Head, LoraPair, largest_rank
from adapters.config import LoraConfig
from adapters.layout import BaseLayout, layout_of

HIDDEN = 8
PLAIN, BIASED, NORM = "plain", "biased", "norm"


class SmallBody(nn.Module):
    """Two linear layers, one with a bias, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(HIDDEN, 12, bias=False)
        self.biased = nn.Linear(HIDDEN, 6)
        self.norm = nn.LayerNorm(HIDDEN)


def small_base() -> tuple[SmallBody, BaseLayout]:
    """The body, always with the same weights, and its layout."""
    torch.manual_seed(3)
    body = SmallBody().requires_grad_(False)
    return body, layout_of(body, "model", HIDDEN, generates=True)


def random_pair(seed: int, d_in: int, d_out: int, rank: int, scaling: float = 2.0, bias: bool = False) -> LoraPair:
    """A visible LoRA term for one linear layer."""
    rng = torch.Generator().manual_seed(seed)
    return LoraPair(
        a=torch.randn(rank, d_in, generator=rng),
        b=torch.randn(d_out, rank, generator=rng),
        scaling=scaling,
        bias=torch.randn(d_out, generator=rng) if bias else None,
    )


def adapter_of(
    pairs: dict[str, LoraPair], digest: str = "d", head: Head | None = None, biases: dict[str, Tensor] | None = None
) -> Adapter:
    """An adapter with these factors, as if it had been read from a checkpoint."""
    tensors: list[Tensor] = [t for pair in pairs.values() for t in (pair.a, pair.b)]
    return Adapter(
        info=AdapterInfo(
            digest=digest,
            task_type="SEQ_CLS" if head else "CAUSAL_LM",
            rank=largest_rank(pairs),
            labels=tuple(f"LABEL_{i}" for i in range(len(head.weight) if head else 0)),
            problem_type="single_label_classification",
            num_bytes=sum(t.numel() * t.element_size() for t in tensors),
        ),
        config=LoraConfig(rank=1, alpha=1, target_modules=tuple(pairs)),
        pairs=pairs,
        head=head,
        biases=biases or {},
    )


def save_small(directory: Path, number: int, rank: int = 2) -> Path:
    """A PEFT checkpoint for `small_base`, whose content depends on `number` alone."""
    pair = random_pair(number, HIDDEN, 12, rank)
    prefix = f"base_model.model.model.{PLAIN}"
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{prefix}.lora_A.weight": pair.a, f"{prefix}.lora_B.weight": pair.b}, directory / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 4, "target_modules": [PLAIN]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def resident_bytes_of(file: Path) -> int:
    """Of the mappings of `file`. Linux only."""
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    return sum(int(m.split("\nRss:")[1].split()[0]) * 1024 for m in mappings if str(file) in m)

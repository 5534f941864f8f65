"""The LoRA term, behind one contract (contract.py). Which implementation runs is chosen once, at start."""

from __future__ import annotations

from adapters.kernels.contract import AddLora, LoraWeights
from adapters.kernels.reference import add_lora_reference
from adapters.kernels.segments import add_lora_segments

KERNELS: dict[str, AddLora] = {"reference": add_lora_reference, "torch": add_lora_segments}

__all__ = ["KERNELS", "AddLora", "LoraWeights", "add_lora_reference", "add_lora_segments"]

"""The LoRA term, behind one contract (contract.py). Which implementation runs is chosen once, at start."""

from __future__ import annotations

import torch

from adapters.kernels.contract import AddLora, LoraTerm, LoraWeights
from adapters.kernels.library import load_library
from adapters.kernels.native_lora import NativeLora
from adapters.kernels.reference import add_lora_reference
from adapters.kernels.segments import add_lora_segments

KERNEL_NAMES = ("auto", "native", "triton", "torch", "reference")


class KernelNotAvailable(Exception):
    """A kernel was asked for by name that does not run here; the message says why."""


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype, max_rank: int) -> AddLora:
    """The implementation called `name`; `auto`: the fastest on `device`. Raises KernelNotAvailable.

    dtype: of the rows on the CPU, where each slot's factors have their own; on a GPU that of all factors.
    """
    if name == "reference":
        return add_lora_reference
    if name == "torch":
        return add_lora_segments
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        if device.type != "cuda":
            raise KernelNotAvailable("kernel triton needs an NVIDIA GPU")
        from adapters.kernels.triton_lora import TritonLora  # noqa: PLC0415  -- triton comes with torch for CUDA only

        return TritonLora(device, dtype, max_rank)
    library = load_library() if device.type == "cpu" and dtype == torch.float32 else None
    if library is not None:
        return NativeLora(library)
    if name == "native":
        raise KernelNotAvailable(
            "kernel native needs a base in fp32 on the CPU, and to be built (multilora build-kernels)"
        )
    return add_lora_segments


__all__ = [
    "KERNEL_NAMES",
    "AddLora",
    "KernelNotAvailable",
    "LoraTerm",
    "LoraWeights",
    "NativeLora",
    "add_lora_reference",
    "add_lora_segments",
    "choose_kernel",
    "load_library",
]

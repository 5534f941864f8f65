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


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype) -> AddLora:
    """The implementation called `name`; `auto`: the fastest for rows of `dtype` on `device`.

    Raises KernelNotAvailable.
    """
    if name == "reference":
        return add_lora_reference
    if name == "torch":
        return add_lora_segments
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        if device.type != "cuda":
            raise KernelNotAvailable("kernel triton needs an NVIDIA GPU")
        from adapters.kernels.triton_lora import TritonLora  # noqa: PLC0415  -- triton comes with torch for CUDA only

        return TritonLora(device)
    library = load_library() if device.type == "cpu" and dtype == torch.float32 else None
    if library is not None:
        return NativeLora(library)
    if name == "native":
        raise KernelNotAvailable("kernel native is not built (multilora build-kernels), or the base is not fp32 on the CPU")
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

"""Arena: all LoRA factors of one adapter in one buffer, as the kernels read them.

Knows nothing of files or slots. Made once, by the thread that loads the checkpoint; on the CPU a slot then only points
here, and on a GPU it is filled by one copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.adapter import LoraPair
from adapters.memory import ALIGNMENT, LargePages

POOL_DTYPES: Mapping[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""`auto`: 16 bits where nothing is lost (as saved, or fp32 that fits), else fp32. The others convert, and may round."""


@dataclass(frozen=True)
class Arena:
    """The factors of one adapter."""

    memory: Tensor  # uint8
    pairs: Mapping[str, LoraPair]
    """As given, but a [rank, d_in] and bᵀ [rank, d_out] lie contiguous in `memory`; same dtype in a pair."""


def build_arena(pairs: Mapping[str, LoraPair], pool_dtype: torch.dtype | None = None) -> Arena:
    """Copy `pairs` into one buffer, in `pool_dtype`; None: as POOL_DTYPES says of `auto`.

    Any thread: numpy copies, no torch operation that would enter the thread pool.
    """
    dtypes = {name: pool_dtype or _smallest(pair) for name, pair in pairs.items()}
    sizes = [
        _aligned(part.numel() * dtypes[name].itemsize) for name, pair in pairs.items() for part in (pair.a, pair.b)
    ]
    size = sum(sizes)
    memory = LargePages(size).empty(size, torch.uint8)
    placed: dict[str, LoraPair] = {}
    offset = 0
    for name, pair in pairs.items():
        parts = []
        for source in (pair.a, pair.b.T):
            dtype = dtypes[name]
            target = memory[offset : offset + source.numel() * dtype.itemsize].view(dtype).view(source.shape)
            _copy(target, source)
            parts.append(target)
            offset += _aligned(source.numel() * dtype.itemsize)
        placed[name] = LoraPair(parts[0], parts[1].T, pair.scaling, pair.bias)
    return Arena(memory, placed)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _smallest(pair: LoraPair) -> torch.dtype:
    """The narrowest dtype that holds both factors exactly."""
    dtypes = {pair.a.dtype, pair.b.dtype}
    if len(dtypes) == 1 and dtypes != {torch.float32}:
        return pair.a.dtype
    parts = [_widened(pair.a), _widened(pair.b)]
    for dtype in (torch.float16, torch.bfloat16):
        if all(_fits(part, dtype) for part in parts):
            return dtype
    return torch.float32


def _fits(values: NDArray[np.float32], dtype: torch.dtype) -> bool:
    if dtype is torch.bfloat16:
        return not bool((values.view(np.uint32) & 0xFFFF).any())
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))


def _widened(tensor: Tensor) -> NDArray[np.float32]:
    """As fp32 in numpy, which knows no bf16."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:
        return (tensor.view(torch.uint16).numpy().astype(np.uint32) << 16).view(np.float32)
    return tensor.numpy().astype(np.float32)


def _copy(target: Tensor, source: Tensor) -> None:
    if target.dtype is source.dtype:
        bits: Any = torch.int16 if target.dtype.itemsize == 2 else torch.int32
        np.copyto(target.view(bits).numpy(), source.detach().view(bits).numpy())
    elif target.dtype is torch.bfloat16:
        np.copyto(target.view(torch.uint16).numpy(), _rounded_bfloat16(_widened(source)))
    else:
        np.copyto(target.numpy(), _widened(source), casting="same_kind")


def _rounded_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To the nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

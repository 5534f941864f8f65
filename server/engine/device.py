"""Where the engine computes and in which dtypes; how lists of numbers get there.

Knows nothing of adapters' content, models or sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

DEVICE_NAMES = ("auto", "cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALIGNMENT_BYTES = 16
"""Of the arrays that share a copy: what kernels are compiled for must not change with the lengths before them."""


class DeviceNotAvailable(Exception):
    """A device was asked for that is not there; the message says which."""


def choose_device(name: str) -> torch.device:
    """`auto`: a GPU where there is one. Raises DeviceNotAvailable. Any thread."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceNotAvailable("device cuda needs an NVIDIA GPU, and a torch that was built for it")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(name: str, device: torch.device, saved: torch.dtype | None) -> torch.dtype:
    """`auto`: fp32 on the CPU; on a GPU the checkpoint's own (`saved`) where that has 16 bits, else bfloat16."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return saved if saved in (torch.float16, torch.bfloat16) else torch.bfloat16


def choose_lora_dtype(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """In which dtype adapters are held. `auto` on a GPU: the base's `dtype`, for its kernels take one for all."""
    if name == "auto" and device.type != "cpu":
        return next(known for known, value in DTYPES.items() if value == dtype)
    return name


def to_device(device: torch.device, arrays: Sequence[ArrayLike], dtype: torch.dtype = torch.int64) -> list[Tensor]:
    """Each array as a tensor of `dtype` on `device`: views of one buffer, by one copy that nothing waits for.

    Engine's thread. torch keeps pinned memory from others until the copy out of it has ended.
    """
    given = [np.asarray(array) for array in arrays]
    room = ALIGNMENT_BYTES // dtype.itemsize
    starts = [0, *itertools.accumulate(-(-array.size // room) * room for array in given)]
    host = torch.empty(starts[-1], dtype=dtype, pin_memory=device.type == "cuda")
    values = host.numpy()
    for array, start in zip(given, starts, strict=False):
        values[start : start + array.size] = array.ravel()
    buffer = host.to(device, non_blocking=True)
    return [buffer[i : i + array.size].view(array.shape) for array, i in zip(given, starts, strict=False)]

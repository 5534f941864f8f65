"""The values of tensors of any dtype: as fp32, and their digest. Any thread: numpy, which enters no thread pool."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIGESTED_ROWS = 1024


def widened(tensor: Tensor) -> NDArray[np.float32]:
    """As fp32 in numpy, which knows no bf16. Any thread."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:
        return (tensor.view(torch.uint16).numpy().astype(np.uint32) << 16).view(np.float32)
    return tensor.numpy().astype(np.float32)


def digest_of(matrix: Tensor) -> str:
    """sha256 of shape and fp32 values, row by row; two matrices of any dtypes have the same when they are equal."""
    result = hashlib.sha256(repr(tuple(matrix.shape)).encode())
    for start in range(0, len(matrix), DIGESTED_ROWS):
        rows = widened(matrix[start : start + DIGESTED_ROWS].cpu())
        result.update((rows + np.float32(0)).tobytes())  # -0 and 0 are equal
    return result.hexdigest()

"""The values of tensors: as fp32, their digest, whether they are numbers. Any thread: numpy, in no thread pool."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIGESTED_ROWS = 1024
# The bits of the exponent: all set in infinities and NaN.
EXPONENTS = {
    torch.float16: (np.int16, 0x7C00),
    torch.bfloat16: (np.int16, 0x7F80),
    torch.float32: (np.int32, 0x7F800000),
}


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


def bad_values(tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors of other dtypes than fp32, fp16, bf16, or with NaN or infinite elements (numpy: one thread)."""
    reasons = []
    for key, tensor in tensors.items():
        if tensor.dtype not in EXPONENTS:
            reasons.append(f"tensor {key!r} has dtype {tensor.dtype}, known are {[*map(str, EXPONENTS)]}")
            continue
        integer, mask = EXPONENTS[tensor.dtype]
        bits = tensor.contiguous().view(torch.int16 if integer is np.int16 else torch.int32).numpy()
        if bool(np.any((bits & integer(mask)) == integer(mask))):
            reasons.append(f"tensor {key!r} has NaN or infinite elements")
    return reasons

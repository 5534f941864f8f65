"""The compiled CPU kernels, as Python calls them: addresses and sizes through ctypes. See native/api.cpp.

Knows nothing of slots, sequences or modules. Nothing here is checked on the other side: callers give fp32 tensors whose
rows are contiguous, and keep them alive. Engine's thread only: the kernels enter torch's own OpenMP pool.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from adapters.kernels.build import built_file, targets
from adapters.kernels.contract import POOL_DTYPES

logger = logging.getLogger(__name__)

SILU, GELU_TANH = 0, 1
"""Activations of `gated`."""


class Layer(ctypes.Structure):
    """native/linear.h, Layer."""

    _fields_ = (
        ("packed", c_void_p), ("bias", c_void_p), ("table", c_void_p), ("d_in", c_int64), ("d_out", c_int64),
        ("y", c_void_p), ("y_stride", c_int64), ("dtype", c_int32), ("unused", c_int32),
    )  # fmt: skip


class Attention(ctypes.Structure):
    """native/attention.h, Attention."""

    _fields_ = (
        ("keys", c_void_p), ("values", c_void_p),
        ("kv_heads", c_int64), ("heads", c_int64), ("d", c_int64), ("v_d", c_int64), ("v_width", c_int64),
        ("block_size", c_int64),
        ("q", c_void_p), ("k", c_void_p), ("v", c_void_p),
        ("q_row", c_int64), ("q_head", c_int64), ("k_row", c_int64), ("k_head", c_int64), ("v_row", c_int64),
        ("v_head", c_int64),
        ("cos", c_void_p), ("sin", c_void_p), ("rope_row", c_int64),
        ("out", c_void_p), ("scale", c_float), ("softcap", c_float), ("causal", c_int32), ("window", c_int32),
    )  # fmt: skip


class Library:
    """One loaded object. Its functions are called with addresses (`Tensor.data_ptr`, `ctypes.addressof`)."""

    def __init__(self, file: Path) -> None:
        self.file = file
        library = ctypes.CDLL(str(file))
        signatures = {
            "packed_elements": (c_int64, c_int64, c_int64),
            "pack": (None, c_void_p, c_int64, c_int64, c_int32, c_void_p),
            "linear": (None, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int64),
            "attend": (None, c_void_p, c_void_p, c_int64, c_void_p),
            "rms_norm": (None, c_void_p, c_void_p, c_float, c_void_p, c_int64, c_int64),
            "gated": (None, c_void_p, c_void_p, c_void_p, c_int64, c_int32),
            "vector_lanes": (c_int32,),
        }
        for name, (result, *arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.linear = library.linear
        self.attend = library.attend
        self.rms_norm = library.rms_norm
        self.gated = library.gated
        self.lanes: int = library.vector_lanes()
        self._pack = library.pack
        self._packed_elements = library.packed_elements

    def packed_elements(self, d_out: int, d_in: int) -> int:
        """How many numbers a packed W [d_out, d_in] takes."""
        return int(self._packed_elements(d_out, d_in))

    def pack(self, weight: Tensor, packed: Tensor) -> None:
        """W [d_out, d_in] fp32 into the panels of native/product.h, in the dtype of `packed`, which must hold it."""
        weight = weight.contiguous()
        d_out, d_in = weight.shape
        self._pack(weight.data_ptr(), d_out, d_in, POOL_DTYPES.index(packed.dtype), packed.data_ptr())


@cache
def load_library() -> Library | None:
    """The best object that was built and that this processor runs; None, with a line in the log, where there is none.

    torch's own finding about the processor decides, so that $ATEN_CPU_CAPABILITY bounds both.
    """
    capability = torch.backends.cpu.get_cpu_capability()  # type: ignore[no-untyped-call]
    usable = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(capability, ("neon",))
    for target in targets():
        if target in usable and (file := built_file(target)).exists():
            return Library(file)
    if targets():
        logger.warning("the CPU kernels are not built (multilora build-kernels): the slower torch path is used")
    else:
        logger.warning("there are no CPU kernels for this machine: the slower torch path is used")
    return None

"""The compiled CPU kernels, as Python calls them: addresses and sizes through ctypes. See native/api.cpp.

Knows nothing of slots, sequences or modules. Nothing here is checked on the other side: callers give fp32 tensors whose
rows are contiguous, and keep them alive. Engine's thread only: the kernels enter torch's own OpenMP pool.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from adapters.kernels.build import built_file, targets
from adapters.kernels.contract import POOL_DTYPES
from adapters.memory import LargePages

logger = logging.getLogger(__name__)

SILU, GELU_TANH = 0, 1
"""Activations of `gated`."""

INT8, INT8_DYNAMIC = 3, 4
"""Further forms of a packed W, beside POOL_DTYPES: 8-bit weights; with 8-bit inputs, not 16-bit (native/int8.h)."""

SIDE_BY_SIDE = 2
"""Inputs of a W in bf16 that stand next to each other (native/product.h)."""


class Layer(ctypes.Structure):
    """native/linear.h, Layer."""

    _fields_ = (
        ("packed", c_void_p), ("bias", c_void_p), ("table", c_void_p), ("d_in", c_int64), ("d_out", c_int64),
        ("y", c_void_p), ("y_stride", c_int64), ("dtype", c_int32), ("unused", c_int32),
    )  # fmt: skip


class Norm(ctypes.Structure):
    """native/small.h, Norm."""

    _fields_ = (("weight", c_void_p), ("eps", c_float), ("unused", c_int32))


class Attention(ctypes.Structure):
    """native/pages.h, Attention."""

    _fields_ = (
        ("keys", c_void_p), ("values", c_void_p),
        ("kv_heads", c_int64), ("heads", c_int64), ("d", c_int64), ("v_d", c_int64), ("v_width", c_int64),
        ("block_size", c_int64),
        ("q", c_void_p), ("k", c_void_p), ("v", c_void_p),
        ("q_row", c_int64), ("q_head", c_int64), ("k_row", c_int64), ("k_head", c_int64), ("v_row", c_int64),
        ("v_head", c_int64),
        ("cos", c_void_p), ("sin", c_void_p), ("rope_row", c_int64), ("rotated", c_int64),
        ("q_norm", Norm), ("k_norm", Norm),
        ("out", c_void_p), ("scale", c_float), ("softcap", c_float), ("causal", c_int32), ("window", c_int32),
        ("bias", c_void_p), ("biases", c_int64), ("before", c_int64), ("page_dtype", c_int32), ("unused", c_int32),
    )  # fmt: skip


class NativeResidual(ctypes.Structure):
    """native/decoder.h, Residual."""

    _fields_ = (("before", Norm), ("after", Norm), ("factor", c_float), ("unused", c_int32))


class DecoderLayer(ctypes.Structure):
    """native/decoder.h, DecoderLayer."""

    _fields_ = (
        ("of_attention", NativeResidual), ("of_mlp", NativeResidual), ("q_norm", Norm), ("k_norm", Norm),
        ("qkv", c_void_p), ("o", c_void_p), ("gate_up", c_void_p), ("down", c_void_p),
        ("attention", c_void_p), ("activation", c_int64),
        ("num_qkv", c_int32), ("num_gate_up", c_int32), ("angles", c_int64),
    )  # fmt: skip


class Angles(ctypes.Structure):
    """native/decoder.h, Angles."""

    _fields_ = (("cos", c_void_p), ("sin", c_void_p), ("row", c_int64), ("d", c_int64))


class Row(ctypes.Structure):
    """native/decoder.h, Row."""

    _fields_ = (
        ("tokens", c_int64), ("angles", c_void_p), ("segments", c_void_p), ("num_segments", c_int64),
        ("spans", c_void_p), ("num_spans", c_int64), ("pages", c_void_p),
    )  # fmt: skip


class Draw(ctypes.Structure):
    """native/sampling.h, Draw."""

    _fields_ = (
        ("temperature", c_double), ("min_p", c_double), ("top_p", c_double), ("uniform", c_double), ("top_k", c_int64),
    )  # fmt: skip


class Library:
    """One loaded object. Its functions are called with addresses (`Tensor.data_ptr`, `ctypes.addressof`)."""

    def __init__(self, file: Path) -> None:
        self.file = file
        _load_openmp()
        library = ctypes.CDLL(str(file))
        signatures = {
            "packed_bytes": (c_int64, c_int64, c_int64, c_int32),
            "pack": (None, c_void_p, c_int64, c_int64, c_int32, c_void_p),
            "linear": (None, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int64),
            "attend": (None, c_void_p, c_void_p, c_int64, c_void_p),
            "decode": (None, c_void_p, c_int64, c_void_p, c_void_p),
            "rms_norm": (None, c_void_p, c_void_p, c_float, c_void_p, c_int64, c_int64),
            "add_rms_norm": (None, c_void_p, c_void_p, c_void_p, c_float, c_void_p, c_int64, c_int64),
            "gated": (None, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int32),
            "sample": (None, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
            "vector_lanes": (c_int32,),
            "has_tiles": (c_int32,),
        }
        for name, (result, *arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.linear = library.linear
        self.attend = library.attend
        self.decode = library.decode
        self.rms_norm = library.rms_norm
        self.add_rms_norm = library.add_rms_norm
        self.gated = library.gated
        self.sample = library.sample
        self.lanes: int = library.vector_lanes()
        self.has_tiles = bool(library.has_tiles())
        """Whether products of many rows with a W in bf16 are computed by AMX tiles."""
        self._pack = library.pack
        self._packed_bytes = library.packed_bytes
        self._panel: int = library.packed_bytes(1, 1, POOL_DTYPES.index(torch.float32)) // 4
        """Rows of W that stand side by side."""

    def pack(self, weight: Tensor, form: int, memory: LargePages) -> Tensor:
        """W [d_out, d_in] fp32 in the panels of the kernels, as bytes.

        form: a place in POOL_DTYPES, which must hold W exactly, or INT8, INT8_DYNAMIC.
        """
        weight = weight.contiguous()
        d_out, d_in = weight.shape
        packed = memory.empty(self._packed_bytes(d_out, d_in, form), torch.uint8)
        self._pack(weight.data_ptr(), d_out, d_in, form, packed.data_ptr())
        return packed

    def panels(self, packed: Tensor, d_in: int, form: int) -> Tensor:
        """[d_out / n, d_in / m, n, m]: what `pack` made in one of POOL_DTYPES. Row r of W is [r // n, :, r % n, :].

        bf16 has m inputs side by side, and zeros after the last one.
        """
        dtype = POOL_DTYPES[form]
        side = SIDE_BY_SIDE if dtype == torch.bfloat16 else 1
        depth = self._packed_bytes(1, d_in, form) // (self._panel * dtype.itemsize)
        return packed.view(dtype).view(-1, depth // side, self._panel, side)


@cache
def load_library() -> Library | None:
    """The best object that was built and that this processor runs; None, with a line in the log, where there is none.

    torch's own finding about the processor decides, so that $ATEN_CPU_CAPABILITY bounds both.
    """
    reason = "are not built (multilora build-kernels)" if targets() else "do not exist for this machine"
    for target in usable_targets():
        if (file := built_file(target)).exists():
            try:
                library = Library(file)
            except OSError as error:
                reason = f"cannot be loaded ({error})"
                continue
            if target == "avx512amx" and not library.has_tiles:
                logger.warning("the system does not let this process use AMX: products are computed with AVX-512")
            return library
    logger.warning("the CPU kernels %s: the slower torch path is used", reason)
    return None


def usable_targets() -> list[str]:
    """What this processor runs, best first, as torch finds it and $ATEN_CPU_CAPABILITY bounds it."""
    found = torch.cpu.get_capabilities()
    usable = {"AVX512": {"avx512", "avx2"}, "AVX2": {"avx2"}}.get(torch.backends.cpu.get_cpu_capability(), {"neon"})
    needs = {
        "avx512vnni": ("avx512", ["avx512_vnni"]),
        "avx512amx": ("avx512", ["avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"]),
        "avx2vnni": ("avx2", ["avx_vnni"]),
        "neondot": ("neon", ["dot"]),
    }
    usable |= {target for target, (base, further) in needs.items() if base in usable and all(map(found.get, further))}
    return [target for target in targets() if target in usable]


def openmp_files() -> list[Path]:
    """GNU's OpenMP libraries that torch brings along."""
    package = Path(torch.__file__).parent
    return [*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")]


@cache
def _load_openmp() -> None:
    """Make the OpenMP library that torch has loaded known to what is loaded next. Raises OSError."""
    found = openmp_files()
    ctypes.CDLL(str(found[0]) if found else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)

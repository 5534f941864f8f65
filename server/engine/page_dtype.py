"""In which dtype the KV cache holds keys and values: the choice at start, and its carrying out.

Knows nothing of how attention is computed.
"""

from __future__ import annotations

import torch

from server.config import ServerConfig
from server.engine.attention import AttentionBackend
from server.engine.base_model import BaseModel, UnsupportedBase
from server.engine.device import DTYPES
from server.engine.kv_cache import KVCache
from server.engine.native_attention import NativeAttention
from server.engine.native_cross_attention import NativeCrossAttention


def choose_page_dtype(config: ServerConfig, base: BaseModel, backend: AttentionBackend) -> torch.dtype:
    """`auto`: the base's own dtype, exact; with quantised weights, whose tokens may differ already, float16.

    Another dtype than the base's is for the CPU kernels' attention, and for bases that have a cache. Raises
    UnsupportedBase.
    """
    native, name = isinstance(backend, NativeAttention), config.kv_cache_dtype
    if name == "auto":
        return torch.float16 if native and base.causal and config.quantize else base.dtype
    dtype = DTYPES[name]
    if dtype == base.dtype:
        return dtype
    if not base.causal:
        raise UnsupportedBase(f"kv_cache_dtype {name} is for bases with a KV cache: an encoder has none")
    if not native:
        own = str(base.dtype).removeprefix("torch.")
        raise UnsupportedBase(
            f"kv_cache_dtype {name} on a base in {own} needs the CPU kernels, pack_weights and a block_size of whole "
            "vectors (16 is one): elsewhere keys and values are held as the base is"
        )
    return dtype


def hold_pages(cache: KVCache, dtype: torch.dtype) -> None:
    """Forget all keys and values, and hold them in `dtype` from now on; a choice of `choose_page_dtype`."""
    for pages in (cache.backend, cache.cross):
        if pages is not None:
            assert isinstance(pages, NativeAttention | NativeCrossAttention)
            pages.hold_in(dtype)

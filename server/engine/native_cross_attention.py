"""CrossAttention by the compiled CPU kernels: over the sources' pages where they lie. Computed in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.kernels.library import Library
from server.engine.attention import Rule, Span
from server.engine.cross_attention import Look
from server.engine.native_attention import NativeAttention, NativeContext, native_context


@dataclass(frozen=True)
class NativeCrossContext:
    """Of one pass of decoders."""

    looks: NativeContext
    sources: NativeContext


class NativeCrossAttention:
    """A CrossAttention; block_size must be a multiple of the library's lanes."""

    def __init__(self, library: Library, num_blocks: int, block_size: int) -> None:
        self._pages = NativeAttention(library, num_blocks, block_size)

    @property
    def bytes_per_block(self) -> int:
        return self._pages.bytes_per_block

    def resize(self, num_blocks: int) -> None:
        self._pages.resize(num_blocks)

    def hold_in(self, dtype: torch.dtype) -> None:
        """As NativeAttention has it."""
        self._pages.hold_in(dtype)

    def clear(self, pages: Sequence[int]) -> None:
        """Nothing to do: nothing is read before it was written."""

    def context(self, looks: Sequence[Look], sources: Sequence[Span], device: torch.device) -> NativeCrossContext:
        del device
        seen = [Span(look.start, look.end, look.length - (look.end - look.start), look.pages) for look in looks]
        return NativeCrossContext(native_context(seen), native_context(sources))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule, context: NativeCrossContext) -> Tensor:  # noqa: PLR0913, PLR0917
        if len(context.sources.spans):
            self._pages.keep(layer, k, v, context.sources)
        return self._pages.look(layer, q, rule, context.looks)

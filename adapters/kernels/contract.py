"""The kernel contract: what every implementation of the LoRA term computes, on what.

Knows nothing of modules, requests or how adapters come to be in slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.batch import LoraBatch

POOL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In which A and B may be held; a term's own dtype, so that slots of different dtypes stand in one batch."""

TABLE_ENTRY = np.dtype([
    ("a", "u8"), ("b", "u8"), ("bias", "u8"), ("scaling", "f4"), ("rank", "i4"), ("dtype", "i4"), ("unused", "i4"),
    ("gain", "u8"), ("shift", "u8"),
])  # fmt: skip
"""One slot in LoraWeights.table: addresses (0: none), scaling, rank, place of the dtype in POOL_DTYPES.

native/lora.h has it as Term; triton_kernels.py reads its first words.
"""


@dataclass(frozen=True)
class LoraTerm:
    """What one adapter adds to one linear layer: y += scaling · (x Aᵀ) Bᵀ + bias.

    B is held rank-major, as Bᵀ, so that shrink and expand both stream rows. The scaling stays apart and is applied in
    fp32 to the shrunk rows: folded into a 16-bit B it would round B once more.
    """

    a: Tensor  # [rank, d_in], contiguous
    b: Tensor  # [rank, d_out], contiguous, the same dtype as `a`
    scaling: float
    bias: Tensor | None = None  # [d_out] fp32: the adapter's bias minus the base's
    gain: Tensor | None = None  # [d_out] fp32
    shift: Tensor | None = None  # [d_out] fp32
    """DoRA (dora.py): the layer's output becomes gain ⊙ output + shift. That concerns the base's product as well, so
    whatever computes that too does it, and `add_lora` does not; such a term has no bias."""


def _address(part: Tensor | None) -> int:
    return 0 if part is None else part.data_ptr()


class LoraWeights:
    """The terms of all slots for one linear layer. Changed by the engine's thread only, between steps."""

    def __init__(self, d_in: int, d_out: int, max_loras: int) -> None:
        self.d_in = d_in
        self.d_out = d_out
        self.terms: list[LoraTerm | None] = [None] * max_loras
        self.table = np.zeros(max_loras, TABLE_ENTRY)
        """The same as `terms`, for code outside Python."""
        self.version = 0
        """Grows with every change."""
        self.used: set[int] = set()
        """The slots that have a term."""
        self.rescaled: set[int] = set()
        """The slots whose terms have a gain."""

    def set(self, slot: int, term: LoraTerm | None) -> None:
        """Put `term` into `slot`, or nothing: then the layer is not adapted in that slot."""
        if term is None or not len(term.a):
            self.terms[slot] = None
            self.table[slot] = np.zeros((), TABLE_ENTRY)
            self.used.discard(slot)
            self.rescaled.discard(slot)
        else:
            self.terms[slot] = term
            self.used.add(slot)
            a, b, bias, gain, shift = map(_address, (term.a, term.b, term.bias, term.gain, term.shift))
            dtype = POOL_DTYPES.index(term.a.dtype)
            self.table[slot] = (a, b, bias, term.scaling, len(term.a), dtype, 0, gain, shift)
            (self.rescaled.discard if term.gain is None else self.rescaled.add)(slot)
        self.version += 1


AddLora = Callable[[Sequence[Tensor], Tensor, Sequence[LoraWeights], LoraBatch], None]
"""add_lora(ys, x, group, batch): in place, for each layer i of the group and every segment (slot s, tokens t),

    ys[i][t] += scaling · (x[t] · aᵀ) · b + bias        a, b, scaling, bias = group[i].terms[s]

x: [T, d_in], the input that the layers of the group share; ys[i]: [T, d_out of layer i]; rows contiguous, the distance
between rows free. Tokens in no segment, and layers that have no term in a segment's slot, are not touched. All
arithmetic in fp32 at least, whatever the dtypes. Engine's thread only.
"""

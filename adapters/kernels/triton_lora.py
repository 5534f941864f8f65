"""The LoRA term on CUDA, in Triton. Chosen where the device is CUDA; nobody else imports it, for it needs triton.

Knows the kernel contract and addresses; nothing of modules, requests or how adapters come to be in slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from adapters.batch import LoraBatch, Segment
from adapters.kernels.contract import POOL_DTYPES, TABLE_ENTRY, LoraWeights
from adapters.kernels.triton_kernels import expand_kernel, shrink_kernel

POOL_TYPES = dict(zip(POOL_DTYPES, (tl.float32, tl.float16, tl.bfloat16), strict=True))
ENTRY_WORDS = TABLE_ENTRY.itemsize // 8
LAYERS_A_LAUNCH = 3
"""q, k, v: how many outputs the expand kernel takes."""
SHORT, LONG = 16, 32
"""Tokens in a block, where no segment is longer than SHORT, and otherwise."""
EXPAND_RANKS, EXPAND_COLUMNS = 16, 128
PROGRAMS_WANTED = 512
"""About four for each processor of a large GPU; with fewer, d_in is split."""
COLUMNS_A_SPLIT = 256
"""So many columns of x at least are worth a program of their own."""
ALIGNMENT_BYTES = 16
"""What vector loads need; a term that lies less well is read element by element."""


class _Table:
    """A group's LoraWeights.table on the device: [layers, max_loras, ENTRY_WORDS] int64."""

    def __init__(self, group: Sequence[LoraWeights], device: torch.device) -> None:
        self.versions: list[int] = []
        self.words = torch.empty(len(group), len(group[0].table), ENTRY_WORDS, dtype=torch.int64, device=device)
        self.max_rank = 0
        self.alignment = ALIGNMENT_BYTES


@dataclass(frozen=True)
class _Blocks:
    """Blocks of tokens, one program each."""

    table: Tensor  # [n, 3] int32: slot, first token, token past the last one
    tokens: int
    """At most, in one block."""
    held: bool = False
    """Whether launches are for whatever `table` and the slots will hold later."""


class TritonLora:
    """add_lora (contract.AddLora) for one engine on one CUDA device: two launches a group of layers that share x.

        shrink: h[layer, split, t] = Σ over the split's columns of x[t] · aᵀ
        expand: y[layer][t] += (scaling · Σ over splits of h) · b + bias

    A and B in `dtype`; x and y in fp32, fp16 or bf16; h, scaling, bias and all sums in fp32. Products of 16-bit x and A
    of one type run on tensor cores, which is exact; all others in fp32, not tf32. No atomics: the same batch gives
    the same bits. Another batch may split d_in otherwise and differ in the last bits of h.

    Nothing in a call waits for the device: what the kernels read besides tensors is copied from pinned memory, in
    stream order; the table of a group after its weights' version grew, the blocks once a LoraBatch.

    What the caller guarantees: terms lie on the device, and stay where they are and alive until they are replaced by
    LoraWeights.set; terms are written, and all calls made, on one stream with `device` current; one thread.

    For CUDA graphs: calls inside `holding` read the caller's blocks and are launched for as many, and for terms of any
    rank; tables keep their addresses. `refresh` brings them up to date, which a replayed graph does not.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, max_rank: int) -> None:
        """A term of another dtype than `dtype`, or of a rank above `max_rank`, is refused by the call that meets it."""
        self.device = device
        self.dtype = dtype
        self.max_rank = max_rank
        self._pool = POOL_TYPES[dtype]
        self._block_r = 16 if max_rank <= 16 else 32
        self._tables: dict[tuple[LoraWeights, ...], _Table] = {}
        self._batch: LoraBatch | None = None
        self._memory = torch.empty(0, 3, dtype=torch.int32, device=device)
        self._blocks = _Blocks(self._memory, SHORT)
        self._refreshed = -1
        self._scratch = torch.empty(0, dtype=torch.float32, device=device)

    def __call__(self, ys: Sequence[Tensor], x: Tensor, group: Sequence[LoraWeights], batch: LoraBatch) -> None:
        """y[t] += scaling · (x[t] · aᵀ) · b + bias, see contract.AddLora.

        Raises ValueError for a term that is not of this engine's dtype, device or rank, or ys of several dtypes.
        """
        if not self._blocks.held and batch is not self._batch:
            self._load_blocks(batch)
        if not len(self._blocks.table):
            return
        for first in range(0, len(group), LAYERS_A_LAUNCH):
            some = slice(first, first + LAYERS_A_LAUNCH)
            table = self._table(tuple(group[some]))
            if self._blocks.held or table.max_rank:
                self._launch(ys[some], x, group[some], table)

    @contextmanager
    def holding(self, blocks: Tensor) -> Iterator[None]:
        """Meanwhile calls are for what `blocks`, [n, 3] int32, holds whenever they run, whatever LoraBatch they get.

        n: as `most_blocks` says; content: as `blocks_of` gives it.
        """
        before, self._blocks = self._blocks, _Blocks(blocks, SHORT, held=True)
        try:
            yield
        finally:
            self._blocks = before

    @staticmethod
    def most_blocks(num_tokens: int, max_loras: int) -> int:
        """How many blocks a batch of so many tokens may take, each adapter's tokens standing together."""
        return min(num_tokens, max_loras + num_tokens // SHORT)

    @staticmethod
    def blocks_of(batch: LoraBatch, count: int) -> list[tuple[int, int, int]]:
        """For `holding`: the batch's blocks, and empty ones up to `count`."""
        blocks = cut(batch.segments, SHORT)
        assert len(blocks) <= count
        return blocks + [(0, 0, 0)] * (count - len(blocks))

    def refresh(self) -> None:
        """What was launched inside `holding` and runs again finds every slot as it is now.

        Raises ValueError as calls do, and for a term that does not lie on a multiple of ALIGNMENT_BYTES.
        """
        version = sum(weights.version for group in self._tables for weights in group)  # each of them only grows
        if version == self._refreshed:
            return
        for group in self._tables:
            if self._table(group).alignment < ALIGNMENT_BYTES:
                raise ValueError(f"a graph's terms must lie on multiples of {ALIGNMENT_BYTES} bytes")
        self._refreshed = version

    def _launch(self, ys: Sequence[Tensor], x: Tensor, group: Sequence[LoraWeights], table: _Table) -> None:
        layers, max_loras, _ = table.words.shape
        d_in = group[0].d_in
        if len({y.dtype for y in ys}) > 1:
            raise ValueError(f"layers that share x must have outputs of one dtype, not {[y.dtype for y in ys]}")
        assert x.stride(1) == 1
        assert all(y.stride(1) == 1 for y in ys)
        blocks, held = self._blocks, self._blocks.held
        num_blocks = len(blocks.table)
        chunks = -(-(self.max_rank if held else table.max_rank) // self._block_r)
        ranks = chunks * self._block_r
        tensor_cores = self._tensor_cores(x.dtype)
        block_k = 128 if tensor_cores else 32  # fp32 operands of a product lie in registers whole
        splits, span = split(d_in, num_blocks * layers * chunks, block_k)
        elements = layers * splits * num_blocks * blocks.tokens * ranks
        scratch = self._new_scratch(elements) if held else self._room(elements)
        common = {
            "POOL": self._pool, "ENTRY_WORDS": ENTRY_WORDS, "BLOCK_T": blocks.tokens,
            "ALIGN": ALIGNMENT_BYTES if held else table.alignment,
        }  # fmt: skip
        shrink_kernel[(num_blocks * chunks * layers * splits,)](
            x, table.words, blocks.table, scratch, x.stride(0), d_in, span, ranks,
            max_loras, splits, num_blocks, chunks, layers,
            TENSOR_CORES=tensor_cores, BLOCK_R=self._block_r, BLOCK_K=block_k, **common,
        )  # fmt: skip
        absent = LAYERS_A_LAUNCH - layers
        d_outs = [weights.d_out for weights in group]
        tiles = sum(-(-d_out // EXPAND_COLUMNS) for d_out in d_outs)
        expand_kernel[(num_blocks * tiles,)](
            *ys, *[ys[0]] * absent, table.words, blocks.table, scratch, *[y.stride(0) for y in ys], *[0] * absent,
            *d_outs, *[0] * absent, ranks, max_loras, splits, num_blocks,
            BLOCK_R=EXPAND_RANKS, BLOCK_N=EXPAND_COLUMNS, **common,
        )  # fmt: skip

    def _tensor_cores(self, x_dtype: torch.dtype) -> bool:
        if triton.knobs.runtime.interpret and self.dtype == torch.bfloat16:
            return False  # the interpreter holds bf16 as integers and would multiply those
        return x_dtype == self.dtype and self.dtype != torch.float32

    def _table(self, group: tuple[LoraWeights, ...]) -> _Table:
        table = self._tables.get(group)
        if table is None:
            table = self._tables[group] = _Table(group, self.device)
        versions = [weights.version for weights in group]
        if table.versions != versions:
            for weights in group:
                self._check(weights)
            entries = np.stack([weights.table for weights in group])
            self._upload(entries.view(np.int64).reshape(table.words.shape), table.words)
            table.max_rank = int(entries["rank"].max())
            addresses = np.stack([entries["a"], entries["b"], entries["bias"]])
            table.alignment = ALIGNMENT_BYTES if not (addresses % ALIGNMENT_BYTES).any() else self.dtype.itemsize
            table.versions = versions
        return table

    def _check(self, weights: LoraWeights) -> None:
        for slot, term in enumerate(weights.terms):
            if term is None:
                continue
            if term.a.dtype != self.dtype or term.a.device.type != self.device.type or len(term.a) > self.max_rank:
                raise ValueError(
                    f"slot {slot} holds {term.a.dtype} of rank {len(term.a)} on {term.a.device}; "
                    f"this engine's kernels take {self.dtype} up to rank {self.max_rank} on {self.device}"
                )

    def _load_blocks(self, batch: LoraBatch) -> None:
        """Cut the batch's segments into blocks of tokens, and copy them to the device."""
        longest = max((end - start for _, start, end in batch.segments), default=0)
        tokens = SHORT if longest <= SHORT else LONG
        blocks = cut(batch.segments, tokens)
        if len(self._memory) < len(blocks):
            self._memory = torch.empty(len(blocks), 3, dtype=torch.int32, device=self.device)
        self._blocks = _Blocks(self._memory[: len(blocks)], tokens)
        self._upload(np.array(blocks, np.int32).reshape(-1, 3), self._blocks.table)
        self._batch = batch

    def _upload(self, host: NDArray[Any], to: Tensor) -> None:
        source = torch.from_numpy(host)
        if self.device.type == "cuda":
            source = source.pin_memory()  # torch keeps pinned memory until the copy out of it is done
        to.copy_(source, non_blocking=True)

    def _room(self, elements: int) -> Tensor:
        if len(self._scratch) < elements:
            self._scratch = self._new_scratch(elements)
        return self._scratch

    def _new_scratch(self, elements: int) -> Tensor:
        """A graph's own: what larger batches make room for would move."""
        return torch.empty(elements, dtype=torch.float32, device=self.device)


def cut(segments: Iterable[Segment], tokens: int) -> list[tuple[int, int, int]]:
    """(slot, first token, token past the last one) of blocks of at most so many tokens."""
    return [(slot, t, min(t + tokens, end)) for slot, start, end in segments for t in range(start, end, tokens)]


def split(d_in: int, programs: int, block_k: int) -> tuple[int, int]:
    """(splits, columns in each, a multiple of block_k) of a sum over d_in that `programs` programs would do unsplit."""
    wanted = min(PROGRAMS_WANTED // programs, d_in // COLUMNS_A_SPLIT)
    k_blocks = -(-d_in // block_k)
    span = -(-k_blocks // max(wanted, 1)) * block_k
    return -(-d_in // span), span

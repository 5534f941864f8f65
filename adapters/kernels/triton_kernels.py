"""The device code of the LoRA term in Triton: segmented shrink with split-K, and expand that adds in place.

Knows addresses and numbers only. How they are laid out and launched: triton_lora.py. Addresses of A, B and bias come
from the table as integers and become pointers in the kernel, so that terms may lie anywhere. Names assigned in both
branches of an `if` must have one type there, and parameters can be annotated with names of triton.language only.
"""
# ruff: noqa: PLR0913, PLR0915, PLR0917 — a kernel's arguments are all that it can know, and it cannot be cut in pieces
# that the interpreter would run in bearable time

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["max_loras", "splits", "num_blocks", "chunks", "num_layers"])
def shrink_kernel(
    x: tl.tensor,  # [T, d_in]
    table: tl.tensor,  # [layers, max_loras, ENTRY_WORDS] int64, the words of contract.TABLE_ENTRY
    blocks: tl.tensor,  # [num_blocks, 3] int32: slot, first token, token past the last one; the same: nothing to do
    scratch: tl.tensor,  # [layers, splits, num_blocks, BLOCK_T, ranks] fp32, out
    x_stride: tl.tensor,
    d_in: tl.tensor,
    span: tl.tensor,  # columns of x that one split sums, a multiple of BLOCK_K
    ranks: tl.tensor,
    max_loras: tl.tensor,
    splits: tl.tensor,
    num_blocks: tl.tensor,
    chunks: tl.tensor,
    num_layers: tl.tensor,
    POOL: tl.constexpr,
    ENTRY_WORDS: tl.constexpr,
    ALIGN: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """scratch[layer, split, block, i, r] = Σ over the split's columns k of x[t, k] · a[r, k], fp32, for t = first + i.

    One program a (block of tokens, layer, chunk of ranks, split); programs that read the same x stand together.
    """
    program = tl.program_id(0)
    split = program % splits
    layer = program // splits % num_layers
    r0 = program // (splits * num_layers) % chunks * BLOCK_R
    block = program // (splits * num_layers * chunks)
    slot = tl.load(blocks + block * 3)
    start = tl.load(blocks + block * 3 + 1)
    end = tl.load(blocks + block * 3 + 2)
    entry = table + (layer * max_loras + slot) * ENTRY_WORDS
    rank = (tl.load(entry + 3) >> 32).to(tl.int32)
    if (r0 < rank) & (start < end):
        a = tl.multiple_of(tl.load(entry).to(tl.pointer_type(POOL)), ALIGN)
        r = r0 + tl.arange(0, BLOCK_R)
        a_rows = a + r[:, None] * d_in
        out = scratch + ((layer * splits + split).to(tl.int64) * num_blocks + block) * BLOCK_T * ranks
        first = split * span
        last = tl.minimum(first + span, d_in)
        if end - start == 1:  # decode: a matrix product would multiply padding
            x_row = x + start.to(tl.int64) * x_stride
            products = tl.full([BLOCK_R, BLOCK_K], 0.0, tl.float32)
            for k0 in range(first, last, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                x_part = tl.load(x_row + k, mask=k < last, other=0.0)
                a_part = tl.load(a_rows + k[None, :], mask=(r < rank)[:, None] & (k < last)[None, :], other=0.0)
                products += a_part.to(tl.float32) * x_part.to(tl.float32)[None, :]
            tl.store(out + r, tl.sum(products, 1), mask=r < rank)
        else:
            i = tl.arange(0, BLOCK_T)
            t = start + i
            x_rows = x + t.to(tl.int64)[:, None] * x_stride
            shrunk = tl.full([BLOCK_T, BLOCK_R], 0.0, tl.float32)
            for k0 in range(first, last, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                x_part = tl.load(x_rows + k[None, :], mask=(t < end)[:, None] & (k < last)[None, :], other=0.0)
                a_part = tl.load(a_rows + k[None, :], mask=(r < rank)[:, None] & (k < last)[None, :], other=0.0)
                if TENSOR_CORES:  # both 16 bits wide, of one type: the products are exact, the sums fp32
                    shrunk = tl.dot(x_part, tl.trans(a_part), shrunk)
                else:
                    a_wide = tl.trans(a_part.to(tl.float32))
                    shrunk = tl.dot(x_part.to(tl.float32), a_wide, shrunk, input_precision="ieee")
            tl.store(out + i[:, None] * ranks + r[None, :], shrunk, mask=(t < end)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["max_loras", "splits", "num_blocks"])
def expand_kernel(
    y0: tl.tensor,  # [T, d_out0], in and out; as y1, y2
    y1: tl.tensor,
    y2: tl.tensor,
    table: tl.tensor,  # as in shrink_kernel
    blocks: tl.tensor,
    scratch: tl.tensor,
    y_stride0: tl.tensor,
    y_stride1: tl.tensor,
    y_stride2: tl.tensor,
    d_out0: tl.tensor,
    d_out1: tl.tensor,  # 0: no such layer, as d_out2
    d_out2: tl.tensor,
    ranks: tl.tensor,
    max_loras: tl.tensor,
    splits: tl.tensor,
    num_blocks: tl.tensor,
    POOL: tl.constexpr,
    ENTRY_WORDS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """y[t, n] += scaling · Σ over ranks r of (Σ over splits of scratch[…, r]) · b[r, n] + bias[n], fp32 but for y.

    One program a (block of tokens, BLOCK_N columns of one layer's y).
    """
    tiles0 = (d_out0 + BLOCK_N - 1) // BLOCK_N
    tiles1 = tiles0 + (d_out1 + BLOCK_N - 1) // BLOCK_N
    tiles = tiles1 + (d_out2 + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    layer = (tile >= tiles0).to(tl.int32) + (tile >= tiles1).to(tl.int32)
    y = tl.where(layer == 0, y0, tl.where(layer == 1, y1, y2))
    y_stride = tl.where(layer == 0, y_stride0, tl.where(layer == 1, y_stride1, y_stride2))
    d_out = tl.where(layer == 0, d_out0, tl.where(layer == 1, d_out1, d_out2))
    n0 = (tile - tl.where(layer == 0, 0, tl.where(layer == 1, tiles0, tiles1))) * BLOCK_N
    slot = tl.load(blocks + block * 3)
    start = tl.load(blocks + block * 3 + 1)
    end = tl.load(blocks + block * 3 + 2)
    entry = table + (layer * max_loras + slot) * ENTRY_WORDS
    numbers = tl.load(entry + 3)  # scaling in the low half, rank in the high one
    rank = (numbers >> 32).to(tl.int32)
    if (rank > 0) & (start < end):
        scaling = numbers.to(tl.int32).to(tl.float32, bitcast=True)
        b = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(POOL)), ALIGN)
        bias_address = tl.load(entry + 2)
        n = n0 + tl.arange(0, BLOCK_N)
        bias = tl.load(
            bias_address.to(tl.pointer_type(tl.float32)) + n, mask=(n < d_out) & (bias_address != 0), other=0.0
        )
        partial = scratch + ((layer * splits).to(tl.int64) * num_blocks + block) * BLOCK_T * ranks
        next_split = num_blocks.to(tl.int64) * BLOCK_T * ranks
        if end - start == 1:
            products = tl.full([BLOCK_R, BLOCK_N], 0.0, tl.float32)
            for r0 in range(0, rank, BLOCK_R):
                r = r0 + tl.arange(0, BLOCK_R)
                shrunk = tl.full([BLOCK_R], 0.0, tl.float32)
                for split in range(splits):
                    shrunk += tl.load(partial + split * next_split + r, mask=r < rank, other=0.0)
                b_mask = (r < rank)[:, None] & (n < d_out)[None, :]
                b_part = tl.load(b + r[:, None] * d_out + n[None, :], mask=b_mask, other=0.0)
                products += (shrunk * scaling)[:, None] * b_part.to(tl.float32)
            y_row = y + start.to(tl.int64) * y_stride + n
            sums = tl.load(y_row, mask=n < d_out, other=0.0).to(tl.float32) + (tl.sum(products, 0) + bias)
            tl.store(y_row, sums.to(y0.dtype.element_ty), mask=n < d_out)
        else:
            i = tl.arange(0, BLOCK_T)
            t = start + i
            delta = tl.full([BLOCK_T, BLOCK_N], 0.0, tl.float32)
            for r0 in range(0, rank, BLOCK_R):
                r = r0 + tl.arange(0, BLOCK_R)
                h_mask = (t < end)[:, None] & (r < rank)[None, :]
                h_rows = partial + i[:, None] * ranks + r[None, :]
                h = tl.full([BLOCK_T, BLOCK_R], 0.0, tl.float32)
                for split in range(splits):
                    h += tl.load(h_rows + split * next_split, mask=h_mask, other=0.0)
                b_mask = (r < rank)[:, None] & (n < d_out)[None, :]
                b_part = tl.load(b + r[:, None] * d_out + n[None, :], mask=b_mask, other=0.0)
                delta = tl.dot(h * scaling, b_part.to(tl.float32), delta, input_precision="ieee")
            y_rows = y + t.to(tl.int64)[:, None] * y_stride + n[None, :]
            y_mask = (t < end)[:, None] & (n < d_out)[None, :]
            tile_sums = tl.load(y_rows, mask=y_mask, other=0.0).to(tl.float32) + (delta + bias[None, :])
            tl.store(y_rows, tile_sums.to(y0.dtype.element_ty), mask=y_mask)

"""The device code of attention over pages in Triton: one pass, a running softmax (FlashAttention, arXiv:2205.14135).

Knows addresses and numbers only. How they are laid out and launched: triton_attention.py.
"""
# ruff: noqa: C901, PLR0912, PLR0913, PLR0915, PLR0917 — arguments are all that a kernel can know, and most branches are
# decided when it is compiled
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_kernel(
    q: tl.tensor,  # [T, heads, D]
    keys: tl.tensor,  # PAGED: [num_blocks, BLOCK_SIZE, kv_heads, D], else [T, kv_heads, D]
    values: tl.tensor,  # as keys, of width V_D
    out: tl.tensor,  # [T, heads, V_D]
    tiles: tl.tensor,  # [n, 5] int32, see triton_attention.Tiles
    pages: tl.tensor,  # int32
    q_row: tl.tensor,  # strides: between tokens, heads and pages
    q_head: tl.tensor,
    k_page: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_page: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,  # heads that share a key
    D: tl.constexpr,
    V_D: tl.constexpr,
    PAGED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,  # 0: none
    TENSOR_CORES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """out[t, h] = Σ over seen positions n of softmax(cap(q[t, h] · keys[n] · scale)) · values[n]; sums in fp32.

    One program a (tile of one sequence's tokens, kv head): row r stands for token r // GROUP, head r % GROUP.
    """
    entry = tiles + tl.program_id(0) * 5
    kv_head = tl.program_id(1)
    first = tl.load(entry)
    count = tl.load(entry + 1)
    position = tl.load(entry + 2)
    length = tl.load(entry + 3)
    origin = tl.load(entry + 4)

    r = tl.arange(0, BLOCK_M)
    token = r // GROUP
    head = kv_head * GROUP + r % GROUP
    live = token < count
    row = (first + token).to(tl.int64)
    at = position + token
    d = tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_V)
    q_at = row * q_row + head * q_head
    q_part = tl.load(q + q_at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)

    start = 0
    end = length
    if CAUSAL:
        end = tl.minimum(length, position + count)
    if WINDOW > 0:
        start = tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        if not CAUSAL:
            end = tl.minimum(length, position + count - 1 + WINDOW)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    summed = tl.full([BLOCK_M, BLOCK_V], 0.0, tl.float32)
    for n0 in range(start, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = n < end
        if PAGED:
            page = tl.load(pages + origin + n // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            offset = n % BLOCK_SIZE
            k_at = page * k_page + offset * k_row + kv_head * k_head
            v_at = page * v_page + offset * v_row + kv_head * v_head
        else:
            k_at = (origin + n).to(tl.int64) * k_row + kv_head * k_head
            v_at = (origin + n).to(tl.int64) * v_row + kv_head * v_head
        k_part = tl.load(keys + k_at[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        v_part = tl.load(values + v_at[:, None] + d_v[None, :], mask=inside[:, None] & (d_v < V_D)[None, :], other=0.0)
        if TENSOR_CORES:
            scores = tl.dot(q_part, k_part) * scale
        else:
            scores = tl.dot(q_part.to(tl.float32), k_part.to(tl.float32), input_precision="ieee") * scale
        if SOFTCAP > 0:
            scores = SOFTCAP * (2 * tl.sigmoid(2 * scores / SOFTCAP) - 1)  # tanh
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] <= at[:, None])
        if WINDOW > 0:
            seen = seen & (n[None, :] > at[:, None] - WINDOW)
            if not CAUSAL:
                seen = seen & (n[None, :] < at[:, None] + WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        against = tl.where(higher == float("-inf"), 0.0, higher)  # a row may have seen nothing yet
        weights = tl.exp(scores - against[:, None])
        shrink = tl.exp(top - against)
        total = total * shrink + tl.sum(weights, 1)
        if TENSOR_CORES:
            part = tl.dot(weights.to(v_part.dtype), v_part)
        else:
            part = tl.dot(weights, v_part.to(tl.float32), input_precision="ieee")
        summed = summed * shrink[:, None] + part
        top = higher

    total = tl.where(live, total, 1.0)  # a row that stands for no token may have seen nothing
    result = (summed / total[:, None]).to(out.dtype.element_ty)
    out_at = row * out_row + head * out_head
    tl.store(out + out_at[:, None] + d_v[None, :], result, mask=live[:, None] & (d_v < V_D)[None, :])

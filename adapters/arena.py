"""Arena: all of one adapter's numbers in one buffer: LoRA factors as the kernels read them, biases and head in fp32,
whole embeddings and language-model heads as the base computes.

Knows nothing of files or slots. Made once, by the thread that loads the checkpoint; on the CPU a slot then only points
here, and on a GPU it is filled by one copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.adapter import Head, LoraPair, OwnTokens, TokenRows
from adapters.errors import InvalidAdapter
from adapters.memory import ALIGNMENT, LargePages
from adapters.values import widened

BYTE = torch.uint8
POOL_DTYPES: Mapping[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""`auto`: 16 bits where nothing is lost (as saved, or fp32 that fits), else fp32. The others convert, and may round."""


@dataclass(frozen=True)
class Rest:
    """What an adapter has beside LoRA; as in Adapter."""

    head: Head | None = None
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: OwnTokens | None = None


NOTHING = Rest()


@dataclass(frozen=True)
class Arena:
    """The numbers of one adapter."""

    memory: Tensor  # uint8
    pairs: Mapping[str, LoraPair]
    """As given, but in `memory`: a [rank, d_in] and bᵀ [rank, d_out] contiguous, of one dtype; vectors fp32."""
    head: Head | None
    """As given, but in `memory`, fp32."""
    biases: Mapping[str, Tensor]
    """As `head`."""
    tokens: OwnTokens | None = None
    """As given, but in `memory`, in `matrix_dtype`; a bias in fp32."""


def build_arena(
    pairs: Mapping[str, LoraPair],
    pool_dtype: torch.dtype | None = None,
    rest: Rest = NOTHING,
    pinned: bool = False,
    matrix_dtype: torch.dtype = torch.float32,
) -> Arena:
    """Copy all of an adapter into one buffer; factors in `pool_dtype`, or None: as POOL_DTYPES says of `auto`.

    matrix_dtype: of whole embeddings and language-model heads, and of their rows.

    pinned: as `empty_arena` has it. Any thread: numpy copies, no torch operation that would enter the thread pool.
    Raises InvalidAdapter for numbers that the dtype cannot hold.
    """
    dtypes = {name: pool_dtype or _smallest(pair) for name, pair in pairs.items()}
    head, tokens = rest.head, rest.tokens
    vectors = [] if head is None else [head.weight, head.bias, *head.inner.values()]
    vectors += rest.biases.values()
    sources = [
        *((part, dtype) for name, pair in pairs.items() for part, dtype in _parts(pair, dtypes[name])),
        *((part, torch.float32) for part in vectors),
        *((part, matrix_dtype) for part in _matrices(tokens)),
        *((part, torch.float32) for part in _token_biases(tokens)),
    ]
    size = sum(_aligned(part.numel() * dtype.itemsize) for part, dtype in sources if part is not None)
    memory = empty_arena(size, pinned)
    placed = _place(memory, sources)
    held = {
        name: LoraPair(next(placed), next(placed).T, pair.scaling, next(placed), next(placed), next(placed))
        for name, pair in pairs.items()
    }
    if head is not None:
        head = Head(next(placed), next(placed), {name: next(placed) for name in head.inner})
    own_biases = {name: next(placed) for name in rest.biases}
    return Arena(memory, held, head, own_biases, None if tokens is None else _held_tokens(tokens, placed))


def empty_arena(size: int, pinned: bool) -> Tensor:
    """[size] uint8, aligned for every number, of undefined content. Any thread.

    pinned: it is page-locked, so that a GPU reads it by itself while the host goes on; torch rounds its size up to a
    power of two, and keeps it until copies under way have ended.
    """
    return torch.empty(size, dtype=BYTE, pin_memory=True) if pinned else LargePages(size).empty(size, BYTE)


def _matrices(tokens: OwnTokens | None) -> list[Tensor]:
    """What an adapter has of embeddings and language-model heads, each once: tied ones are one."""
    if tokens is None:
        return []
    rows = [each.rows for each in (tokens.embedding_rows, tokens.output_rows) if each is not None]
    wholes = [whole for whole in (tokens.embedding, tokens.output) if whole is not None]
    return [*{id(part): part for part in (*wholes, *rows)}.values()]


def _token_biases(tokens: OwnTokens | None) -> list[Tensor]:
    return [] if tokens is None or tokens.output_bias is None else [tokens.output_bias]


def _held_tokens(tokens: OwnTokens, placed: Iterator[Any]) -> OwnTokens:
    """`tokens`, its numbers taken from `placed`."""
    held = {id(part): next(placed) for part in _matrices(tokens)}

    def rows(given: TokenRows | None) -> TokenRows | None:
        return None if given is None else TokenRows(given.ids, held[id(given.rows)])

    return OwnTokens(
        None if tokens.embedding is None else held[id(tokens.embedding)],
        rows(tokens.embedding_rows),
        None if tokens.output is None else held[id(tokens.output)],
        None if tokens.output_bias is None else next(placed),
        rows(tokens.output_rows),
    )


def _parts(pair: LoraPair, dtype: torch.dtype) -> list[tuple[Tensor | None, torch.dtype]]:
    """What lies in the arena of a pair, in the order of its fields."""
    vectors = (pair.bias, pair.b_bias, pair.magnitude)
    return [(pair.a, dtype), (pair.b.T, dtype), *((vector, torch.float32) for vector in vectors)]


def _place(memory: Tensor, sources: Sequence[tuple[Tensor | None, torch.dtype]]) -> Iterator[Any]:
    """Copy each source to its place, one after another; yields the copy, or None where there is no source.

    An adapter has hundreds of them, so that operations on tensors cost more than the copies: there is one for each.
    """
    flat = {dtype: memory.view(dtype) for _, dtype in sources}
    bits = {dtype: numbers.view(_bits(dtype)).numpy() for dtype, numbers in flat.items()}
    offset = 0
    for source, dtype in sources:
        if source is None:
            yield None
            continue
        numbers, start, count = flat[dtype], offset // dtype.itemsize, source.numel()
        _copy(bits[dtype][start : start + count].reshape(source.shape), dtype, source)
        offset += _aligned(count * dtype.itemsize)
        yield numbers.as_strided(source.shape, row_strides(source.shape), numbers.storage_offset() + start)


def _bits(dtype: torch.dtype) -> torch.dtype:
    return torch.int16 if dtype.itemsize == 2 else torch.int32


def row_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of contiguous rows."""
    return (shape[1], 1) if len(shape) == 2 else (1,)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _smallest(pair: LoraPair) -> torch.dtype:
    """The narrowest dtype that holds both factors exactly."""
    dtypes = {pair.a.dtype, pair.b.dtype}
    if len(dtypes) == 1 and dtypes != {torch.float32}:
        return pair.a.dtype
    parts = [widened(pair.a), widened(pair.b)]
    for dtype in (torch.float16, torch.bfloat16):
        if all(_fits(part, dtype) for part in parts):
            return dtype
    return torch.float32


def _fits(values: NDArray[np.float32], dtype: torch.dtype) -> bool:
    if dtype is torch.bfloat16:
        return not bool((values.view(np.uint32) & 0xFFFF).any())
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))


def _copy(target: NDArray[Any], dtype: torch.dtype, source: Tensor) -> None:
    """To `target`, the bits of numbers of `dtype`. Raises InvalidAdapter for numbers that this cannot hold."""
    if dtype is source.dtype:
        np.copyto(target, source.detach().view(_bits(dtype)).numpy())
        return
    values = widened(source)
    if values.size and float(np.abs(values).max()) > torch.finfo(dtype).max:
        raise InvalidAdapter([f"it has numbers beyond {dtype}, in which adapters are held (lora_dtype)"])
    if dtype is torch.bfloat16:
        np.copyto(target.view(np.uint16), _rounded_bfloat16(values))
    else:
        np.copyto(target.view(np.float16 if dtype is torch.float16 else np.float32), values, casting="same_kind")


def _rounded_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To the nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

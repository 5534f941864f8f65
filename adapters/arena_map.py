"""Where each number of an adapter lies in its arena, as text: with it the bytes of an arena are the adapter again.

Knows nothing of files. What it reads, the same process has written: damage is for the caller to find before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterInfo, Head, LoraPair, OwnTokens, TokenRows
from adapters.arena import row_strides
from adapters.config import LoraConfig

NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
Place = list[Any]
"""Name of the dtype, where it begins in the memory (counted in numbers), shape."""


def can_be_mapped(adapter: Adapter) -> bool:
    """Whether the numbers in its arena stay as the checkpoint has them: on the CPU DoRA's magnitudes do not."""
    return adapter.memory is not None and all(pair.magnitude is None for pair in adapter.pairs.values())


def map_arena(adapter: Adapter) -> bytes:
    """JSON with everything of `adapter` but its info and the bytes of its arena. It must be one that can be mapped."""
    assert adapter.memory is not None
    start, size = adapter.memory.data_ptr(), len(adapter.memory)

    def place(part: Tensor | None) -> Place | None:
        if part is None:
            return None
        offset = part.data_ptr() - start if part.numel() else 0
        assert part.is_contiguous()
        assert 0 <= offset <= size - part.nbytes, "it lies elsewhere"
        return [NAMES[part.dtype], offset // part.itemsize, *part.shape]

    head, tokens = adapter.head, adapter.tokens
    told = {
        "config": asdict(adapter.config),
        "pairs": {
            name: [place(pair.a), place(pair.b.T), pair.scaling, place(pair.bias), place(pair.b_bias)]
            for name, pair in adapter.pairs.items()
        },
        "head": None if head is None else [place(head.weight), place(head.bias), _each(place, head.inner)],
        "biases": _each(place, adapter.biases),
        "tokens": None if tokens is None else _told_tokens(tokens, place),
        "coverage": dict(adapter.coverage),
    }
    return json.dumps(told).encode()


def read_map(text: bytes, memory: Tensor, info: AdapterInfo) -> Adapter:
    """The adapter that `map_arena` told, in `memory` (uint8), whose bytes are those of its arena. Any thread."""
    told = json.loads(text)
    views = _Views(memory)
    head, tokens = told["head"], told["tokens"]
    return Adapter(
        info=info,
        config=LoraConfig(**{name: _tuples(value) for name, value in told["config"].items()}),
        pairs={
            name: LoraPair(views.one(a), views.one(b).T, scaling, views.optional(bias), views.optional(b_bias))
            for name, (a, b, scaling, bias, b_bias) in told["pairs"].items()
        },
        head=head and Head(views.one(head[0]), views.optional(head[1]), _each(views.one, head[2])),
        biases=_each(views.one, told["biases"]),
        tokens=tokens and _tokens(tokens, views),
        coverage=told["coverage"],
        memory=memory,
    )


@dataclass
class _Views:
    """Tensors in `memory`. An adapter has hundreds: there is one operation on tensors for each."""

    memory: Tensor

    def __post_init__(self) -> None:
        self._flat = {name: self.memory.view(dtype) for name, dtype in DTYPES.items()}
        self._offsets = {name: flat.storage_offset() for name, flat in self._flat.items()}

    def one(self, place: Place) -> Tensor:
        name, start, *shape = place
        return self._flat[name].as_strided(shape, row_strides(shape), self._offsets[name] + start)

    def optional(self, place: Place | None) -> Tensor | None:
        return None if place is None else self.one(place)


def _told_tokens(tokens: OwnTokens, place: Callable[[Tensor | None], Place | None]) -> dict[str, Any]:
    def rows(given: TokenRows | None) -> list[Any] | None:
        return None if given is None else [given.ids, place(given.rows)]

    return {
        "embedding": place(tokens.embedding),
        "embedding_rows": rows(tokens.embedding_rows),
        "output": place(tokens.output),
        "output_bias": place(tokens.output_bias),
        "output_rows": rows(tokens.output_rows),
    }


def _tokens(told: Mapping[str, Any], views: _Views) -> OwnTokens:
    """Tied matrices are one object again."""
    made: dict[str, Tensor] = {}

    def one(place: Place | None) -> Tensor | None:
        return None if place is None else made.setdefault(json.dumps(place), views.one(place))

    def rows(given: list[Any] | None) -> TokenRows | None:
        if given is None:
            return None
        found = one(given[1])
        assert found is not None
        return TokenRows(tuple(given[0]), found)

    return OwnTokens(
        one(told["embedding"]), rows(told["embedding_rows"]), one(told["output"]), one(told["output_bias"]),
        rows(told["output_rows"]),
    )  # fmt: skip


def _each(of: Callable[[Any], Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: of(part) for name, part in parts.items()}


def _tuples(value: Any) -> Any:
    """JSON has lists where a LoraConfig has tuples."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return _each(_tuples, value) if isinstance(value, dict) else value

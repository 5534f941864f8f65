"""DecodeGraphs: decode steps as CUDA graphs, captured once for a few numbers of rows and replayed for any batch.

A replay repeats what was launched with the addresses, shapes and numbers that it was launched with. So whatever differs
from step to step lies in tensors that stay where they are, rows beyond the batch are padding that nobody reads, and a
step for which that is not enough runs eagerly: `why_eager` decides. Knows nothing of scheduling or sampling.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from adapters.batch import NO_SLOT, LoraBatch, LoraScope
from adapters.slots import LoraSlots
from server.engine.attention import Span
from server.engine.base_model import BaseModel, UnsupportedBase
from server.engine.device import ALIGNMENT_BYTES
from server.engine.kv_cache import KVCache
from server.engine.request import Batch

if TYPE_CHECKING:  # they need triton
    from adapters.kernels.triton_lora import TritonLora
    from server.engine.triton_attention import TritonAttention

GRAPH, PROMPT, TASK = "graph", "prompt", "task"
WARM_UPS = 2
"""Steps before a capture: in the first one Triton compiles, cuBLAS chooses, and the KV cache's pages are made."""
INT32, INT64 = torch.int32, torch.int64
T = TypeVar("T")


class Capture(Protocol):
    """How work on the device is captured. Engine's thread only."""

    def __call__(self, step: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """Run `step` until it is warm; then what repeats its launches, and its result, which each of those writes anew.

        Raises RuntimeError where that cannot be captured.
        """
        ...


class CudaCapture:
    """By torch.cuda.CUDAGraph: one stream, and one pool of memory, for all graphs. Runs only with a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], T]) -> tuple[Callable[[], object], T]:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                step()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may pin memory for adapters meanwhile, which a capture forbids to all threads by default.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = step()
        return graph.replay, result


class Inputs:
    """What a captured step reads of its batch: views of one buffer on the device."""

    def __init__(self, fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        """fields: name -> shape and dtype; of the last one `write` may be given a part."""
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in fields.values()]
        ends = [*itertools.accumulate(-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in sizes)]
        self._starts = dict(zip(fields, [0, *ends], strict=False))
        self._memory = torch.zeros(ends[-1], dtype=torch.uint8, device=device)
        self.views: dict[str, Tensor] = {}
        for (name, (shape, dtype)), size in zip(fields.items(), sizes, strict=True):
            start = self._starts[name]
            self.views[name] = self._memory[start : start + size].view(dtype).view(shape)

    def write(self, values: Mapping[str, ArrayLike]) -> None:
        """A value for each field, by one copy that nothing waits for."""
        arrays = {name: np.asarray(values[name], _numpy_dtype(view)) for name, view in self.views.items()}
        last = next(reversed(arrays))
        assert all(arrays[name].size == view.numel() for name, view in self.views.items() if name != last)
        assert arrays[last].size <= self.views[last].numel()
        end = self._starts[last] + arrays[last].nbytes
        host = torch.empty(end, dtype=torch.uint8, pin_memory=self._memory.device.type == "cuda")
        content = host.numpy()
        for name, array in arrays.items():
            start = self._starts[name]
            content[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._memory[:end].copy_(host, non_blocking=True)  # torch keeps pinned memory until the copy has ended


@dataclass(frozen=True)
class Graph:
    """One captured step."""

    replay: Callable[[], object]
    hidden: Tensor  # [size, hidden_size]
    logits: Tensor  # [size, vocabulary] fp32


class DecodeGraphs:
    """Steps in which each of at most so many sequences gets one token, with adapters or without. Engine's thread only.

    Captured when it is made, on a stream of its own: no slot may hold an adapter then, and the KV cache must have its
    final size, with a page that no sequence has, for padding. A batch runs in the smallest graph that holds it.
    """

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        base: BaseModel,
        slots: LoraSlots,
        scope: LoraScope,
        cache: KVCache,
        lora: TritonLora,
        attention: TritonAttention,
        sizes: Sequence[int],
        capture: Capture,
    ) -> None:
        """attention: the cache's; its last page is the padding's. Raises RuntimeError for a base that cannot be
        captured."""
        assert not any(weights.used for weights in slots.weights.values())
        self.steps: Counter[str] = Counter()
        """How many ran as a graph, and how many did not, by why_eager's reasons."""
        self._base = base
        self._slots = slots
        self._scope = scope
        self._cache = cache
        self._lora = lora
        self._attention = attention
        self._sizes = tuple(sizes)
        self._inputs: dict[int, Inputs] = {}
        self._graphs: dict[tuple[int, bool], Graph] = {}
        """By the number of rows, and whether there are adapters."""
        for size in reversed(self._sizes):  # the smaller ones find their memory in the pool
            self._capture(size, capture)

    @torch.inference_mode()
    def _capture(self, size: int, capture: Capture) -> None:
        num_pages = self._attention.pages.num_blocks + size
        inputs = self._inputs[size] = Inputs(
            {
                "ids": ((1, size), INT64), "positions": ((1, size), INT64), "rows": ((size,), INT64),
                "slots": ((size,), INT64), "tiles": ((size, 5), INT32),
                "blocks": ((self._num_blocks(size), 3), INT32), "pages": ((num_pages,), INT32),
            },
            self._base.device,
        )  # fmt: skip
        inputs.write(self._values(Batch(()), (), size))
        for adapted in (True, False):
            lora = LoraBatch.of_slots([0 if adapted else NO_SLOT] * size)
            replay, (hidden, logits) = capture(partial(self._step, inputs.views, lora))
            self._graphs[size, adapted] = Graph(replay, hidden, logits)

    def _step(self, inputs: Mapping[str, Tensor], lora: LoraBatch) -> tuple[Tensor, Tensor]:
        context = self._attention.decode_context(inputs["tiles"], inputs["pages"], inputs["slots"])
        with self._lora.holding(inputs["blocks"]), self._scope.use(lora), self._cache.enter(context):
            hidden, logits = self._base.forward(inputs["ids"], inputs["positions"], inputs["rows"])
        assert logits is not None
        return hidden, logits

    @property
    def max_rows(self) -> int:
        """Of the largest graph."""
        return self._sizes[-1]

    @property
    def num_pages(self) -> int:
        """That sequences may have."""
        return self._attention.pages.num_blocks - 1

    def why_eager(self, batch: Batch) -> str | None:
        """Why no graph can run this step; None: one can.

        Prompts have any number of tokens, other tasks than generation no pages. What an adapter has beside terms on
        linear layers (LoraSlots.beside) is computed adapter by adapter, and who has any is known to the host alone.
        """
        for item in batch.items:
            if not item.sequence.generates:
                return TASK
            if item.count != 1 or not item.completes:
                return PROMPT
            if item.slot != NO_SLOT and self._slots.beside[item.slot]:
                return self._slots.beside[item.slot]
        return None

    def run(self, batch: Batch, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Hidden states [n, hidden_size] and logits [n, vocabulary] in fp32 of n sequences' tokens, valid until the
        next call. For steps of which `why_eager` says nothing."""
        n = len(batch.items)
        size = next(size for size in self._sizes if size >= n)
        self._inputs[size].write(self._values(batch, spans, size))
        self._lora.refresh()
        graph = self._graphs[size, any(item.slot != NO_SLOT for item in batch.items)]
        graph.replay()
        return graph.hidden[:n], graph.logits[:n]

    def _values(self, batch: Batch, spans: Sequence[Span], size: int) -> dict[str, ArrayLike]:
        """Of `Inputs`: the batch's rows, then padding: token 0 at the first position, alone on the spare page."""
        n = len(batch.items)
        padding = [Span(row, row + 1, 0, [self.num_pages]) for row in range(n, size)]
        ids, positions = [0] * size, [self._base.positions.first] * size
        for row, item in enumerate(batch.items):
            tokens, end = item.sequence.tokens, item.start + 1
            (ids[row],) = tokens(item.start, end)
            (positions[row],) = self._base.positions.of(tokens, item.start, end)
        lora = LoraBatch.of_slots([item.slot for item in batch.items])
        blocks = self._lora.blocks_of(lora, self._num_blocks(size))
        return {
            "ids": ids, "positions": positions, "rows": range(size), "blocks": blocks,
            **self._attention.decode_tables([*spans, *padding]),
        }  # fmt: skip

    def _num_blocks(self, size: int) -> int:
        return self._lora.most_blocks(size, self._slots.max_loras)


def choose_capture(base: BaseModel) -> Capture:
    """How decode steps of `base` are captured. Raises UnsupportedBase."""
    if base.device.type != "cuda":
        raise UnsupportedBase("cuda_graphs needs an NVIDIA GPU")
    if not base.causal or base.stacks is not None:
        raise UnsupportedBase("cuda_graphs captures steps of a decoder, and this base is none, or an encoder too")
    return CudaCapture(base.device)


def sizes_up_to(most: int) -> list[int]:
    """1, 2, 4, 8, … and `most`: padding at most doubles a step's rows, and all graphs' results are few."""
    return [*itertools.takewhile(lambda size: size < most, (1 << i for i in itertools.count())), most]


def _numpy_dtype(tensor: Tensor) -> type[np.integer]:
    return np.int32 if tensor.dtype == INT32 else np.int64

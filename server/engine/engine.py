"""Engine: one base model, its adapters and the sequences that run on them, a step at a time.

Knows nothing of threads, text or HTTP. Everything here belongs to the engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from adapters.adapter import ExamineTokenizer, Limits
from adapters.arena import POOL_DTYPES
from adapters.batch import LoraScope
from adapters.catalog import reader
from adapters.host_tier import HostLimits
from adapters.kernels import KernelNotAvailable, NativeLora, choose_kernel, load_library
from adapters.layers import Computing, pack_model, patch_model
from adapters.memory import leave_files
from adapters.registry import AdapterRegistry
from adapters.slots import LoraSlots, StreamUploads
from adapters.token_layers import output_of, pack_tokens, patch_tokens
from server.config import ServerConfig
from server.engine.attention import AttentionBackend
from server.engine.base_model import BaseModel, UnsupportedBase
from server.engine.block_manager import BlockManager
from server.engine.cross_attention import CrossAttention, TorchCrossAttention
from server.engine.decode_graphs import Capture, DecodeGraphs, choose_capture, sizes_up_to
from server.engine.decoder_stack import chain
from server.engine.device import choose_lora_dtype
from server.engine.fused import restore
from server.engine.fusing import fuse
from server.engine.kv_cache import KVCache
from server.engine.model_runner import ModelRunner
from server.engine.native_attention import NativeAttention
from server.engine.native_cross_attention import NativeCrossAttention
from server.engine.page_dtype import choose_page_dtype, hold_pages
from server.engine.request import Batch, RequestOutput, Sequence, SequenceStatus, StepRecord
from server.engine.scheduler import Scheduler
from server.engine.self_test import (
    Probe,
    check_base,
    check_graphs,
    check_kernel,
    check_pooler,
    make_probe,
    open_cache,
    probe_blocks,
    rounding_error,
)
from server.engine.task_heads import find_task_heads, with_heads
from server.engine.token_check import with_used_token_layers
from server.engine.torch_attention import TorchAttention
from server.engine.two_stacks import TwoStacks

RECORDED_STEPS = 256

logger = logging.getLogger(__name__)


class Engine:
    """Patches `base`, tests itself on it, and runs sequences. Raises UnsupportedBase when the test fails."""

    def __init__(
        self, config: ServerConfig, base: BaseModel, base_name: str, examine: ExamineTokenizer | None = None
    ) -> None:
        """examine: what judges tokenizers that adapters bring; None: each is taken for another than the base's."""
        capture = choose_capture(base) if config.cuda_graphs else None
        probe = make_probe(base)
        base.layout = with_used_token_layers(base)
        scope = LoraScope()
        self.base = base
        self.limits = replace(adapter_limits(config, base.device, base.dtype), examine_tokenizer=examine)
        uploads = StreamUploads(base.device) if base.device.type == "cuda" else None
        self.slots = LoraSlots(base.body, base.layout, config.max_loras, uploads, output_of(base.model, base.layout))
        computing = _computing(config, base, self.limits)
        biased = base.stacks is not None and bool(base.stacks.biases)
        backend = _attention(config, computing, base.device, biased)
        self.page_dtype = choose_page_dtype(config, base, backend)
        """Of keys and values in the KV cache."""
        cross = None if base.stacks is None else _cross_attention(config, backend, computing)
        self.cache = KVCache(backend, base.causal, base.stacks, cross)
        memory = LoraScope()
        elsewhere = dict.fromkeys(_reading(base), memory)
        patch_model(base.body, self.slots, scope, Computing(computing.add_lora), probe.groups, elsewhere)
        self._tokens = patch_tokens(base.model, base.body, self.slots, scope, computing)
        base.prepare_for_rows()
        self.runner = ModelRunner(base, self.slots, scope, self.cache, config.block_size, computing.library)
        if base.stacks is not None:
            self.runner.two_stacks = TwoStacks(base, scope, memory, self.cache)
        self._choose_forward(probe)
        self._fuse(computing, probe)
        self._find_heads(check_pooler(self.runner, probe))
        self._pack(computing, probe)
        self._round(computing, probe)
        blocks = BlockManager(self._size_cache(config, spare=capture is not None), config.block_size)
        if base.causal:
            open_cache(self.runner, probe)
        self.max_model_len = self._longest(config, blocks)
        if capture is not None:
            self.runner.graphs = self._capture(capture, config, computing, probe)
        host = HostLimits(config.max_cpu_loras, config.max_cpu_lora_bytes, config.max_concurrent_loads)
        self.registry = AdapterRegistry(self.slots, host, (base_name,), reader(base.layout, self.limits))
        self.scheduler = Scheduler(
            blocks, self.registry, config.max_num_seqs, config.max_num_batched_tokens, config.fairness_tokens
        )
        self.idle = True
        """Whether the last step found nothing to run."""
        self.steps: deque[StepRecord] = deque(maxlen=RECORDED_STEPS)
        self.observe_step: Callable[[float], object] = lambda _: None
        """Called after each step with the number of its tokens."""

    def _choose_forward(self, probe: Probe) -> None:
        """Packed, where the base passes its test so; an encoder that does not is padded. Raises UnsupportedBase."""
        model, padded = self.base.model, "eager"
        model.set_attn_implementation(self.cache.name)  # type: ignore[operator]
        try:
            check_base(self.runner, probe)
        except UnsupportedBase as error:
            if self.base.causal:
                raise
            model.set_attn_implementation(padded)  # type: ignore[operator]
            self.runner.padded = True
            check_base(self.runner, probe)
            logger.warning("sequences are padded, with a pass for each adapter, which is slower: %s", error)

    def _find_heads(self, has_pooler: bool) -> None:
        """What stands before the last layers of heads. A decoder has nothing there."""
        if self.base.causal:
            return
        heads, unserved = find_task_heads(self.base.model.config)  # type: ignore[arg-type]
        self.runner.heads = heads
        self.base.layout = with_heads(self.base.layout, heads, unserved, has_pooler)

    def _fuse(self, computing: Computing, probe: Probe) -> None:
        """Fused modules, where the whole base still passes its test with them."""
        if computing.library is None or self.base.stacks is not None:
            return
        count = fuse(self.base, computing.library, self.cache)
        try:
            check_base(self.runner, probe)
        except UnsupportedBase as error:
            logger.warning("the %d fused modules are taken back: with them, %s", count, error)
            restore(self.base.model)

    def _pack(self, computing: Computing, probe: Probe) -> None:
        """The weights in their final form: exact, tested in it; quantised, tested before."""
        if computing.quantize:
            check_kernel(self.runner, probe, self.limits)
        pack_tokens(self._tokens, computing)
        pack_model(self.base.body, computing)
        if computing.library is not None:
            leave_files(self.base.model)
        if computing.quantize:
            self._chain(computing)
            return
        if computing.library is not None or computing.pack:
            check_base(self.runner, probe)
        check_kernel(self.runner, probe, self.limits)
        if self._chain(computing):
            check_base(self.runner, probe)
            check_kernel(self.runner, probe, self.limits)

    def _chain(self, computing: Computing) -> bool:
        return computing.library is not None and chain(self.base, computing.library, self.cache)

    def _round(self, computing: Computing, probe: Probe) -> None:
        """Pages in their final form, after all tests on exact ones; what is not exact is told."""
        inexact = []
        if computing.quantize:
            inexact.append(f"weights are quantised ({computing.quantize})")
        if self.page_dtype != self.base.dtype:
            hold_pages(self.cache, self.page_dtype)
            inexact.append(f"keys and values are held in {str(self.page_dtype).removeprefix('torch.')}")
        if inexact:
            logger.warning(
                "%s: hidden states differ by %.2g of their size, tokens may differ",
                ", ".join(inexact), rounding_error(self.runner, probe),
            )  # fmt: skip

    def _capture(self, capture: Capture, config: ServerConfig, computing: Computing, probe: Probe) -> DecodeGraphs:
        """Decode steps as graphs, tested. Raises UnsupportedBase."""
        started, sizes, runner = time.monotonic(), sizes_up_to(config.max_num_seqs), self.runner
        lora: Any = computing.add_lora
        attention: Any = self.cache.backend
        try:
            graphs = DecodeGraphs(runner.base, self.slots, runner.scope, self.cache, lora, attention, sizes, capture)
        except RuntimeError as error:
            raise UnsupportedBase(f"this base's decode steps cannot be captured as CUDA graphs: {error}") from error
        check_graphs(runner, graphs, probe, self.limits)
        logger.info("decode steps of %s rows are CUDA graphs, in %.1f s", sizes, time.monotonic() - started)
        return graphs

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Its version must have been acquired from `registry`; the engine releases it."""
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> bool:
        """End a sequence before its time; False when it had ended."""
        return self.scheduler.end(sequence, SequenceStatus.ABORTED)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Schedule, run, postprocess."""
        self.registry.place_pinned()
        preempted = self.scheduler.preemptions
        batch = self.scheduler.schedule()
        self.idle = not batch.items
        if self.idle:
            return self.scheduler.refused()
        results = self.runner.run(batch)
        self._record(batch, self.scheduler.preemptions - preempted)
        return [*self.scheduler.refused(), *self.scheduler.postprocess(batch, results)]

    def _record(self, batch: Batch, preempted: int) -> None:
        self.observe_step(batch.num_tokens)
        self.steps.append(
            StepRecord(
                num_tokens=batch.num_tokens,
                tasks=tuple(item.sequence.task for item in batch.items),
                slots=tuple(item.slot for item in batch.items),
                counts=tuple(item.count for item in batch.items),
                preempted=preempted,
            )
        )

    def fail_all(self, reason: str) -> list[RequestOutput]:
        """End every sequence with an error: the engine cannot go on with them."""
        sequences = self.scheduler.unfinished()
        for sequence in sequences:
            self.scheduler.end(sequence, SequenceStatus.FAILED)
        return [RequestOutput(s, finish_reason="error", error=reason) for s in sequences]

    def _size_cache(self, config: ServerConfig, spare: bool) -> int:
        """As many pages as fit into `kv_cache_bytes`, by what the self-test's pages took; `spare`: beside one that no
        sequence shall have, the last."""
        if not self.base.causal:
            return 0
        page_bytes = self.cache.bytes_per_block
        num_blocks = config.kv_cache_bytes // page_bytes
        wanted = -(-self.base.max_positions // config.block_size) * config.max_num_seqs
        num_blocks = min(num_blocks - spare, wanted)
        if num_blocks < 2:
            raise UnsupportedBase(f"kv_cache_bytes {config.kv_cache_bytes} is too small: a page takes {page_bytes}")
        self.cache.resize(num_blocks + spare)
        return num_blocks

    def _longest(self, config: ServerConfig, blocks: BlockManager) -> int:
        longest = self.base.max_positions
        if self.base.causal:
            longest = min(longest, blocks.num_blocks * blocks.block_size)
        return min(longest, config.max_model_len or longest)


def _computing(config: ServerConfig, base: BaseModel, limits: Limits) -> Computing:
    """How the LoRA term and the base's products are computed. Raises UnsupportedBase."""
    dtype = base.dtype if base.device.type == "cpu" else POOL_DTYPES[limits.lora_dtype]
    assert dtype is not None, "on a GPU all adapters are held in one dtype"
    try:
        add_lora = choose_kernel(config.kernel, base.device, dtype, config.max_lora_rank)
    except KernelNotAvailable as error:
        raise UnsupportedBase(str(error)) from error
    library = load_library() if isinstance(add_lora, NativeLora) and config.pack_weights else None
    if config.quantize and library is None:
        raise UnsupportedBase(f"quantize {config.quantize} needs the CPU kernels and pack_weights")
    return Computing(add_lora, library, config.pack_weights, config.quantize)


def adapter_limits(config: ServerConfig, device: torch.device, dtype: torch.dtype) -> Limits:
    """What adapters may hold, and how they are held for a base of this dtype on this device."""
    lora_dtype = choose_lora_dtype(config.lora_dtype, device, dtype)
    pinned = device.type == "cuda"
    return Limits(config.max_lora_rank, config.max_adapter_bytes, config.max_labels, lora_dtype, pinned, dtype)


def _reading(base: BaseModel) -> list[str]:
    """The body's layers that read an encoder's output."""
    if base.stacks is None:
        return []
    decoder = next(name for name, module in base.body.named_modules() if module is base.stacks.decoder.module)
    return [f"{decoder}.{name}" for name in base.stacks.reading]


def _cross_attention(config: ServerConfig, backend: AttentionBackend, computing: Computing) -> CrossAttention:
    num_blocks = probe_blocks(config.block_size)
    if isinstance(backend, NativeAttention):
        assert computing.library is not None
        return NativeCrossAttention(computing.library, num_blocks, config.block_size)
    return TorchCrossAttention(num_blocks, config.block_size)


def _attention(
    config: ServerConfig, computing: Computing, device: torch.device, biased: bool = False
) -> AttentionBackend:
    """biased: whether it adds biases by distance, which the Triton kernels do not."""
    num_blocks = probe_blocks(config.block_size)
    if device.type == "cuda" and config.kernel in ("auto", "triton") and not biased:
        from server.engine.triton_attention import TritonAttention  # noqa: PLC0415  -- as adapters.kernels does

        return TritonAttention(num_blocks, config.block_size)
    if computing.library is not None:
        if config.block_size % computing.library.lanes == 0:
            return NativeAttention(computing.library, num_blocks, config.block_size)
        logger.warning(
            "block_size %d is no multiple of %d: attention takes the slower torch path",
            config.block_size, computing.library.lanes,
        )  # fmt: skip
    return TorchAttention(num_blocks, config.block_size)

"""The self-test: before the server is ready, its packed forward must equal transformers' own on this very base.

A base whose model does not call the attention interface, or does something that packing breaks, is refused here rather
than served wrongly. Knows nothing of requests; it makes its own token ids.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterInfo, Limits, LoraPair
from adapters.arena import POOL_DTYPES, build_arena
from adapters.batch import NO_SLOT
from adapters.config import LoraConfig
from adapters.kernels import add_lora_reference
from adapters.layers import LoraGroup, LoraLinear
from adapters.layout import BaseLayout, shared_inputs
from server.engine.attention import Span
from server.engine.base_model import BaseModel, UnsupportedBase
from server.engine.decode_graphs import DecodeGraphs
from server.engine.model_runner import ModelRunner
from server.engine.request import CAUSAL_LM, FEATURE_EXTRACTION, Batch, ScheduledSequence, Sequence

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""max |a − b| / max |b| by the base's dtype. In 16 bits both forward passes round every operation's result: measured on
SmolLM2 and MiniLM they differ by at most 0.029 in bf16 and 0.0032 in fp16, of which these bounds are about the double.
A span that sees its neighbour, a window forgotten or a mask the wrong way round give 0.2 to 1.3 there."""
LENGTHS = (11, 7, 1, 5)
SOURCES = (7, 12, 4, 1)
"""Tokens that the encoder of an encoder-decoder reads, whose targets have those lengths."""
CHUNKS = (4, 9, 10)
"""Where the first sequence's chunks end; its last token is decoded alone."""


@dataclass(frozen=True)
class Probe:
    """Token ids, and what transformers' own forward makes of each sequence alone."""

    token_ids: tuple[list[int], ...]
    hidden: tuple[Tensor, ...]  # [n, hidden_size] each
    logits: tuple[Tensor, ...]  # [vocabulary] of each last token; none on an encoder
    pooled: tuple[Tensor, ...]  # [hidden_size] each; none where the base has no pooler
    groups: tuple[tuple[str, ...], ...]
    """Linear layers of the body that read the same tensor."""
    sources: tuple[list[int], ...] = ()
    """Of an encoder-decoder: what its encoder reads for each of `token_ids`."""


def probe_blocks(block_size: int) -> int:
    """Pages that the test needs, the first of them left alone."""
    return sum(-(-max(lengths) // block_size) for lengths in zip(LENGTHS, SOURCES, strict=True)) + 1


@torch.inference_mode()
def make_probe(base: BaseModel) -> Probe:
    """Run the unpatched model on short random sequences, one by one."""
    if base.stacks is not None:
        return _probe_two_stacks(base)
    rng = random.Random(0)
    token_ids = tuple([rng.randrange(base.vocabulary_size) for _ in range(n)] for n in LENGTHS)
    if base.pad_id is not None and 0 <= base.pad_id < base.vocabulary_size:  # some bases do not count its positions
        for ids in token_ids[:2]:
            ids[len(ids) // 2] = base.pad_id
    hidden, logits, pooled = [], [], []
    with shared_inputs(base.body, base.layout.linears) as groups:
        base.body(input_ids=torch.tensor([token_ids[0]], device=base.device))
    for ids in token_ids:
        inputs = torch.tensor([ids], device=base.device)
        output = base.body(input_ids=inputs)
        hidden.append(output.last_hidden_state[0].clone())
        if base.causal:
            logits.append(base.model(input_ids=inputs).logits[0, -1].float())
        elif getattr(output, "pooler_output", None) is not None:
            pooled.append(output.pooler_output[0].clone())
    return Probe(token_ids, tuple(hidden), tuple(logits), tuple(pooled), tuple(map(tuple, groups)))


def _probe_two_stacks(base: BaseModel) -> Probe:
    rng = random.Random(0)
    token_ids = tuple([rng.randrange(base.vocabulary_size) for _ in range(n)] for n in LENGTHS)
    sources = tuple([rng.randrange(base.input_vocabulary_size) for _ in range(n)] for n in SOURCES)
    if base.pad_id is not None:
        for ids in (*token_ids[:2], *sources[:2]):
            ids[len(ids) // 2] = base.pad_id
    hidden, logits = [], []
    for source, target in zip(sources, token_ids, strict=True):
        inputs, wanted = (torch.tensor([ids], device=base.device) for ids in (source, target))
        with shared_inputs(base.body, base.layout.linears) as groups, base.observe_hidden() as states:
            output = base.model(input_ids=inputs, decoder_input_ids=wanted, use_cache=False)
            hidden.append(states[0].clone())
        logits.append(output.logits[0, -1].float())
    return Probe(token_ids, tuple(hidden), tuple(logits), (), tuple(map(tuple, groups)), sources)


@torch.inference_mode()
def check_base(runner: ModelRunner, probe: Probe) -> None:
    """The packed forward, or the padded one, against `probe`. Raises UnsupportedBase."""
    name = type(runner.base.model).__name__
    try:
        packed, logits = _packed(runner, probe, NO_SLOT)
        chunked = _chunked(runner, probe) if runner.base.causal else packed[0]
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        fault = f"the {runner.form} forward of {name} fails: {error}"
        raise UnsupportedBase("; ".join(_obstacles(runner)) or fault) from error
    if obstacles := _obstacles(runner):
        raise UnsupportedBase("; ".join(obstacles))
    for got, expected in zip([*packed, chunked, *logits], [*probe.hidden, probe.hidden[0], *probe.logits], strict=True):
        difference = _difference(got, expected)
        if not difference <= TOLERANCES[runner.base.dtype]:
            raise UnsupportedBase(
                f"the {runner.form} forward of {name} differs from transformers' own "
                f"(relative difference {difference:.2g}): it cannot be served exactly"
            )


def _obstacles(runner: ModelRunner) -> list[str]:
    """What keeps this base from being served whatever it computes; known after a forward pass."""
    name = type(runner.base.model).__name__
    found = []
    if not runner.padded and not runner.cache.called:
        found.append(f"{name} computes attention by itself, not through transformers' attention interface")
    if not runner.base.max_positions:
        found.append(f"{name} names no longest context (max_position_embeddings)")
    if not runner.base.layout.linears:
        found.append(f"{name} has no linear layers (nn.Linear) that an adapter could change")
    return found


@torch.inference_mode()
def rounding_error(runner: ModelRunner, probe: Probe) -> float:
    """max |got − probe| / max |probe| over hidden states, those over cache pages included.

    What weights in 8 bits, and keys and values in 16, change. Raises UnsupportedBase for values that are not finite.
    """
    packed, _ = _packed(runner, probe, NO_SLOT)
    chunked = _chunked(runner, probe) if runner.base.causal else packed[0]
    pairs = zip([*packed, chunked], [*probe.hidden, probe.hidden[0]], strict=True)
    differences = [_difference(got, expected) for got, expected in pairs]
    if not all(map(math.isfinite, differences)):  # the largest of them may hide what is not a number
        raise UnsupportedBase("this base gives values that are not finite when its weights, keys or values are rounded")
    return max(differences)


@torch.inference_mode()
def check_pooler(runner: ModelRunner, probe: Probe) -> bool:
    """Whether SEQ_CLS can be served: the base's pooler apart, over first tokens, equals the base's own."""
    if runner.base.causal:
        return True
    first = torch.stack([hidden[0] for hidden in probe.hidden])
    try:
        got = runner.pool(first, [NO_SLOT] * len(first))
    except (RuntimeError, TypeError, AttributeError, IndexError):
        return False
    tolerance = TOLERANCES[runner.base.dtype]
    return bool(probe.pooled) and all(_difference(a, b) <= tolerance for a, b in zip(got, probe.pooled, strict=True))


@torch.inference_mode()
def check_kernel(runner: ModelRunner, probe: Probe, limits: Limits) -> None:
    """A random adapter's row against the reference kernel, and a base row beside it. Raises UnsupportedBase."""
    slot, tolerance = runner.slots.max_loras - 1, TOLERANCES[runner.base.dtype]
    with torch.inference_mode(False):
        runner.slots.write(slot, _random_adapter(runner.base.layout, limits, gains=True))
    groups = {m.group for m in runner.base.body.modules() if isinstance(m, LoraLinear)}
    try:
        got, _ = _packed(runner, probe, slot, base_rows=1)
        with _reference_kernel(groups):
            expected, _ = _packed(runner, probe, slot, base_rows=1)
    finally:
        runner.slots.clear(slot)
    if not _difference(got[0], probe.hidden[0]) <= tolerance:
        raise UnsupportedBase("an adapter changes the base's rows in its batch")
    for a, b in zip(got[1:], expected[1:], strict=True):
        if not _difference(a, b) <= tolerance:
            raise UnsupportedBase("the LoRA kernel differs from the reference on this base")
    if max(_difference(a, b) for a, b in zip(got[1:], probe.hidden[1:], strict=True)) < tolerance:
        raise UnsupportedBase("an adapter on this base changes nothing")


@torch.inference_mode()
def open_cache(runner: ModelRunner, probe: Probe) -> None:
    """One token over a cache of new size: now each layer makes what it keeps there.

    Made by the first prompts it would lie between their activations, where malloc cannot join again what they free: a
    step of 1,024 tokens then took 140 MB for 25.
    """
    sequence = Sequence(0, CAUSAL_LM, probe.token_ids[0][:1], None)
    sequence.source_ids = probe.sources[0][:1] if probe.sources else []
    sequence.pages = _pages(runner, sequence, 1)
    item = ScheduledSequence(sequence, 0, 1, NO_SLOT, bool(probe.sources))
    runner.forward(Batch((item,)), [Span(0, 1, 0, sequence.pages)], [0])


@torch.inference_mode()
def check_graphs(runner: ModelRunner, graphs: DecodeGraphs, probe: Probe, limits: Limits) -> None:
    """Last tokens of sequences by a graph, against the eager step: the base's alone, then as many as fit, a random
    adapter's among them. Raises UnsupportedBase."""
    items: list[ScheduledSequence] = []
    slot, used = runner.slots.max_loras - 1, 0
    for i, ids in sorted(enumerate(probe.token_ids), key=lambda each: len(each[1])):
        sequence = Sequence(i, CAUSAL_LM, ids, None)
        sequence.pages = _pages(runner, sequence, used)
        used += len(sequence.pages)
        if used <= graphs.num_pages:
            items.append(ScheduledSequence(sequence, len(ids) - 1, 1, slot if items else NO_SLOT))
    with torch.inference_mode(False):
        runner.slots.write(slot, _random_adapter(runner.base.layout, limits, gains=False))
    try:
        for item in items:
            if item.start:
                whole = Batch((replace(item, start=0, count=item.start),))
                runner.forward(whole, [Span(0, item.start, 0, item.sequence.pages)], [])
        for some in (items[:1], items[-graphs.max_rows :]):
            batch = Batch(tuple(some))
            spans = [Span(row, row + 1, item.start, item.sequence.pages) for row, item in enumerate(some)]
            expected = runner.forward(batch, spans, range(len(some)))
            got = graphs.run(batch, spans)
            for a, b in zip(got, expected, strict=True):
                if b is None or not _difference(a, b) <= TOLERANCES[runner.base.dtype]:
                    raise UnsupportedBase("a decode step as a CUDA graph differs from the same step without")
    finally:
        runner.slots.clear(slot)


def _packed(runner: ModelRunner, probe: Probe, slot: int, base_rows: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """All sequences in one row, without a cache of their own: hidden states of each, and logits of each last token."""
    items: list[ScheduledSequence] = []
    spans, start = [], 0
    for i, ids in enumerate(probe.token_ids):
        sequence, pages = Sequence(i, FEATURE_EXTRACTION, ids, None), None
        if probe.sources:
            sequence.source_ids = probe.sources[i]
            pages = sequence.pages = _pages(runner, sequence, 1 + sum(len(before.sequence.pages) for before in items))
        item = ScheduledSequence(sequence, 0, len(ids), NO_SLOT if i < base_rows else slot, bool(probe.sources))
        items.append(item)
        spans.append(Span(start, start + len(ids), 0, pages))
        start += len(ids)
    rows = [span.end - 1 for span in spans] if runner.base.causal else []
    hidden, logits = runner.forward(Batch(tuple(items)), spans, rows)
    return [hidden[span.start : span.end].clone() for span in spans], [] if logits is None else [*logits]


def _pages(runner: ModelRunner, sequence: Sequence, first: int) -> list[int]:
    """Not in order."""
    count = -(-sequence.num_places(sequence.num_tokens) // runner.block_size)
    return list(range(first + count - 1, first - 1, -1))


def _chunked(runner: ModelRunner, probe: Probe) -> Tensor:
    """The first sequence over cache pages, in chunks and at last one token."""
    sequence = Sequence(0, CAUSAL_LM, probe.token_ids[0], None)
    sequence.source_ids = probe.sources[0] if probe.sources else []
    sequence.pages = _pages(runner, sequence, 1)
    parts, start = [], 0
    for end in (*CHUNKS, sequence.num_tokens):
        item = ScheduledSequence(sequence, start, end - start, NO_SLOT, bool(probe.sources) and not start)
        span = Span(0, end - start, start, sequence.pages)
        parts.append(runner.forward(Batch((item,)), [span], [])[0].clone())
        start = end
    return torch.cat(parts)


def _random_adapter(layout: BaseLayout, limits: Limits, gains: bool) -> Adapter:
    """Rank 4 on every linear layer, large enough to be seen in the output; held as a checkpoint's would be.

    gains: with those of DoRA on half of them; graphs do not serve them.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for name, shape in layout.linears.items():
        a = torch.randn(4, shape.d_in, generator=generator) / shape.d_in**0.5
        b = torch.randn(shape.d_out, 4, generator=generator) / 8
        has_gain = gains and bool(torch.rand((), generator=generator) < 0.5)
        gain = 0.75 + torch.rand(shape.d_out, generator=generator) / 2 if has_gain else None
        pairs[name] = LoraPair(a, b, 1.0, magnitude=gain)
    config = LoraConfig(rank=4, alpha=4, target_modules="all-linear")
    arena = build_arena(pairs, POOL_DTYPES[limits.lora_dtype], pinned=limits.pinned)
    for pair in arena.pairs.values():
        pair.divided = pair.magnitude is not None
    info = AdapterInfo("", FEATURE_EXTRACTION, config.rank, (), "", 0)
    return Adapter(info, config, arena.pairs, None, memory=arena.memory)


@contextmanager
def _reference_kernel(groups: Iterable[LoraGroup]) -> Iterator[None]:
    """Meanwhile the LoRA term of `groups` is the reference's, apart from the base's product."""
    chosen = [(group, group.add_lora, group.fused) for group in groups]
    try:
        for group, _, _ in chosen:
            group.add_lora, group.fused = add_lora_reference, False
        yield
    finally:
        for group, add_lora, fused in chosen:
            group.add_lora, group.fused = add_lora, fused


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.float(), b.float()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-9))

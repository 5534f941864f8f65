"""Scheduler: continuous batching. Decides what the next step computes and what its results mean; no tensors.

Decode first, then prompts in chunks within a token budget. When pages run out the youngest running sequence gives its
pages back and is computed again later. A sequence whose adapter finds no free slot is passed over, so that it blocks
nobody; but not for ever: after MAX_PASSED_OVER steps nobody younger is admitted before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from adapters.batch import NO_SLOT
from adapters.registry import AdapterRegistry
from server.engine.block_manager import BlockManager
from server.engine.request import (
    Batch,
    RequestOutput,
    RowResult,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
)

MAX_PASSED_OVER = 64


@dataclass
class _Step:
    """What one step has taken and what is left of it."""

    tokens: int
    """Left in the budget."""
    taken: set[int] = field(default_factory=set)
    """Ids of scheduled sequences."""
    prefills: bool = False
    preempted: bool = False
    pages_short: bool = False
    """A prompt found no pages, so that none behind it may take them."""
    slots_kept: bool = False
    """Somebody was passed over too often: free slots are his."""


class Scheduler:
    """Waiting and running sequences. Engine's thread only."""

    def __init__(
        self, blocks: BlockManager, registry: AdapterRegistry, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.blocks = blocks
        self.registry = registry
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Batch:
        """The next step's batch, ordered by slot; empty when nothing can run."""
        step = _Step(self.max_num_batched_tokens)
        items = [*self._continue_running(step), *self._admit_waiting(step)]
        items.sort(key=lambda item: item.slot)
        return Batch(tuple(items), self.blocks.take_fresh())

    def postprocess(self, batch: Batch, results: dict[int, RowResult]) -> list[RequestOutput]:
        """Enter the results (by sequence id) of a step; end what is finished."""
        outputs = []
        for item in batch.items:
            sequence = item.sequence
            sequence.num_computed += item.count
            if item.completes:
                result = results[sequence.id]
                outputs.append(self._conclude(sequence, result))
        return outputs

    def end(self, sequence: Sequence, status: SequenceStatus) -> bool:
        """End a sequence, wherever it is, and give back all it holds; False when it had ended already."""
        if sequence.status.ended:
            return False
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._let_go(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = status
        if sequence.version is not None:
            self.registry.release(sequence.version)
        return True

    def unfinished(self) -> list[Sequence]:
        return [*self.running, *self.waiting]

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, slots and statuses fit together."""
        self.blocks.check_integrity(self.running)
        self.registry.check_integrity()
        assert all(s.status is SequenceStatus.RUNNING and s.slot is not None for s in self.running)
        assert all(s.status is SequenceStatus.WAITING and s.slot is None and not s.pages for s in self.waiting)
        for version in {s.version for s in self.running if s.version is not None}:
            assert version.slot_users == sum(s.version is version for s in self.running)

    def _continue_running(self, step: _Step) -> Iterator[ScheduledSequence]:
        """Decode tokens first, then chunks of prompts that are under way."""
        for sequence in sorted(self.running, key=lambda s: s.num_tokens - s.num_computed > 1):
            count = min(sequence.num_tokens - sequence.num_computed, step.tokens)
            if count <= 0 or sequence.status is not SequenceStatus.RUNNING:
                continue
            if self._make_room(sequence, sequence.num_computed + count, step):
                yield self._take(sequence, count, step)

    def _make_room(self, sequence: Sequence, num_tokens: int, step: _Step) -> bool:
        """Pages for `num_tokens` tokens, if need be from the youngest; False when that is `sequence` itself."""
        while not self.blocks.extend(sequence, num_tokens):
            victim = next(s for s in reversed(self.running) if s.id not in step.taken)
            self._preempt(victim)
            step.preempted = True
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self._let_go(victim)
        victim.status = SequenceStatus.WAITING
        victim.num_computed = 0
        victim.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(victim)

    def _admit_waiting(self, step: _Step) -> Iterator[ScheduledSequence]:
        for sequence in list(self.waiting):
            if step.tokens <= 0 or step.preempted:
                return
            if sequence.generates:
                if not self._admit_generation(sequence, step):
                    continue
                count = min(sequence.num_tokens, step.tokens)
            else:
                # Without a cache it cannot be cut: one longer than the budget is the only prompt of its step.
                count = sequence.num_tokens
                if count > step.tokens and step.prefills:
                    return
                if not self._admit(sequence, step):
                    continue
            yield self._take(sequence, count, step)

    def _admit_generation(self, sequence: Sequence, step: _Step) -> bool:
        """Admit it with pages for all tokens known of it, so that its chunks cannot starve each other."""
        if step.pages_short or len(self.running) >= self.max_num_seqs:
            return False
        if not self.blocks.extend(sequence, sequence.num_tokens):
            step.pages_short = True
            return False
        if not self._admit(sequence, step):
            self.blocks.free(sequence)
            return False
        return True

    def _admit(self, sequence: Sequence, step: _Step) -> bool:
        """Move it from waiting to running with a slot; False when there is none for it now."""
        slot: int | None = NO_SLOT
        if sequence.version is not None:
            slot = None if step.slots_kept else self.registry.acquire_slot(sequence.version)
        if slot is None:
            sequence.passed_over += 1
            step.slots_kept |= sequence.passed_over > MAX_PASSED_OVER
            return False
        sequence.slot = slot
        sequence.status = SequenceStatus.RUNNING
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _take(self, sequence: Sequence, count: int, step: _Step) -> ScheduledSequence:
        assert sequence.slot is not None
        step.tokens -= count
        step.taken.add(sequence.id)
        step.prefills |= count > 1
        return ScheduledSequence(sequence, sequence.num_computed, count, sequence.slot)

    def _conclude(self, sequence: Sequence, result: RowResult) -> RequestOutput:
        if result.error is not None:
            self.end(sequence, SequenceStatus.FAILED)
            return RequestOutput(sequence, finish_reason="error", error=result.error)
        reason: str | None = "done"
        if sequence.generates:
            assert result.token_id is not None
            sequence.output_ids.append(result.token_id)
            reason = finish_reason(sequence)
        if reason is not None:
            self.end(sequence, SequenceStatus.FINISHED)
        return RequestOutput(sequence, result.token_id, result.logprobs, result.values, reason)

    def _let_go(self, sequence: Sequence) -> None:
        self.blocks.free(sequence)
        if sequence.version is not None:
            self.registry.release_slot(sequence.version)
        sequence.slot = None


def finish_reason(sequence: Sequence) -> str | None:
    """`stop`, `length`, or None when generation goes on. Stop strings are the caller's matter: they need text."""
    params = sequence.params
    assert params is not None
    token, n = sequence.output_ids[-1], len(sequence.output_ids)
    if n >= params.min_tokens:
        if token in params.stop_token_ids:
            return "stop"
        if token in sequence.eos_ids and not params.ignore_eos:
            return "stop"
    return "length" if n >= params.max_tokens else None

"""Scheduler: continuous batching. Decides what the next step computes and what its results mean; no tensors.

Decode first, then prompts in chunks within a token budget. When pages run out the youngest running sequence, of the
least urgent, gives its pages back and is computed again later. Who is admitted next is decided between adapters
(fairness.py): a sequence whose adapter is not on the device blocks nobody, until others were served `fairness_tokens`
more than its adapter.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from adapters.batch import NO_SLOT
from adapters.registry import AdapterRegistry
from adapters.version import AdapterVersion
from server.engine.block_manager import BlockManager
from server.engine.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT, Claims, Turns, VirtualCounters
from server.engine.request import (
    Batch,
    RequestOutput,
    RowResult,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
)
from server.engine.waiting import Waiting

SCORED_TOKENS = 128
"""Prompt tokens whose log-probabilities are told in one step, at most: each takes a row of logits."""


@dataclass
class _Step:
    """What one step has taken and what is left of it."""

    tokens: int
    """Left in the budget."""
    places: int
    """How many more sequences that generate may be admitted; none once one found no pages, so that none behind it may
    take them."""
    claims: Claims
    scored: int = SCORED_TOKENS
    """Left of the prompt tokens that may be scored."""
    most_served: int | None = None
    """The largest counter of all, once somebody asked for it."""
    taken: set[int] = field(default_factory=set)
    """Ids of scheduled sequences."""
    prefills: bool = False
    preempted: bool = False


class Scheduler:
    """Waiting and running sequences. Engine's thread only."""

    def __init__(
        self,
        blocks: BlockManager,
        registry: AdapterRegistry,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        fairness_tokens: int = 512,
    ) -> None:
        self.blocks = blocks
        self.registry = registry
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.fairness_tokens = fairness_tokens
        self.counters = VirtualCounters(fairness_tokens)
        self.waiting = Waiting()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._failed: dict[Sequence, str] = {}
        """Those that wait for an adapter that could not be read, and why; ended by `refused`."""

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)
        self.counters.enter(sequence.adapter)
        if sequence.version is not None:
            self.registry.expect(sequence.version)

    def schedule(self) -> Batch:
        """The next step's batch, ordered by slot; empty when nothing can run."""
        places = self.max_num_seqs - len(self.running)
        step = _Step(self.max_num_batched_tokens, places, Claims(self.fairness_tokens))
        items = [*self._continue_running(step), *self._admit_waiting(step)]
        items.sort(key=lambda item: item.slot)
        return Batch(tuple(items), self.blocks.take_fresh())

    def refused(self) -> list[RequestOutput]:
        """End those whose adapter `schedule` found that it could not be read."""
        failed, self._failed = self._failed, {}
        return [
            RequestOutput(sequence, finish_reason="error", error=error)
            for sequence, error in failed.items()
            if self.end(sequence, SequenceStatus.FAILED)
        ]

    def postprocess(self, batch: Batch, results: dict[int, RowResult]) -> list[RequestOutput]:
        """Enter the results (by sequence id) of a step; end what is finished."""
        outputs = []
        for item in batch.items:
            sequence = item.sequence
            completes = item.completes
            sequence.num_computed += item.count
            sequence.encoded |= item.encodes
            self._charge(sequence, completes)
            result = results.get(sequence.id)
            if result is not None:
                sequence.prompt_logprobs += result.prompt_logprobs
            if completes:
                assert result is not None
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
        self.counters.leave(sequence.adapter)
        if sequence.version is not None:
            self.registry.unexpect(sequence.version)
            self.registry.release(sequence.version)
        return True

    def unfinished(self) -> list[Sequence]:
        return [*self.running, *self.waiting]

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, slots, statuses, queues and counters fit together."""
        self.blocks.check_integrity(self.running)
        self.registry.check_integrity()
        self.waiting.check_integrity()
        self.counters.check_integrity(Counter(s.adapter for s in self.unfinished()))
        assert all(s.status is SequenceStatus.RUNNING and s.slot is not None for s in self.running)
        assert all(s.status is SequenceStatus.WAITING and s.slot is None and not s.pages for s in self.waiting)
        assert all(s.slot == (NO_SLOT if s.version is None else s.version.slot) for s in self.running)
        for version in {s.version for s in self.unfinished() if s.version is not None}:
            assert version.slot_users == sum(s.version is version for s in self.running)
            assert version.expected >= sum(s.version is version for s in self.unfinished())

    def _continue_running(self, step: _Step) -> Iterator[ScheduledSequence]:
        """Decode tokens first, then chunks of prompts that are under way."""
        for sequence in sorted(self.running, key=lambda s: s.num_tokens - s.num_computed > 1):
            count = _share(sequence, step)
            if count <= 0 or sequence.status is not SequenceStatus.RUNNING:
                continue
            if self._make_room(sequence, sequence.num_computed + count, step):
                yield self._take(sequence, count, step)

    def _make_room(self, sequence: Sequence, num_tokens: int, step: _Step) -> bool:
        """Pages for `num_tokens` tokens, if need be from the youngest of the least urgent; False when that is
        `sequence` itself."""
        while not self.blocks.extend(sequence, num_tokens):
            left = [s for s in reversed(self.running) if s.id not in step.taken]
            victim = max(left, key=lambda s: s.priority)
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
        victim.encoded = False
        victim.preemptions += 1
        self.preemptions += 1
        self.waiting.put_back(victim)

    def _admit_waiting(self, step: _Step) -> Iterator[ScheduledSequence]:
        """Those that were preempted, then whoever's turn it is."""
        if not self.waiting or step.preempted:
            return
        for sequence in list(self.waiting.preempted) if step.places > 0 else ():
            count = _share(sequence, step)
            if count > 0 and self._admit(sequence, self.counters[sequence.adapter], step):
                yield self._take(sequence, count, step)
        if step.tokens <= 0:
            return
        turns = Turns(self.waiting.queues(generating=step.places > 0), self.counters, step.claims)
        for version in turns.failed:
            self._fail(version)
        while step.tokens > 0 and (turn := turns.pop()) is not None:
            sequence = turn.queue.first
            # What looks both ways cannot be cut: one longer than the budget is the only prompt of its step.
            whole = len(sequence.source_ids) if sequence.generates else sequence.num_tokens
            if whole > step.tokens and step.prefills:
                return
            count = _share(sequence, step) if sequence.generates else sequence.num_tokens
            if count > 0 and self._admit(sequence, turn.counter, step):
                yield self._take(sequence, count, step)
                turns.again(turn, len(sequence.given) * PROMPT_WEIGHT)
            if sequence.generates and step.places <= 0:
                turns.drop_generating()

    def _admit(self, sequence: Sequence, counter: int, step: _Step) -> bool:
        """Move it from waiting to running, with a slot, and pages for all tokens known of it.

        With all its pages, the chunks of prompts cannot starve each other. `counter` is its adapter's.
        """
        version = sequence.version
        if version is not None and not version.in_host:
            self._ask_for(version, counter, step)
            return False
        if sequence.generates and not self._has_room(sequence, step):
            return False
        slot = NO_SLOT if version is None else self.registry.acquire_slot(version)
        if slot is None:
            assert version is not None
            step.claims.refused(version, counter)
            return False
        if sequence.generates:
            self.blocks.extend(sequence, sequence.num_tokens)
            step.places -= 1
        sequence.slot = slot
        sequence.status = SequenceStatus.RUNNING
        sequence.admitted_at = sequence.admitted_at or time.monotonic()
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _has_room(self, sequence: Sequence, step: _Step) -> bool:
        """Whether there are a place and pages for a sequence that generates."""
        if sequence.num_places(sequence.num_tokens) > self.blocks.num_free * self.blocks.block_size:
            step.places = 0
        return step.places > 0

    def _ask_for(self, version: AdapterVersion, counter: int, step: _Step) -> None:
        """Have an adapter read that is not in host memory; its sequences are admitted when it is."""
        if step.most_served is None:
            step.most_served = self.counters.highest
        urgent = counter + self.fairness_tokens < step.most_served
        if self.registry.acquire_slot(version, urgent) is not None:  # it has come just now
            self.registry.release_slot(version)
        if version.failure is None:
            step.claims.refused(version, counter)
        else:
            self._fail(version)

    def _fail(self, version: AdapterVersion) -> None:
        """None of its sequences can run."""
        for sequence in self.waiting.of(version.digest):
            self._failed[sequence] = version.failure or ""

    def _take(self, sequence: Sequence, count: int, step: _Step) -> ScheduledSequence:
        assert sequence.slot is not None
        item = ScheduledSequence(
            sequence, sequence.num_computed, count, sequence.slot, bool(sequence.source_ids) and not sequence.encoded
        )
        step.tokens -= count + item.num_source
        step.scored -= count if sequence.scores else 0
        step.taken.add(sequence.id)
        step.prefills |= count > 1 or item.encodes
        return item

    def _charge(self, sequence: Sequence, completes: bool) -> None:
        """Count what was served; what is computed again after a preemption was charged before."""
        tokens = OUTPUT_WEIGHT if completes and sequence.generates else 0
        missing = len(sequence.given) - sequence.num_charged
        if missing > 0:
            done = len(sequence.source_ids) if sequence.encoded else sequence.num_computed
            computed = max(0, min(done - sequence.num_charged, missing))
            sequence.num_charged += computed
            tokens += computed * PROMPT_WEIGHT
        self.counters.charge(sequence.adapter, tokens)

    def _conclude(self, sequence: Sequence, result: RowResult) -> RequestOutput:
        if result.error is not None:
            self.end(sequence, SequenceStatus.FAILED)
            return RequestOutput(sequence, finish_reason="error", error=result.error)
        if not sequence.generates:
            self.end(sequence, SequenceStatus.FINISHED)
            return RequestOutput(sequence, values=result.values, finish_reason="done")
        assert sequence.params is not None
        assert result.token_id is not None
        scores = () if sequence.output_ids else tuple(sequence.prompt_logprobs)
        if sequence.params.max_tokens == 0:
            self.end(sequence, SequenceStatus.FINISHED)
            return RequestOutput(sequence, finish_reason="length", prompt_logprobs=scores)
        sequence.output_ids.append(result.token_id)
        reason = finish_reason(sequence)
        if reason is not None:
            self.end(sequence, SequenceStatus.FINISHED)
        return RequestOutput(sequence, result.token_id, result.logprobs, finish_reason=reason, prompt_logprobs=scores)

    def _let_go(self, sequence: Sequence) -> None:
        self.blocks.free(sequence)
        if sequence.version is not None:
            self.registry.release_slot(sequence.version)
        sequence.slot = None


def _share(sequence: Sequence, step: _Step) -> int:
    """How many of its tokens this step may compute."""
    left = sequence.num_tokens - sequence.num_computed
    if sequence.source_ids and not sequence.encoded:
        room = step.tokens - len(sequence.source_ids)
        return 0 if room <= 0 and (step.prefills or step.tokens <= 0) else min(left, max(room, 1))
    count = min(left, step.tokens)
    return min(count, step.scored) if sequence.scores else count


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

"""Waiting: sequences that are not running, kept by adapter. Knows nothing of who goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from adapters.version import AdapterVersion
from server.engine.request import Sequence


@dataclass(eq=False)
class Queue:
    """Sequences of one adapter, the first to be admitted first; never empty while `Waiting` holds it."""

    adapter: str | None
    """The version's digest; None: the base model."""
    version: AdapterVersion | None
    sequences: OrderedDict[Sequence, int] = field(default_factory=OrderedDict)
    """Sequence -> when it came, in steps of one."""

    @property
    def first(self) -> Sequence:
        return next(iter(self.sequences))

    @property
    def arrival(self) -> int:
        """When its first sequence came."""
        return self.sequences[self.first]


class Waiting:
    """What waits: those that were preempted, and a queue for each adapter and kind of task. Engine's thread only.

    Generation and one-step tasks of one adapter have a queue each, since the former wait for places and pages.
    """

    def __init__(self) -> None:
        self.preempted: OrderedDict[Sequence, None] = OrderedDict()
        """The first to be admitted first, before everybody else."""
        self._generating: dict[str | None, Queue] = {}
        self._one_step: dict[str | None, Queue] = {}
        self._count = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.preempted
        for queue in self.queues():
            yield from queue.sequences

    def __contains__(self, sequence: Sequence) -> bool:
        queue = self._queues_for(sequence).get(sequence.adapter)
        return sequence in self.preempted or (queue is not None and sequence in queue.sequences)

    def queues(self, generating: bool = True) -> Iterator[Queue]:
        """The queues of all adapters; without `generating` those of one-step tasks only."""
        one_step = self._one_step.values()
        return chain(self._generating.values(), one_step) if generating else iter(one_step)

    def of(self, adapter: str | None) -> list[Sequence]:
        """All that wait for one adapter."""
        found = [sequence for sequence in self.preempted if sequence.adapter == adapter]
        for queues in (self._generating, self._one_step):
            if adapter in queues:
                found += queues[adapter].sequences
        return found

    def add(self, sequence: Sequence) -> None:
        """Behind all others of its adapter."""
        queues = self._queues_for(sequence)
        queue = queues.get(sequence.adapter)
        if queue is None:
            queue = queues[sequence.adapter] = Queue(sequence.adapter, sequence.version)
        queue.sequences[sequence] = self._arrivals
        self._arrivals += 1
        self._count += 1

    def put_back(self, sequence: Sequence) -> None:
        """Before everybody: it was preempted."""
        self.preempted[sequence] = None
        self.preempted.move_to_end(sequence, last=False)
        self._count += 1

    def remove(self, sequence: Sequence) -> None:
        """Wherever it is among those that wait."""
        if sequence in self.preempted:
            del self.preempted[sequence]
        else:
            queues = self._queues_for(sequence)
            queue = queues[sequence.adapter]
            del queue.sequences[sequence]
            if not queue.sequences:
                del queues[sequence.adapter]
        self._count -= 1

    def check_integrity(self) -> None:
        """Raise AssertionError unless every sequence is in one place, its own."""
        every = list(self)
        assert len(every) == len(set(every)) == self._count, "a sequence waits twice, or is not counted"
        for generates, queues in ((True, self._generating), (False, self._one_step)):
            for adapter, queue in queues.items():
                assert queue.sequences, "an empty queue is kept"
                assert queue.adapter == adapter
                arrivals = list(queue.sequences.values())
                assert arrivals == sorted(arrivals)
                for sequence in queue.sequences:
                    assert (sequence.adapter, sequence.generates) == (adapter, generates)
                    assert sequence.version is queue.version

    def _queues_for(self, sequence: Sequence) -> dict[str | None, Queue]:
        return self._generating if sequence.generates else self._one_step

"""Waiting: sequences that are not running, kept by adapter. Knows nothing of who goes first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from adapters.version import AdapterVersion
from server.engine.request import Sequence


@dataclass(eq=False)
class Queue:
    """Sequences of one adapter, the first to be admitted first; never empty while `Waiting` holds it.

    Lower priorities first, as vLLM has it; of one priority, who came first.
    """

    adapter: str | None
    """The version's digest; None: the base model."""
    version: AdapterVersion | None
    _order: list[tuple[int, int, Sequence]] = field(default_factory=list)
    """(priority, when it came, sequence), ascending; no two came at once."""
    _arrivals: dict[Sequence, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, _, sequence in self._order)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._arrivals

    @property
    def first(self) -> Sequence:
        return self._order[0][2]

    @property
    def rank(self) -> tuple[int, int]:
        """Of its first sequence, among the queues: its priority, and when it came."""
        priority, arrival, _ = self._order[0]
        return priority, arrival

    def add(self, sequence: Sequence, arrival: int) -> None:
        insort(self._order, (sequence.priority, arrival, sequence))
        self._arrivals[sequence] = arrival

    def remove(self, sequence: Sequence) -> None:
        key = (sequence.priority, self._arrivals.pop(sequence))
        del self._order[bisect_left(self._order, key, key=lambda entry: entry[:2])]

    def check_integrity(self) -> None:
        """Raise AssertionError unless both records tell the same, in order."""
        assert self._order, "an empty queue is kept"
        assert [entry[:2] for entry in self._order] == sorted((s.priority, at) for s, at in self._arrivals.items())
        assert all(self._arrivals[sequence] == arrival for _, arrival, sequence in self._order)


class Waiting:
    """What waits: those that were preempted, and a queue for each adapter and kind of task. Engine's thread only.

    Generation and one-step tasks of one adapter have a queue each, since the former wait for places and pages.
    """

    def __init__(self) -> None:
        self.preempted: OrderedDict[Sequence, None] = OrderedDict()
        """The first to be admitted first, before everybody else."""
        self._generating: dict[str | None, Queue] = {}
        self._one_step: dict[str | None, Queue] = {}
        self.owners: Counter[str] = Counter()
        """How many of each owner wait."""
        self._count = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.preempted
        for queue in self.queues():
            yield from queue

    def __contains__(self, sequence: Sequence) -> bool:
        queue = self._queues_for(sequence).get(sequence.adapter)
        return sequence in self.preempted or (queue is not None and sequence in queue)

    def queues(self, generating: bool = True) -> Iterator[Queue]:
        """The queues of all adapters; without `generating` those of one-step tasks only."""
        one_step = self._one_step.values()
        return chain(self._generating.values(), one_step) if generating else iter(one_step)

    def of(self, adapter: str | None) -> list[Sequence]:
        """All that wait for one adapter."""
        found = [sequence for sequence in self.preempted if sequence.adapter == adapter]
        for queues in (self._generating, self._one_step):
            if adapter in queues:
                found += queues[adapter]
        return found

    def add(self, sequence: Sequence) -> None:
        """Behind all others of its adapter and priority."""
        queues = self._queues_for(sequence)
        queue = queues.get(sequence.adapter)
        if queue is None:
            queue = queues[sequence.adapter] = Queue(sequence.adapter, sequence.version)
        queue.add(sequence, self._arrivals)
        self._arrivals += 1
        self._count += 1
        self.owners[sequence.owner] += 1

    def put_back(self, sequence: Sequence) -> None:
        """Before everybody: it was preempted."""
        self.preempted[sequence] = None
        self.preempted.move_to_end(sequence, last=False)
        self._count += 1
        self.owners[sequence.owner] += 1

    def remove(self, sequence: Sequence) -> None:
        """Wherever it is among those that wait."""
        if sequence in self.preempted:
            del self.preempted[sequence]
        else:
            queues = self._queues_for(sequence)
            queue = queues[sequence.adapter]
            queue.remove(sequence)
            if not queue:
                del queues[sequence.adapter]
        self._count -= 1
        self.owners[sequence.owner] -= 1
        if not self.owners[sequence.owner]:
            del self.owners[sequence.owner]

    def check_integrity(self) -> None:
        """Raise AssertionError unless every sequence is in one place, its own."""
        every = list(self)
        assert len(every) == len(set(every)) == self._count, "a sequence waits twice, or is not counted"
        assert self.owners == Counter(sequence.owner for sequence in every)
        for generates, queues in ((True, self._generating), (False, self._one_step)):
            for adapter, queue in queues.items():
                queue.check_integrity()
                assert queue.adapter == adapter
                for sequence in queue:
                    assert (sequence.adapter, sequence.generates) == (adapter, generates)
                    assert sequence.version is queue.version

    def _queues_for(self, sequence: Sequence) -> dict[str | None, Queue]:
        return self._generating if sequence.generates else self._one_step

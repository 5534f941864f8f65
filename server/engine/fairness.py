"""Fairness between adapters: how much each was served, whose turn it is, and who must make room for whom.

A virtual token counter for each adapter, after Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024).
There the smallest counter always goes first; here adapters on the device do, while they are not more than a bound
ahead of anybody who waits, so that slots are not rewritten for every step. Knows nothing of pages, places or budgets.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, KeysView
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, nlargest
from math import inf

from adapters.version import AdapterVersion
from server.engine.waiting import Queue

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2
"""What a token costs, as in the paper, section 5.1: outputs are computed one a step, prompts many at once."""

MAX_IDLE_COUNTERS = 4096

ON_DEVICE, IN_HOST, ELSEWHERE = 0, 1, 2
"""Where an adapter lies, in the order of admission."""


class VirtualCounters:
    """Weighted tokens that each adapter was served, the base model (None) among them.

    An adapter is active from its first sequence's arrival to its last one's end. One that becomes active is lifted to
    the smallest counter of those that are, so that nobody saves up what he did not ask for; and to less than the bound
    below the largest. The paper's clients are few and stay. Here new adapters may come without end, each for one
    request: were they all lifted to the smallest counter, whoever was served before would never have his turn again.
    """

    def __init__(self, bound: int, max_idle: int = MAX_IDLE_COUNTERS) -> None:
        """bound: what counts as a difference, in weighted tokens."""
        self._bound = bound
        self._active: dict[str | None, int] = {}
        self._users: dict[str | None, int] = {}
        self._idle: dict[str | None, int] = {}
        self._max_idle = max_idle
        self._last_floor = 0

    def __getitem__(self, adapter: str | None) -> int:
        """Of an active adapter."""
        return self._active[adapter]

    @property
    def active(self) -> KeysView[str | None]:
        return self._active.keys()

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def floor(self) -> int:
        """The smallest counter of the active; when there are none, that of the last one that was. Never falls."""
        return min(self._active.values(), default=self._last_floor)

    @property
    def highest(self) -> int:
        """The largest counter of the active."""
        return max(self._active.values(), default=0)

    def enter(self, adapter: str | None) -> None:
        """One more sequence of it waits or runs."""
        if adapter not in self._active:
            lift = max(self.floor, self.highest - self._bound // 2)
            self._active[adapter] = max(self._idle.pop(adapter, 0), lift)
            self._users[adapter] = 0
        self._users[adapter] += 1

    def leave(self, adapter: str | None) -> None:
        """One of its sequences has ended."""
        self._users[adapter] -= 1
        if self._users[adapter]:
            return
        del self._users[adapter]
        self._last_floor = self.floor
        self._idle[adapter] = self._active.pop(adapter)
        if len(self._idle) > self._max_idle:
            self._forget()

    def charge(self, adapter: str | None, tokens: int) -> None:
        """An active adapter was served so many weighted tokens."""
        self._active[adapter] += tokens

    def check_integrity(self, users: dict[str | None, int]) -> None:
        """Raise AssertionError unless the active are just those of `users`, with as many sequences."""
        assert self._users == users, (self._users, users)
        assert self._active.keys() == users.keys()
        assert not self._active.keys() & self._idle.keys()
        assert len(self._idle) <= self._max_idle
        assert self.floor >= self._last_floor

    def _forget(self) -> None:
        """Drop what a lift would give all the same; then the lowest, a quarter of all so that this is seldom done."""
        floor = self.floor
        above = ((counter, adapter) for adapter, counter in self._idle.items() if counter > floor)
        kept = nlargest(self._max_idle * 3 // 4, above, key=lambda pair: pair[0])
        self._idle = {adapter: counter for counter, adapter in kept}


class Claims:
    """Who was refused in one step, and who is held back for it.

    While an adapter that lies in host memory finds no slot, none that is ahead of it by more than the bound is
    admitted: their sequences end, and a slot becomes free. One that is not in host memory may wait for room there,
    which an adapter gives once nobody runs it; for that, those ahead of it are admitted only when nobody runs them, so
    that they stand still once and need not wait for a disk.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.no_slot = False
        """No slot can be had in this step any more."""
        self._slot_limit = self._load_limit = inf

    def refused(self, version: AdapterVersion, counter: int) -> None:
        """It found no slot, or is not in host memory."""
        if version.in_host:
            self.no_slot = True
            self._slot_limit = min(self._slot_limit, counter + self.bound)
        else:
            self._load_limit = min(self._load_limit, counter + self.bound)

    def holds_back(self, counter: int, was_running: bool) -> bool:
        """Whether an adapter with this counter must make room; `was_running`: when the step began."""
        return counter > self._slot_limit or (was_running and counter > self._load_limit)


@dataclass(eq=False, slots=True)
class Turn:
    """One queue in one step."""

    queue: Queue
    tier: int
    """Where its adapter lay when the step began."""
    counter: int
    """Its adapter's, with what was admitted in this step."""
    running: bool
    """Whether its adapter had users when the step began."""
    taken: int = 0
    """Sequences of it that were admitted in this step."""


class Turns:
    """In which order queues are admitted in one step: a heap, one entry for each queue.

    Whoever is ahead of another by more than the bound goes after him: the counters are cut into bands no wider than
    the bound, each from the smallest counter that is left, and lower bands go first. In a band lower priorities go
    first; of one priority what is on the device, then what is in host memory, then the rest; of these, one sequence of
    each, then the next of each; of the same, who came first. Prompts count as they are admitted, so that nobody takes
    all places of a step.
    """

    def __init__(self, queues: Iterable[Queue], counters: VirtualCounters, claims: Claims) -> None:
        self.failed: list[AdapterVersion] = []
        """Those that could not be read."""
        self._claims = claims
        self._slots_gone = False
        turns = []
        for queue in queues:
            version = queue.version
            tier = _tier(version)
            if tier == ELSEWHERE and version is not None and version.failure is not None:
                self.failed.append(version)
                continue
            running = tier == ON_DEVICE and version is not None and version.slot_users > 0
            turns.append(Turn(queue, tier, counters[queue.adapter], running))
        self._bands: list[int] = []
        """The largest counter in each."""
        for counter in sorted({turn.counter for turn in turns}):
            if not self._bands or counter > self._bands[-1]:
                self._bands.append(counter + claims.bound)
        self._heap = [self._entry(turn) for turn in turns]
        heapify(self._heap)

    def pop(self) -> Turn | None:
        """Whose turn it is; None when nobody is left that may be admitted in this step."""
        if self._claims.no_slot and not self._slots_gone:
            self._drop_slotless()
        while self._heap:
            turn = heappop(self._heap)[-1]
            if turn.queue.version is None or not self._claims.holds_back(turn.counter, turn.running):
                return turn
        return None

    def again(self, turn: Turn, cost: int) -> None:
        """Its first sequence, of this cost, was admitted; the next one has its turn when that has been counted."""
        if turn.queue:
            turn.counter += cost
            turn.taken += 1
            heappush(self._heap, self._entry(turn))

    def drop_generating(self) -> None:
        """No sequence that generates can be admitted in this step any more."""
        self._keep(lambda turn: not turn.queue.first.generates)

    def _drop_slotless(self) -> None:
        """Refuse all at once that lie in host memory and would need a slot."""
        self._slots_gone = True
        for entry in self._heap:
            version = entry[-1].queue.version
            if version is not None and _tier(version) == IN_HOST:
                self._claims.refused(version, entry[-1].counter)
        self._keep(lambda turn: _tier(turn.queue.version) != IN_HOST)

    def _keep(self, wanted: Callable[[Turn], bool]) -> None:
        self._heap = [entry for entry in self._heap if wanted(entry[-1])]
        heapify(self._heap)

    def _entry(self, turn: Turn) -> tuple[int, int, int, int, int, Turn]:
        priority, arrival = turn.queue.rank
        return bisect_left(self._bands, turn.counter), priority, turn.tier, turn.taken, arrival, turn


def _tier(version: AdapterVersion | None) -> int:
    """Where it lies; the base model needs no slot."""
    if version is None or version.slot is not None:
        return ON_DEVICE
    return IN_HOST if version.in_host else ELSEWHERE

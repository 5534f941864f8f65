"""A scheduler without tensors, a registry whose adapters come into host memory late, and a driver of steps."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from adapters.adapter import Adapter, AdapterInfo
from adapters.config import LoraConfig
from adapters.host_tier import HostLimits
from adapters.layout import GENERATING, layout_of
from adapters.registry import AdapterRegistry
from adapters.slots import LoraSlots
from adapters.version import AdapterVersion
from server.engine.block_manager import BlockManager
from server.engine.fairness import VirtualCounters
from server.engine.request import (
    CAUSAL_LM,
    SEQ_2_SEQ_LM,
    Batch,
    RequestOutput,
    RowResult,
    SamplingParams,
    Sequence,
)
from server.engine.scheduler import Scheduler

EOS = 0
PAGE = 4


class CountingSlots(LoraSlots):
    """Counts what is written."""

    writes = 0

    def write(self, slot: int, adapter: Adapter) -> None:
        self.writes += 1
        super().write(slot, adapter)


class LateRegistry(AdapterRegistry):
    """Some versions are not in host memory when they are asked for, and come after some askings, or never."""

    def __init__(self, slots: CountingSlots, cold: float, broken: float, seed: int) -> None:
        super().__init__(slots, HostLimits(64, 1 << 30, 1))
        self.slots = slots
        self.urgent: list[str] = []
        self._cold = cold
        self._broken = broken
        self._rng = random.Random(seed)
        self._adapters: dict[str, Adapter] = {}
        self._delays: dict[str, int] = {}

    def acquire(self, name: str) -> AdapterVersion:
        version = self.get(name)
        assert isinstance(version, AdapterVersion)
        self.hold(version)
        if version.slot_users == 0 and version.in_host and self._rng.random() < self._cold:
            self.cool(version, self._rng.randint(0, 30))
        return version

    def cool(self, version: AdapterVersion, delay: int) -> None:
        """Take it out of host memory; it comes when it has been asked for `delay` times more."""
        assert version.adapter is not None
        self._adapters[version.digest] = version.adapter
        self._delays[version.digest] = delay
        self.device.leave(version)
        self.host.drop(version)
        version.failure = None

    def acquire_slot(self, version: AdapterVersion, urgent: bool = False) -> int | None:
        if version.in_host:
            return super().acquire_slot(version, urgent)
        if urgent:
            self.urgent.append(version.digest)
        self._delays[version.digest] -= 1
        if self._delays[version.digest] < 0:
            if self._rng.random() < self._broken:
                version.failure = "its files are damaged"
            else:
                version.failure = None
                self.host.admit(version, self._adapters[version.digest])
        return None


class RecordingCounters(VirtualCounters):
    """Keeps what was charged."""

    def __init__(self, bound: int) -> None:
        super().__init__(bound)
        self.charged: Counter[str | None] = Counter()

    def charge(self, adapter: str | None, tokens: int) -> None:
        super().charge(adapter, tokens)
        self.charged[adapter] += tokens


def make_scheduler(
    num_blocks: int = 64,
    max_loras: int = 2,
    max_num_seqs: int = 8,
    budget: int = 32,
    fairness_tokens: int = 512,
    cold: float = 0.0,
    broken: float = 0.0,
    seed: int = 0,
    names: Iterable[str] = "abcdefgh",
) -> Scheduler:
    """With adapters, which hold no weights; the name is the digest too.

    cold, broken: how probable it is that one is not in host memory when it is asked for, and that it cannot be read.
    """
    body = nn.Sequential(nn.Linear(4, 4))
    slots = CountingSlots(body, layout_of(body, "model", 4, True), max_loras)
    registry = LateRegistry(slots, cold, broken, seed)
    config = LoraConfig(rank=4, alpha=4, target_modules=("0",))
    for name in names:
        registry.put(name, Adapter(AdapterInfo(name, CAUSAL_LM, 4, (), "", 1), config, {}, None))
    return Scheduler(BlockManager(num_blocks, PAGE), registry, max_num_seqs, budget, fairness_tokens)


def registry_of(scheduler: Scheduler) -> LateRegistry:
    assert isinstance(scheduler.registry, LateRegistry)
    return scheduler.registry


def holders_of(scheduler: Scheduler) -> int:
    """Who holds any adapter."""
    return sum(version.holders for _, version in scheduler.registry.list() if isinstance(version, AdapterVersion))


@dataclass
class _Before:
    """What the rules between adapters are judged by, as a step found it."""

    counters: dict[str | None, int]
    waiting: list[Sequence]
    """But for those that were preempted: they need nobody's turn."""
    users: dict[AdapterVersion, int]
    in_host: set[AdapterVersion]


class Driver:
    """Feeds a scheduler, runs its steps, and checks each."""

    def __init__(self, scheduler: Scheduler, tokens: Callable[[Sequence], int] = lambda _: 5) -> None:
        self.scheduler = scheduler
        self.outputs: list[RequestOutput] = []
        self._counters = scheduler.counters = RecordingCounters(scheduler.fairness_tokens)
        self._tokens = tokens
        self._count = 0

    @property
    def charged(self) -> Counter[str | None]:
        """Weighted tokens by adapter, since the start."""
        return self._counters.charged

    def add(
        self, prompt: int, name: str | None = None, task: str = CAUSAL_LM, priority: int = 0, **params: Any
    ) -> Sequence:
        """prompt: tokens of it; of SEQ_2_SEQ_LM, of the source."""
        version = self.scheduler.registry.acquire(name) if name else None
        sampling = SamplingParams(**{"max_tokens": 3, **params}) if task in GENERATING else None
        source = [1] * prompt if task == SEQ_2_SEQ_LM else []
        sequence = Sequence(
            self._count, task, [2] if source else [1] * prompt, version, sampling, frozenset([EOS]),
            priority=priority, owner=name or "", source_ids=source,
        )  # fmt: skip
        self._count += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Batch:
        before = self._look()
        batch = self.scheduler.schedule()
        self._check(batch, before)
        results = {
            item.sequence.id: RowResult(token_id=self._tokens(item.sequence) if item.sequence.generates else None)
            for item in batch.items
            if item.completes
        }
        self.outputs += [*self.scheduler.refused(), *self.scheduler.postprocess(batch, results)]
        self.scheduler.check_integrity()
        return batch

    def drain(self, limit: int = 4000) -> None:
        for _ in range(limit):
            if not self.scheduler.unfinished():
                return
            loading = any(s.version and not s.version.in_host for s in self.scheduler.waiting)
            assert self.step().items or loading, "nothing can run, although sequences wait"
        raise AssertionError("the schedule does not end")

    def _look(self) -> _Before:
        scheduler = self.scheduler
        waiting = [s for s in scheduler.waiting if s not in scheduler.waiting.preempted]
        versions = [version for _, version in scheduler.registry.list() if isinstance(version, AdapterVersion)]
        return _Before(
            counters={adapter: scheduler.counters[adapter] for adapter in scheduler.counters.active},
            waiting=waiting,
            users={version: version.slot_users for version in versions},
            in_host={version for version in versions if version.in_host},
        )

    def _check(self, batch: Batch, before: _Before) -> None:
        """The budget holds; and nobody was admitted who is too far ahead of one that still waits for a slot."""
        prompts = sum(item.count > 1 or item.encodes for item in batch.items)  # what cannot be cut may be over it
        assert batch.num_tokens <= self.scheduler.max_num_batched_tokens or prompts == 1
        assert all(item.count > 0 for item in batch.items)
        for item in batch.items:
            sequence = item.sequence
            assert item.encodes == (bool(sequence.source_ids) and not sequence.encoded), "once, and before its target"
            assert len(sequence.pages) * PAGE >= len(sequence.source_ids)
        taken = {item.sequence for item in batch.items}
        admitted = [s for s in before.waiting if s in taken and s.version and s.generates]
        slotless = [
            s
            for s in before.waiting
            if s not in taken and s.version and s.version.slot is None and not s.version.failure
        ]
        for winner in admitted:
            for loser in slotless:
                ahead = before.counters[winner.adapter] - before.counters[loser.adapter]
                if ahead <= self.scheduler.fairness_tokens:
                    continue
                assert winner.version
                assert loser.version not in before.in_host, f"{winner.adapter} overtook {loser.adapter} by {ahead}"
                assert before.users[winner.version] == 0, "it may go on beside a load only after a standstill"

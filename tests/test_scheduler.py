"""The scheduler by itself: no tensors, results made up. Random schedules end every sequence exactly once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from adapters.adapter import Adapter
from adapters.config import LoraConfig
from adapters.layout import layout_of
from adapters.registry import AdapterRegistry
from adapters.slots import LoraSlots
from server.engine.block_manager import BlockManager
from server.engine.request import (
    CAUSAL_LM,
    SEQ_CLS,
    Batch,
    RequestOutput,
    RowResult,
    SamplingParams,
    Sequence,
    SequenceStatus,
)
from server.engine.scheduler import MAX_PASSED_OVER, Scheduler, finish_reason

EOS = 0
PAGE = 4


def make_scheduler(num_blocks: int = 64, max_loras: int = 2, max_num_seqs: int = 8, budget: int = 32) -> Scheduler:
    """With adapters a, b, c, d, e that hold no weights."""
    body = nn.Sequential(nn.Linear(4, 4))
    slots = LoraSlots(body, layout_of(body, "model", 4, True), max_loras)
    registry = AdapterRegistry(slots, max_cpu_loras=16)
    config = LoraConfig(rank=4, alpha=4, target_modules=("0",))
    for name in "abcde":
        registry.put(name, Adapter(name, config, CAUSAL_LM, {}, None, (), "", 1))
    return Scheduler(BlockManager(num_blocks, PAGE), registry, max_num_seqs, budget)


class Driver:
    """Feeds a scheduler and runs its steps."""

    def __init__(self, scheduler: Scheduler, tokens: Callable[[Sequence], int] = lambda _: 5) -> None:
        self.scheduler = scheduler
        self.outputs: list[RequestOutput] = []
        self._tokens = tokens
        self._count = 0

    def add(self, prompt: int, name: str | None = None, task: str = CAUSAL_LM, **params: Any) -> Sequence:
        version = self.scheduler.registry.acquire(name) if name else None
        sampling = SamplingParams(**{"max_tokens": 3, **params}) if task == CAUSAL_LM else None
        sequence = Sequence(self._count, task, [1] * prompt, version, sampling, frozenset([EOS]))
        self._count += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Batch:
        batch = self.scheduler.schedule()
        prompts = sum(item.count > 1 for item in batch.items)  # one without a cache may be over the budget
        assert batch.num_tokens <= self.scheduler.max_num_batched_tokens or prompts == 1
        results = {
            item.sequence.id: RowResult(token_id=self._tokens(item.sequence) if item.sequence.generates else None)
            for item in batch.items
            if item.completes
        }
        self.outputs += self.scheduler.postprocess(batch, results)
        self.scheduler.check_integrity()
        return batch

    def drain(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.scheduler.unfinished():
                return
            assert self.step().items, "nothing can run, although sequences wait"
        raise AssertionError("the schedule does not end")


def ids(batch: Batch) -> set[int]:
    return {item.sequence.id for item in batch.items}


def test_a_prompt_is_cut_into_chunks_beside_decodes() -> None:
    driver = Driver(make_scheduler(budget=10))
    first = driver.add(3, max_tokens=10)
    driver.step()
    long = driver.add(25)
    counts = []
    while not long.output_ids:
        batch = driver.step()
        assert first.id in ids(batch), "decode goes first"
        counts += [item.count for item in batch.items if item.sequence is long]
    assert counts == [9, 9, 7]


def test_batches_are_ordered_by_slot() -> None:
    driver = Driver(make_scheduler(max_loras=4))
    for name in ("a", "b", None, "a", "c", "b"):
        driver.add(3, name)
    slots = [item.slot for item in driver.step().items]
    assert slots == sorted(slots)
    assert len(slots) == 6


def test_a_waiting_adapter_does_not_block_others() -> None:
    driver = Driver(make_scheduler(max_loras=1))
    driver.add(3, "a", max_tokens=20)
    waits = driver.add(3, "b")
    free = driver.add(3)
    also_a = driver.add(3, "a")
    driver.step()
    assert waits in driver.scheduler.waiting
    assert {free.status, also_a.status} == {SequenceStatus.RUNNING}
    driver.drain()
    assert waits.status is SequenceStatus.FINISHED


def test_nobody_waits_for_a_slot_for_ever() -> None:
    """A popular adapter would hold the only slot for ever, since its requests overlap."""
    driver = Driver(make_scheduler(max_loras=1))
    driver.add(2, "a", max_tokens=3)
    driver.step()
    waits = driver.add(2, "b", max_tokens=1)
    steps = 0
    while waits.status is SequenceStatus.WAITING:
        driver.add(2, "a", max_tokens=3)
        driver.step()
        steps += 1
        assert steps < MAX_PASSED_OVER + 10
    assert steps >= MAX_PASSED_OVER


def test_the_youngest_is_preempted_and_ends_all_the_same() -> None:
    driver = Driver(make_scheduler(num_blocks=6))
    old = driver.add(8, max_tokens=12)
    young = driver.add(8, max_tokens=12)
    driver.drain()
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert len(old.output_ids) == len(young.output_ids) == 12
    assert [output.finish_reason for output in driver.outputs if output.finish_reason] == ["length", "length"]


def test_one_shot_tasks_need_no_pages_and_no_place_among_the_running() -> None:
    scheduler = make_scheduler(num_blocks=2, max_num_seqs=1, budget=100)
    driver = Driver(scheduler)
    driver.add(7)
    for _ in range(5):
        driver.add(9, task=SEQ_CLS)
    assert len(driver.step().items) == 6


def test_a_one_shot_prompt_longer_than_the_budget_runs_as_the_only_prompt() -> None:
    driver = Driver(make_scheduler(budget=10))
    driver.add(8, task=SEQ_CLS)
    long = driver.add(50, task=SEQ_CLS)
    driver.add(8, task=SEQ_CLS)
    assert ids(driver.step()) == {0}
    assert ids(driver.step()) == {long.id}
    assert ids(driver.step()) == {2}


@pytest.mark.parametrize("when", ["waiting", "running", "ended"])
def test_a_sequence_ends_once(when: str) -> None:
    driver = Driver(make_scheduler())
    sequence = driver.add(5, "a")
    if when == "running":
        driver.step()
    if when == "ended":
        driver.drain()
    assert driver.scheduler.end(sequence, SequenceStatus.ABORTED) == (when != "ended")
    assert not driver.scheduler.end(sequence, SequenceStatus.ABORTED)
    driver.scheduler.check_integrity()
    assert driver.scheduler.registry.get("a").holders == 0


@pytest.mark.parametrize(
    ("params", "tokens", "reason"),
    [
        ({}, [5], None),
        ({}, [5, 5, 5], "length"),
        ({}, [5, EOS], "stop"),
        ({"ignore_eos": True}, [EOS], None),
        ({"stop_token_ids": frozenset([5])}, [5], "stop"),
        ({"stop_token_ids": frozenset([5]), "ignore_eos": True}, [5], "stop"),
        ({"min_tokens": 2}, [EOS], None),
        ({"min_tokens": 2}, [4, EOS], "stop"),
        ({"max_tokens": 1}, [EOS], "stop"),
    ],
)
def test_finish_reasons(params: dict[str, Any], tokens: list[int], reason: str | None) -> None:
    sequence = Sequence(0, CAUSAL_LM, [1], None, SamplingParams(**{"max_tokens": 3, **params}), frozenset([EOS]))
    sequence.output_ids = tokens
    assert finish_reason(sequence) == reason


@pytest.mark.parametrize("seed", range(12))
def test_random_schedules_end_every_sequence_exactly_once(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(
        num_blocks=rng.choice([16, 24, 64]), max_loras=rng.choice([1, 2, 4]), max_num_seqs=rng.choice([1, 4, 16]),
        budget=rng.choice([3, 16, 64]),
    )  # fmt: skip
    driver = Driver(scheduler, lambda _: rng.choice([EOS, 5, 5, 5, 5, 5]))
    every: list[Sequence] = []
    aborted = set()
    for _ in range(150):
        if rng.random() < 0.4:
            task = rng.choice([CAUSAL_LM, CAUSAL_LM, SEQ_CLS])
            name = rng.choice([None, *"abcde"])
            every.append(driver.add(rng.randint(1, 40), name, task, max_tokens=rng.randint(1, 20)))
        if every and rng.random() < 0.1 and scheduler.end(victim := rng.choice(every), SequenceStatus.ABORTED):
            aborted.add(victim.id)
        driver.step()
    driver.drain()
    ended = Counter(output.sequence.id for output in driver.outputs if output.finish_reason)
    assert set(ended) == {s.id for s in every} - aborted
    assert set(ended.values()) <= {1}
    assert all(s.status.ended for s in every)
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    assert all(version.holders == 0 for _, version in scheduler.registry.list())

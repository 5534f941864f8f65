"""The scheduler by itself: no tensors, results made up. Random schedules end every sequence exactly once.

Who goes before whom among adapters is in test_fairness.py.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from server.engine.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT
from server.engine.request import (
    CAUSAL_LM,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    Batch,
    SamplingParams,
    Sequence,
    SequenceStatus,
)
from server.engine.scheduler import finish_reason
from tests.scheduler_support import EOS, PAGE, Driver, holders_of, make_scheduler


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


def test_the_youngest_is_preempted_and_ends_all_the_same() -> None:
    driver = Driver(make_scheduler(num_blocks=6))
    old = driver.add(8, max_tokens=12)
    young = driver.add(8, max_tokens=12)
    driver.drain()
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert len(old.output_ids) == len(young.output_ids) == 12
    assert [output.finish_reason for output in driver.outputs if output.finish_reason] == ["length", "length"]


def test_the_least_urgent_is_preempted_first() -> None:
    driver = Driver(make_scheduler(num_blocks=6))
    old = driver.add(8, max_tokens=12, priority=1)
    young = driver.add(8, max_tokens=12)
    driver.drain()
    assert (old.preemptions, young.preemptions) == (1, 0)
    assert len(old.output_ids) == len(young.output_ids) == 12


@pytest.mark.parametrize("task", [CAUSAL_LM, SEQ_CLS])
def test_lower_priorities_of_one_adapter_go_first(task: str) -> None:
    driver = Driver(make_scheduler(max_num_seqs=1, budget=4))
    late, first, second, urgent = (driver.add(4, "a", task, p, max_tokens=1) for p in (7, 0, 0, -3))
    driver.drain()
    assert [output.sequence for output in driver.outputs] == [urgent, first, second, late]


def test_priority_goes_between_adapters_until_fairness_is_at_stake() -> None:
    """The one that is asked for urgently all the time is served first, but not alone."""
    driver = Driver(make_scheduler(max_loras=1, max_num_seqs=1, fairness_tokens=40))
    for _ in range(30):
        driver.add(8, "a", max_tokens=1)
        driver.add(8, "b", priority=-1, max_tokens=1)
    driver.drain()
    order = "".join(output.sequence.owner for output in driver.outputs)
    assert order.startswith("bbbb"), "urgent ones first, although others came before"
    assert "a" in order[:12], "no more than the bound"
    assert order.count("a") == order.count("b") == 30


def test_one_shot_tasks_need_no_pages_and_no_place_among_the_running() -> None:
    scheduler = make_scheduler(num_blocks=2, max_num_seqs=1, budget=100)
    driver = Driver(scheduler)
    driver.add(7)
    for _ in range(5):
        driver.add(9, task=SEQ_CLS)
    assert len(driver.step().items) == 6
    late = driver.add(9, task=SEQ_CLS)
    assert late.id in ids(driver.step()), "the one that generates has the only place, and waits for nobody"


def test_a_one_shot_prompt_longer_than_the_budget_runs_as_the_only_prompt() -> None:
    driver = Driver(make_scheduler(budget=10))
    driver.add(8, task=SEQ_CLS)
    long = driver.add(50, task=SEQ_CLS)
    driver.add(8, task=SEQ_CLS)
    assert ids(driver.step()) == {0}
    assert ids(driver.step()) == {long.id}
    assert ids(driver.step()) == {2}


def test_a_source_is_encoded_whole_beside_decodes() -> None:
    driver = Driver(make_scheduler(budget=10))
    first = driver.add(3, max_tokens=20)
    driver.step()
    short, long, after = (driver.add(n, task=SEQ_2_SEQ_LM, max_tokens=2) for n in (8, 50, 4))
    steps = [driver.step() for _ in range(4)]
    assert all(first.id in ids(batch) for batch in steps), "decode goes first"
    encoded = [[item.sequence for item in batch.items if item.encodes] for batch in steps]
    assert encoded == [[short], [long], [after], []]
    assert [batch.num_tokens for batch in steps[:3]] == [1 + 8 + 1, 2 + 50 + 1, 2 + 4 + 1]


def test_a_sequence_has_pages_for_its_source_and_grows_past_it() -> None:
    driver = Driver(make_scheduler())
    sequence = driver.add(3 * PAGE - 1, task=SEQ_2_SEQ_LM, max_tokens=5 * PAGE)
    driver.step()
    assert len(sequence.pages) == 3
    pages = driver.scheduler.blocks.num_free
    for _ in range(3 * PAGE - 1):
        assert driver.step().fresh_pages == ()
    assert driver.scheduler.blocks.num_free == pages
    assert len(driver.step().fresh_pages) == 1
    driver.drain()
    assert len(sequence.output_ids) == 5 * PAGE


def test_a_preempted_source_is_encoded_again() -> None:
    driver = Driver(make_scheduler(num_blocks=6))
    old, young = (driver.add(8, "a", task=SEQ_2_SEQ_LM, max_tokens=15) for _ in range(2))
    batches = []
    while driver.scheduler.unfinished():
        batches.append(driver.step())
    encoded = [item.sequence for batch in batches for item in batch.items if item.encodes]
    assert encoded == [old, young, young]
    assert young.preemptions == 1
    assert driver.charged["a"] == 2 * (8 * PROMPT_WEIGHT + 15 * OUTPUT_WEIGHT), "what is computed again is free"


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
    assert holders_of(driver.scheduler) == 0


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


def test_what_is_computed_again_is_charged_once() -> None:
    driver = Driver(make_scheduler(num_blocks=6))
    sequences = [driver.add(8, max_tokens=12) for _ in range(2)]
    driver.drain()
    assert sum(s.preemptions for s in sequences) == 1
    assert driver.charged == {None: 2 * (8 + 2 * 12)}


def test_a_one_step_task_is_charged_its_prompt() -> None:
    driver = Driver(make_scheduler())
    driver.add(9, "a", task=SEQ_CLS)
    driver.drain()
    assert driver.charged == {"a": 9}


def test_what_waits_for_an_adapter_that_cannot_be_read_fails() -> None:
    driver = Driver(make_scheduler(cold=1.0, broken=1.0))
    failing = [driver.add(3, "a"), driver.add(3, "a", task=SEQ_CLS)]
    others = [driver.add(3), driver.add(3, task=SEQ_CLS)]
    driver.drain()
    assert [s.status for s in failing] == [SequenceStatus.FAILED] * 2
    assert [s.status for s in others] == [SequenceStatus.FINISHED] * 2
    errors = {output.sequence.id: output.error for output in driver.outputs if output.finish_reason == "error"}
    assert errors == {s.id: "its files are damaged" for s in failing}
    assert holders_of(driver.scheduler) == 0


def test_what_failed_may_still_be_aborted_before_it_is_told() -> None:
    driver = Driver(make_scheduler(cold=1.0, broken=1.0))
    sequence = driver.add(3, "a")
    while not sequence.version or not sequence.version.failure:
        driver.scheduler.schedule()
    assert sequence in driver.scheduler.unfinished(), "fail_all must still find it"
    assert driver.scheduler.end(sequence, SequenceStatus.ABORTED)
    assert driver.scheduler.refused() == []


def test_a_stream_of_new_adapters_leaves_a_turn_to_one_that_was_served_before() -> None:
    """One request each, more than can be served at once: whoever came first goes first all the same."""
    scheduler = make_scheduler(max_loras=1, fairness_tokens=5, names=[f"a{i}" for i in range(60)])
    driver = Driver(scheduler)
    new = iter(range(1, 60))
    driver.add(8, "a0", max_tokens=1)
    for _ in range(4):
        driver.add(8, f"a{next(new)}", max_tokens=1)
    driver.step()
    again = driver.add(8, "a0", max_tokens=1)
    for _ in range(50):
        if again.status.ended:
            break
        driver.add(8, f"a{next(new)}", max_tokens=1)
        driver.step()
    assert again.status is SequenceStatus.FINISHED


@pytest.mark.parametrize("generating", [CAUSAL_LM, SEQ_2_SEQ_LM])
@pytest.mark.parametrize("seed", range(24))
def test_random_schedules_end_every_sequence_exactly_once(seed: int, generating: str) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(
        num_blocks=rng.choice([16, 24, 64]), max_loras=rng.choice([1, 2, 4]), max_num_seqs=rng.choice([1, 4, 16]),
        budget=rng.choice([3, 16, 64]), fairness_tokens=rng.choice([1, 50, 2048]), cold=rng.choice([0.0, 0.3]),
        broken=rng.choice([0.0, 0.2]), seed=seed,
    )  # fmt: skip
    driver = Driver(scheduler, lambda _: rng.choice([EOS, 5, 5, 5, 5, 5]))
    every: list[Sequence] = []
    aborted = set()
    for _ in range(150):
        if rng.random() < 0.5:
            task = rng.choice([generating, generating, SEQ_CLS])
            name = rng.choice([None, *"abcdefgh"])
            priority = rng.choice([0, 0, 0, -1, 5])
            every.append(driver.add(rng.randint(1, 40), name, task, priority, max_tokens=rng.randint(1, 20)))
        if every and rng.random() < 0.1 and scheduler.end(victim := rng.choice(every), SequenceStatus.ABORTED):
            aborted.add(victim.id)
        driver.step()
    driver.drain()
    ended = Counter(output.sequence.id for output in driver.outputs if output.finish_reason)
    assert set(ended) == {s.id for s in every} - aborted
    assert set(ended.values()) <= {1}
    assert all(s.status.ended for s in every)
    assert len(scheduler.waiting) == 0
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    assert holders_of(scheduler) == 0
    assert not scheduler.counters.active
    assert all(s.num_charged == len(s.given) for s in every if s.status is SequenceStatus.FINISHED)
    expected: Counter[str | None] = Counter()
    for s in every:
        expected[s.adapter] += s.num_charged + 2 * len(s.output_ids)
    assert driver.charged == +expected

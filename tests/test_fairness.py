"""Between adapters: counters, the order of admission, and what the scheduler makes of both."""

from __future__ import annotations

from collections import Counter

import pytest

from adapters.adapter import Adapter, AdapterInfo
from adapters.config import LoraConfig
from adapters.version import AdapterVersion
from server.engine.fairness import Claims, Turns, VirtualCounters
from server.engine.request import CAUSAL_LM, SEQ_CLS, Batch, SamplingParams, Sequence, SequenceStatus
from server.engine.waiting import Waiting
from tests.scheduler_support import Driver, make_scheduler, registry_of

BOUND = 100


def test_who_comes_back_is_lifted_to_the_smallest_of_the_active() -> None:
    counters = VirtualCounters(bound=BOUND)
    for adapter in ("busy", "busier", "late"):
        counters.enter(adapter)
    counters.leave("late")
    counters.charge("busy", 50)
    counters.charge("busier", 90)
    counters.enter("late")
    assert counters["late"] == 50, "nobody saves up what he did not ask for"


def test_who_is_new_is_lifted_to_less_than_the_bound_below_the_largest() -> None:
    """Else a stream of new adapters, each for one request, would leave no turn to one that was served before."""
    counters = VirtualCounters(bound=BOUND)
    counters.enter("waits long")
    counters.enter("served")
    counters.charge("served", 1000)
    counters.enter("new")
    assert counters["new"] == 1000 - BOUND // 2
    assert counters["waits long"] == 0


def test_who_comes_back_keeps_what_he_was_served_beyond_others() -> None:
    counters = VirtualCounters(bound=BOUND)
    counters.enter("slow")
    counters.enter("greedy")
    counters.charge("greedy", 70)
    counters.leave("greedy")
    counters.enter("greedy")
    assert counters["greedy"] == 70


def test_when_nobody_is_active_the_last_one_counts() -> None:
    counters = VirtualCounters(bound=BOUND)
    counters.enter("only")
    counters.charge("only", 1000)
    counters.leave("only")
    counters.enter("new")
    counters.enter("only")
    assert counters["new"] == counters["only"] == 1000


def test_an_adapter_is_active_until_its_last_sequence_ends() -> None:
    counters = VirtualCounters(bound=BOUND)
    counters.enter(None)
    counters.enter(None)
    counters.charge(None, 5)
    counters.leave(None)
    assert counters[None] == 5
    counters.check_integrity({None: 1})
    counters.leave(None)
    assert not counters.active


def test_idle_counters_are_bounded_and_the_highest_stay() -> None:
    counters = VirtualCounters(bound=BOUND, max_idle=8)
    counters.enter("floor")
    for i in range(100):
        counters.enter(f"idle-{i}")
        counters.charge(f"idle-{i}", i)
        counters.leave(f"idle-{i}")
        counters.check_integrity({"floor": 1})
    assert counters.num_idle <= 8
    counters.enter("idle-99")
    assert counters["idle-99"] == 99
    counters.enter("idle-1")
    assert counters["idle-1"] == 99 - BOUND // 2, "forgotten, and lifted"


def test_idle_counters_that_a_lift_would_give_are_forgotten_first() -> None:
    counters = VirtualCounters(bound=BOUND, max_idle=4)
    counters.enter("floor")
    for i in range(4):
        counters.enter(f"low-{i}")
        counters.leave(f"low-{i}")
    counters.charge("floor", 10)
    counters.enter("high")
    counters.charge("high", 1)
    counters.leave("high")
    assert counters.num_idle == 1
    counters.enter("high")
    assert counters["high"] == 11


def version(digest: str, tier: str) -> AdapterVersion:
    """One that lies on `disk`, in `host` memory, or on the `device`."""
    info = AdapterInfo(digest, CAUSAL_LM, 4, (), "", 1)
    made = AdapterVersion(info, None)
    if tier != "disk":
        made.adapter = Adapter(info, LoraConfig(rank=4, alpha=4, target_modules=("0",)), {}, None)
    made.slot = 0 if tier == "device" else None
    assert made.tier == tier
    return made


def order(*queues: tuple[str, str, int, int], claims: Claims | None = None) -> str:
    """Who is admitted, one letter each; queues: (adapter, or `-` for the base; tier; counter; sequences)."""
    waiting, counters = Waiting(), VirtualCounters(bound=BOUND)
    for adapter, tier, counter, count in queues:
        held = None if adapter == "-" else version(adapter, tier)
        for _ in range(count):
            sequence = Sequence(0, CAUSAL_LM, [1] * 10, held, SamplingParams(max_tokens=1))
            waiting.add(sequence)
            if sequence.adapter not in counters.active:
                counters.enter(sequence.adapter)
                counters.charge(sequence.adapter, counter - counters[sequence.adapter])
    turns, admitted = Turns(waiting.queues(), counters, claims or Claims(BOUND)), ""
    while (turn := turns.pop()) is not None:
        admitted += turn.queue.adapter or "-"
        waiting.remove(turn.queue.first)
        turns.again(turn, 10)
    return admitted


@pytest.mark.parametrize(
    ("queues", "expected"),
    [
        ([("a", "device", 0, 1), ("b", "device", 0, 1)], "ab"),
        ([("a", "device", 1, 1), ("b", "device", 0, 1)], "ab"),
        ([("a", "disk", 0, 1), ("b", "host", 0, 1), ("c", "device", 0, 1), ("-", "", 0, 1)], "c-ba"),
        ([("a", "host", 0, 1), ("b", "device", BOUND, 1)], "ba"),
        ([("a", "host", 0, 1), ("b", "device", BOUND + 1, 1)], "ab"),
        ([("a", "disk", 0, 1), ("-", "", BOUND + 1, 1)], "a-"),
        # far ahead of one whose files are read for long: the device still goes first among the others
        ([("a", "disk", 0, 1), ("b", "host", 500, 1), ("c", "device", 560, 1)], "acb"),
        ([("a", "disk", 0, 1), ("b", "host", 500, 1), ("c", "device", 601, 1)], "abc"),
        # what is admitted counts at once
        ([("a", "device", 0, 4), ("b", "device", 0, 2), ("c", "device", 15, 1)], "abcabaa"),
        ([("a", "host", 0, 3), ("b", "host", 0, 3)], "ababab"),
        ([("a", "device", 95, 3), ("b", "host", 0, 1)], "abaa"),
    ],
)
def test_order_of_admission(queues: list[tuple[str, str, int, int]], expected: str) -> None:
    assert order(*queues) == expected


def test_who_is_ahead_of_one_without_a_slot_is_held_back() -> None:
    claims = Claims(BOUND)
    claims.refused(version("a", "host"), 50)
    claims.refused(version("b", "host"), 70)
    assert claims.no_slot
    assert claims.holds_back(151, was_running=False)
    assert not claims.holds_back(150, was_running=True)


def test_one_refusal_speaks_for_all_that_need_a_slot() -> None:
    """A sequence that was preempted was refused first, of an adapter that was served much."""
    claims = Claims(BOUND)
    claims.refused(version("a", "host"), 500)
    queues = [("b", "host", 0, 1), ("c", "device", BOUND, 1), ("d", "device", BOUND + 1, 1), ("-", "", 900, 1)]
    assert order(*queues, claims=claims) == "c-"


def test_who_is_ahead_of_one_that_is_read_stands_still_once() -> None:
    claims = Claims(BOUND)
    claims.refused(version("a", "disk"), 50)
    assert not claims.no_slot
    assert claims.holds_back(151, was_running=True)
    assert not claims.holds_back(151, was_running=False)


def test_waiting_finds_and_removes_each_sequence() -> None:
    waiting = Waiting()
    held = version("a", "host")
    made = [Sequence(i, task, [1], held, SamplingParams(1)) for i, task in enumerate([CAUSAL_LM, SEQ_CLS, CAUSAL_LM])]
    for sequence in made:
        waiting.add(sequence)
    for sequence in (made[2], made[0]):
        waiting.remove(sequence)
        waiting.put_back(sequence)
    waiting.check_integrity()
    assert list(waiting) == [made[0], made[2], made[1]], "who was preempted last, the oldest, is first"
    assert waiting.of("a") == list(waiting)
    assert len(waiting) == 3
    assert [queue.first for queue in waiting.queues(generating=False)] == [made[1]]
    for sequence in made:
        assert sequence in waiting
        waiting.remove(sequence)
        assert sequence not in waiting
        waiting.check_integrity()
    assert len(waiting) == 0
    assert not list(waiting.queues())


def test_waiting_counts_by_owner_and_orders_by_priority() -> None:
    waiting = Waiting()
    made = [
        Sequence(i, CAUSAL_LM, [1], None, SamplingParams(1), priority=priority, owner=owner)
        for i, (priority, owner) in enumerate([(0, "x"), (-1, "y"), (0, "y"), (-1, "x")])
    ]
    for sequence in made:
        waiting.add(sequence)
    assert list(waiting) == [made[1], made[3], made[0], made[2]]
    assert waiting.owners == {"x": 2, "y": 2}
    for sequence in (made[3], made[0]):
        waiting.remove(sequence)
        waiting.check_integrity()
    assert list(waiting) == [made[1], made[2]]
    assert waiting.owners == {"y": 2}


class Demand:
    """Keeps so many sequences of each adapter unfinished, so that its requests overlap for ever."""

    def __init__(self, driver: Driver, names: str, overlap: int, prompt: int = 2, max_tokens: int = 7) -> None:
        self.cost = overlap * (prompt + 2 * max_tokens)
        """Of all that one adapter can have running."""
        self._driver = driver
        self._names = names
        self._overlap = overlap
        self._prompt, self._max_tokens = prompt, max_tokens

    def step(self) -> Batch:
        there = Counter(s.adapter for s in self._driver.scheduler.unfinished())
        for name in self._names:
            if there[name] < self._overlap:  # one a step, so that they end one after the other
                self._driver.add(self._prompt, name, max_tokens=self._max_tokens)
        return self._driver.step()


@pytest.mark.parametrize("bound", [1, 60, 500])
@pytest.mark.parametrize("task", [CAUSAL_LM, SEQ_CLS])
@pytest.mark.parametrize(("max_loras", "hot"), [(1, "a"), (2, "ab"), (1, "ab"), (2, "abc")])
def test_the_wait_for_a_slot_is_bounded(max_loras: int, hot: str, task: str, bound: int) -> None:
    """Any hot adapter is served at most the bound more, and what runs of it then, while a cold one waits.

    More than the cold one was, that is: one that is behind it may catch up before.
    """
    driver = Driver(make_scheduler(max_loras=max_loras, max_num_seqs=16, fairness_tokens=bound))
    demand = Demand(driver, hot, overlap=3)
    for _ in range(40):
        demand.step()
    waits = driver.add(2, "h", task, max_tokens=1)
    counters = driver.scheduler.counters
    before = driver.charged.copy()
    behind = {a: max(counters["h"] - counters[a], 0) if a in counters.active else 0 for a in hot}
    assert max(behind.values()) <= bound + demand.cost
    while waits.status is SequenceStatus.WAITING:
        demand.step()
        assert driver.scheduler.waiting, "somebody always waits"
        assert all(driver.charged[a] - before[a] <= bound + behind[a] + demand.cost for a in hot)
    for _ in range(40):
        demand.step()
    assert waits.status is SequenceStatus.FINISHED


@pytest.mark.parametrize("others", ["a", None])
def test_the_wait_for_a_place_is_bounded(others: str | None) -> None:
    """There is a slot, but those on the device, or the base model, would take every place."""
    driver = Driver(make_scheduler(max_loras=2, max_num_seqs=2, fairness_tokens=BOUND))
    for _ in range(4):
        driver.add(2, others, max_tokens=7)
    driver.step()
    waits = driver.add(2, "h")
    before = driver.charged[others]
    while waits.status is SequenceStatus.WAITING:
        driver.add(2, others, max_tokens=7)
        driver.step()
        assert driver.charged[others] - before <= BOUND + 2 * (2 + 2 * 7)


def test_one_that_is_read_for_long_neither_waits_for_ever_nor_stops_the_others() -> None:
    driver = Driver(make_scheduler(max_loras=1, max_num_seqs=16, fairness_tokens=BOUND))
    registry = registry_of(driver.scheduler)
    demand = Demand(driver, "a", overlap=3)
    for _ in range(20):
        demand.step()
    waits = driver.add(2, "h", max_tokens=1)
    assert waits.version
    registry.cool(waits.version, 300)
    while not waits.version.in_host:
        assert demand.step().items, "the engine never waits for a disk"
    assert registry.urgent, "after the bound, others' memory may be taken for it"
    assert driver.charged["a"] > 2 * BOUND
    before = driver.charged["a"]
    while waits.status is SequenceStatus.WAITING:
        demand.step()
        assert driver.charged["a"] - before <= demand.cost


def test_no_adapter_takes_all_places_of_a_step() -> None:
    driver = Driver(make_scheduler(max_loras=4, max_num_seqs=8, budget=100))
    for name in "aaaaaaaaaaaaaaaabbbcc":
        driver.add(3, name)
    admitted = Counter(item.sequence.adapter for item in driver.step().items)
    assert admitted == {"a": 3, "b": 3, "c": 2}


@pytest.mark.parametrize("bound", [50, 500])
@pytest.mark.parametrize("places", [4, 16])
def test_eight_adapters_on_four_slots_do_not_thrash(bound: int, places: int) -> None:
    """A slot changes its adapter only when that is ahead by the bound, so that each change was paid for with it."""
    driver = Driver(make_scheduler(max_loras=4, max_num_seqs=places, fairness_tokens=bound))
    demand = Demand(driver, "abcdefgh", overlap=3)
    for _ in range(3000):
        demand.step()
    writes, served = registry_of(driver.scheduler).slots.writes, sum(driver.charged.values())
    assert writes <= 8 + served / bound
    assert writes >= 8
    assert max(driver.charged.values()) - min(driver.charged.values()) <= 2 * (bound + demand.cost)


def test_no_slot_is_written_again_while_there_are_enough() -> None:
    driver = Driver(make_scheduler(max_loras=4, max_num_seqs=6, fairness_tokens=50))
    demand = Demand(driver, "abcd", overlap=3)
    for _ in range(1000):
        demand.step()
    assert registry_of(driver.scheduler).slots.writes == 4

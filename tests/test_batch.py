"""LoraBatch says which token has which slot, no more and no less; its scope refuses to nest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.batch import NO_SLOT, LoraBatch, LoraScope, Segment


def expanded(batch: LoraBatch) -> list[int]:
    """The slot of each token, as the segments tell it."""
    slots = [NO_SLOT] * batch.num_tokens
    for segment in batch.segments:
        slots[segment.start : segment.end] = [segment.slot] * (segment.end - segment.start)
    return slots


@pytest.mark.parametrize(
    ("slots", "segments"),
    [
        pytest.param([], [], id="no-tokens"),
        pytest.param([NO_SLOT], [], id="base-only"),
        pytest.param([0], [(0, 0, 1)], id="one-token"),
        pytest.param([2, 2, 2], [(2, 0, 3)], id="neighbours-merge"),
        pytest.param([1, 0, 1], [(1, 0, 1), (0, 1, 2), (1, 2, 3)], id="slots-in-any-order"),
        pytest.param([NO_SLOT, 1, 1, NO_SLOT], [(1, 1, 3)], id="base-around"),
        pytest.param([1, NO_SLOT, 1], [(1, 0, 1), (1, 2, 3)], id="base-between-keeps-apart"),
    ],
)
def test_segments_of_slots(slots: list[int], segments: list[tuple[int, int, int]]) -> None:
    batch = LoraBatch.of_slots(slots)
    assert batch.segments == tuple(Segment(*segment) for segment in segments)
    assert batch.num_tokens == len(slots)


@given(st.lists(st.integers(NO_SLOT, 3), max_size=60))
def test_segments_expand_to_the_slots_again(slots: Sequence[int]) -> None:
    batch = LoraBatch.of_slots(slots)
    assert expanded(batch) == slots


@given(st.lists(st.integers(NO_SLOT, 3), max_size=60))
def test_segments_are_disjoint_ascending_maximal_and_never_of_the_base(slots: Sequence[int]) -> None:
    segments = LoraBatch.of_slots(slots).segments
    assert all(segment.start < segment.end and segment.slot != NO_SLOT for segment in segments)
    for left, right in pairwise(segments):
        assert left.end <= right.start
        assert left.end < right.start or left.slot != right.slot, "neighbours of one slot must be one segment"


def test_a_batch_is_current_inside_its_scope_only() -> None:
    scope, batch = LoraScope(), LoraBatch.of_slots([0])
    assert scope.current is None
    with scope.use(batch):
        assert scope.current is batch
    assert scope.current is None


def test_a_scope_refuses_to_nest_and_keeps_its_batch() -> None:
    scope, batch = LoraScope(), LoraBatch.of_slots([0])
    with scope.use(batch):
        with pytest.raises(RuntimeError, match="current already"), scope.use(LoraBatch.of_slots([1])):
            pass
        assert scope.current is batch


def fail_within(scope: LoraScope) -> None:
    with scope.use(LoraBatch.of_slots([0])):
        raise ValueError("the step fails")


def test_a_scope_is_free_again_after_an_error() -> None:
    scope, batch = LoraScope(), LoraBatch.of_slots([0])
    with pytest.raises(ValueError, match="the step fails"):
        fail_within(scope)
    with scope.use(batch):
        assert scope.current is batch


def test_only_a_batch_of_one_adapter_goes_with_any_number_of_rows() -> None:
    mixed = LoraBatch.of_slots([0, 0, 0])
    assert mixed.over(3) is mixed
    with pytest.raises(RuntimeError, match="4 rows in a batch of 3 tokens"):
        mixed.over(4)
    one = LoraBatch.of_one(2, 3)
    assert one.segments == ((2, 0, 3),)
    assert one.over(3) is one
    assert one.over(8).segments == ((2, 0, 8),)
    assert LoraBatch.of_one(NO_SLOT, 3).over(8).segments == ()

"""LoraSlots: what is written is what the kernels and heads compute with, and what was there before is gone."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adapters.adapter import Adapter, Head, LoraPair
from adapters.arena import Rest, build_arena
from adapters.batch import LoraBatch
from adapters.heads import apply_heads
from adapters.kernels import add_lora_reference
from adapters.slots import LoraSlots
from tests.adapters_support import BIASED, HIDDEN, NORM, PLAIN, adapter_of, random_pair, small_base

MAX_RANK = 8


def new_slots(max_loras: int = 3) -> LoraSlots:
    body, layout = small_base()
    return LoraSlots(body, layout, max_loras)


def whole_adapter(rank: int, seed: int = 0, bias: bool = False, labels: int = 0) -> Adapter:
    """LoRA on both layers, where wished with a bias and a head."""
    rng = torch.Generator().manual_seed(seed)
    head = Head(torch.randn(labels, HIDDEN, generator=rng), torch.randn(labels, generator=rng))
    pairs = {PLAIN: random_pair(seed, HIDDEN, 12, rank), BIASED: random_pair(seed + 1, HIDDEN, 6, rank, bias=bias)}
    return adapter_of(pairs, head=head if labels else None)


def delta(slots: LoraSlots, slot: int, name: str) -> Tensor:
    """What the slot adds to the layer's output, on fixed rows."""
    weights = slots.weights[name]
    y = torch.zeros(4, weights.d_out)
    add_lora_reference([y], some_rows(), [weights], LoraBatch.of_slots([slot] * 4))
    return y


def some_rows() -> Tensor:
    return torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(99))


def expected_delta(pair: LoraPair, base_bias: Tensor | None = None) -> Tensor:
    added = pair.scaling * (some_rows() @ pair.a.T) @ pair.b.T
    return added if pair.bias is None or base_bias is None else added + pair.bias - base_bias


@pytest.mark.parametrize("rank", [1, 3, MAX_RANK])
def test_a_written_slot_computes_the_adapter(rank: int) -> None:
    slots, adapter = new_slots(), whole_adapter(rank)
    slots.write(1, adapter)
    for name, pair in adapter.pairs.items():
        assert [term and len(term.a) for term in slots.weights[name].terms] == [None, rank, None]
        torch.testing.assert_close(delta(slots, 1, name), expected_delta(pair))


def test_a_slot_leaves_its_neighbours_alone() -> None:
    slots, first = new_slots(), whole_adapter(8, seed=1, bias=True, labels=2)
    slots.write(1, first)
    before = {name: delta(slots, 1, name) for name in first.pairs}
    slots.write(0, whole_adapter(8, seed=2, bias=True, labels=4))
    slots.write(2, whole_adapter(4, seed=3))
    slots.clear(0)
    assert all(torch.equal(delta(slots, 1, name), before[name]) for name in before)
    assert slots.heads[1] is not None


@pytest.mark.parametrize("cleared", [False, True], ids=["overwritten", "cleared-before"])
@pytest.mark.parametrize(
    "second",
    [
        pytest.param(whole_adapter(2, seed=5), id="smaller-rank"),
        pytest.param(adapter_of({PLAIN: random_pair(5, HIDDEN, 12, 2)}), id="fewer-layers"),
        pytest.param(adapter_of({}), id="nothing"),
    ],
)
def test_a_smaller_adapter_after_a_larger_leaves_no_trace_of_it(second: Adapter, cleared: bool) -> None:
    slots, fresh = new_slots(), new_slots()
    slots.write(0, whole_adapter(MAX_RANK, seed=4, bias=True, labels=3))
    if cleared:
        slots.clear(0)
    slots.write(0, second)
    fresh.write(0, second)
    for name in slots.weights:
        assert torch.equal(delta(slots, 0, name), delta(fresh, 0, name))
    assert slots.heads[0] is None


def test_a_cleared_slot_adds_nothing_and_has_no_head() -> None:
    slots = new_slots()
    slots.write(2, whole_adapter(4, bias=True, labels=3))
    assert all(bool(delta(slots, 2, name).any()) for name in (PLAIN, BIASED))
    slots.clear(2)
    assert not any(bool(delta(slots, 2, name).any()) for name in (PLAIN, BIASED))
    assert slots.heads == [None, None, None]


def test_an_adapters_bias_replaces_the_bases() -> None:
    body, layout = small_base()
    slots, adapter = LoraSlots(body, layout, 1), whole_adapter(2, bias=True)
    slots.write(0, adapter)
    pair = adapter.pairs[BIASED]
    assert pair.bias is not None
    torch.testing.assert_close(delta(slots, 0, BIASED), expected_delta(pair, body.biased.bias))
    adapted = body.biased(some_rows()) + delta(slots, 0, BIASED)
    torch.testing.assert_close(
        adapted, some_rows() @ body.biased.weight.T + pair.bias + pair.scaling * some_rows() @ pair.a.T @ pair.b.T
    )


@pytest.mark.parametrize("name", [PLAIN, BIASED])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_bias_on_b_is_scaled_and_added(name: str, replaced: bool) -> None:
    body, layout = small_base()
    slots, d_out = LoraSlots(body, layout, 1), layout.linears[name].d_out
    pair = random_pair(1, HIDDEN, d_out, 2, scaling=0.5, bias=replaced)
    pair.b_bias = torch.randn(d_out, generator=torch.Generator().manual_seed(5))
    base_bias = body.biased.bias if replaced and name == BIASED else None
    if replaced and name == PLAIN:
        pytest.skip("there is no bias to replace")
    for _ in range(2):  # what is made of the base's and the adapter's is made anew each time
        slots.write(0, adapter_of({name: pair}))
        torch.testing.assert_close(delta(slots, 0, name), expected_delta(pair, base_bias) + 0.5 * pair.b_bias)


def test_an_adapters_bias_of_a_norm_is_held_as_what_it_adds() -> None:
    body, layout = small_base()
    slots, bias = LoraSlots(body, layout, 2), torch.randn(HIDDEN)
    for _ in range(2):
        slots.write(1, in_arena(adapter_of({PLAIN: random_pair(0, HIDDEN, 12, 2)}, biases={NORM: bias})))
        (only,) = slots.biases.values()
        assert only.used == {1}
        assert only.terms[0] is None
        assert only.terms[1] is not None
        torch.testing.assert_close(only.terms[1], bias - body.norm.bias)
    slots.write(1, whole_adapter(2))
    assert (only.used, only.terms) == (set(), [None, None])


def in_arena(adapter: Adapter, pool_dtype: torch.dtype | None = None) -> Adapter:
    """As it comes from a checkpoint: its factors in one buffer."""
    arena = build_arena(adapter.pairs, pool_dtype, Rest(biases=adapter.biases))
    return replace(adapter, pairs=arena.pairs, biases=arena.biases, memory=arena.memory)


@pytest.mark.parametrize("saved", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("held", [torch.float32, torch.float16, torch.bfloat16])
def test_scaling_stays_apart_so_that_factors_are_rounded_once(saved: torch.dtype, held: torch.dtype) -> None:
    pair = random_pair(0, HIDDEN, 12, 4, scaling=1 / 3)
    pair = LoraPair(pair.a.to(saved), pair.b.to(saved), pair.scaling)
    slots = new_slots()
    slots.write(0, in_arena(adapter_of({PLAIN: pair}), held))
    term = slots.weights[PLAIN].terms[0]
    assert term is not None
    assert torch.equal(term.a, pair.a.to(held))
    assert torch.equal(term.b, pair.b.to(held).T)
    assert term.scaling == 1 / 3


def test_a_slot_points_into_the_adapters_memory() -> None:
    """Writing a slot on the CPU copies no factor, and the memory lives as long as the slot holds it."""
    slots, adapter = new_slots(), in_arena(whole_adapter(4))
    assert adapter.memory is not None
    memory = range(adapter.memory.data_ptr(), adapter.memory.data_ptr() + len(adapter.memory))
    slots.write(1, adapter)
    before = {name: delta(slots, 1, name) for name in adapter.pairs}
    for weights in slots.weights.values():
        term = weights.terms[1]
        assert term is not None
        assert term.a.is_contiguous()
        assert term.b.is_contiguous()
        assert term.a.data_ptr() in memory
        assert term.b.data_ptr() in memory
    released = weakref.ref(adapter.memory)
    del adapter, weights, term
    gc.collect()
    assert released() is not None
    assert all(torch.equal(delta(slots, 1, name), expected) for name, expected in before.items())
    slots.clear(1)
    gc.collect()
    assert released() is None


def test_each_row_goes_through_the_head_of_its_slot() -> None:
    slots = new_slots()
    adapters = [whole_adapter(2, seed=1, labels=5), whole_adapter(2, seed=2, labels=1)]
    without_bias = Head(torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(7)), None)
    adapters.append(adapter_of({}, head=without_bias))
    for slot, adapter in enumerate(adapters):
        slots.write(slot, adapter)
    order = [2, 0, 1, 0]
    logits = apply_heads(slots, some_rows(), order)
    assert [len(values) for values in logits] == [3, 5, 1, 5]
    for row, (slot, values) in enumerate(zip(order, logits, strict=True)):
        head = adapters[slot].head
        assert head is not None
        expected = head.weight @ some_rows()[row] + (0 if head.bias is None else head.bias)
        torch.testing.assert_close(values, expected)


def test_heads_work_in_fp32_whatever_the_dtypes() -> None:
    slots, head = new_slots(1), Head(torch.randn(2, HIDDEN).half(), torch.randn(2).half())
    slots.write(0, adapter_of({}, head=head))
    (values,) = apply_heads(slots, some_rows()[:1].bfloat16(), [0])
    assert values.dtype == torch.float32
    assert head.bias is not None
    torch.testing.assert_close(values, head.weight.float() @ some_rows()[0].bfloat16().float() + head.bias.float())


def test_a_row_of_a_slot_without_head_is_an_error() -> None:
    slots = new_slots()
    slots.write(0, whole_adapter(2))
    with pytest.raises(RuntimeError, match="slot 0 holds no head"):
        apply_heads(slots, some_rows(), [0] * 4)

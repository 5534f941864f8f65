"""Magnitudes: g = m / ‖W + scaling · B A‖, from the base's products alone; once for each adapter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adapters.adapter import LoraPair
from adapters.batch import NO_SLOT, LoraBatch
from adapters.dora import Magnitudes, rescale
from adapters.kernels import LoraTerm, LoraWeights
from adapters.layout import BaseLayout, LinearShape
from adapters.slots import LoraSlots
from tests.adapters_support import adapter_of, random_pair

D_IN, D_OUTS = 24, {"q": 16, "k": 8, "alone": 30}
BIASED = {"k", "alone"}


def linears_of(dtype: torch.dtype = torch.float32) -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {
        name: nn.Linear(D_IN, d_out, bias=name in BIASED, dtype=dtype).requires_grad_(False)
        for name, d_out in D_OUTS.items()
    }


def pair_of(seed: int, d_out: int, rank: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> LoraPair:
    pair = random_pair(seed, D_IN, d_out, rank, scaling=0.7)
    magnitude = torch.rand(d_out, generator=torch.Generator().manual_seed(seed)) + 0.5
    return LoraPair((pair.a * size).to(dtype), pair.b.to(dtype), pair.scaling, magnitude=magnitude)


def term_of(pair: LoraPair) -> LoraTerm:
    assert pair.magnitude is not None
    return LoraTerm(pair.a, pair.b.T.contiguous(), pair.scaling, gain=pair.magnitude.clone())


def expected_gain(linear: nn.Linear, pair: LoraPair) -> Tensor:
    adapted = linear.weight.double() + pair.scaling * pair.b.double() @ pair.a.double()
    assert pair.magnitude is not None
    return (pair.magnitude.double() / adapted.norm(dim=1)).float()


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gains_are_magnitudes_over_the_norms_of_the_adapted_rows(dtype: torch.dtype, size: float) -> None:
    linears, calls = linears_of(), []
    magnitudes = Magnitudes(linears)
    for names in (("q", "k"), ("alone",)):

        def multiply(x: Tensor, names: tuple[str, ...] = names) -> list[Tensor]:
            calls.append((names, len(x)))
            return [linears[name](x) for name in names]

        magnitudes.use(names, multiply)
    pairs = {name: pair_of(i, d_out, 2 + i, dtype, size) for i, (name, d_out) in enumerate(D_OUTS.items())}
    terms = {name: term_of(pair) for name, pair in pairs.items()}
    magnitudes.divide(terms, {name: linears[name].bias for name in BIASED})
    for name, term in terms.items():
        assert term.gain is not None
        torch.testing.assert_close(term.gain, expected_gain(linears[name], pairs[name]), rtol=2e-5, atol=0)
    assert calls == [(("q", "k"), 2 + 3), (("alone",), 4)], "one product for the layers of a group"
    magnitudes.divide({"k": term_of(pairs["k"])}, {name: linears[name].bias for name in BIASED})
    assert calls[2:] == [(("q", "k"), 3)]


def test_rows_that_nearly_vanish_keep_their_digits() -> None:
    """B A undoes all but a hundredth of W."""
    linear = nn.Linear(D_IN, 4, bias=False).requires_grad_(False)
    u, s, v = torch.linalg.svd(linear.weight, full_matrices=False)
    pair = LoraPair(v, -0.99 * u * s, 1.0, magnitude=torch.ones(4))
    magnitudes, term = Magnitudes({"only": linear}), term_of(pair)
    magnitudes.use(("only",), lambda x: [linear(x)])
    magnitudes.divide({"only": term}, {})
    assert term.gain is not None
    torch.testing.assert_close(term.gain, expected_gain(linear, pair), rtol=2e-3, atol=0)


def test_only_rows_of_slots_with_a_gain_are_rescaled() -> None:
    weights = LoraWeights(3, 2, 3)
    gain, shift = torch.tensor([2.0, -1.0]), torch.tensor([0.0, 10.0])
    weights.set(0, LoraTerm(torch.ones(1, 3), torch.ones(1, 2), 1.0, gain=gain, shift=shift))
    weights.set(1, LoraTerm(torch.ones(1, 3), torch.ones(1, 2), 1.0))
    weights.set(2, LoraTerm(torch.ones(1, 3), torch.ones(1, 2), 1.0, gain=gain))
    assert weights.rescaled == {0, 2}
    y = torch.ones(5, 2)
    rescale(y, weights, LoraBatch.of_slots([0, 1, NO_SLOT, 2, 0]))
    assert y.tolist() == [[2, 9], [1, 1], [1, 1], [2, -1], [2, 9]]
    weights.set(0, weights.terms[1])
    weights.set(2, None)
    assert weights.rescaled == set()


def test_the_base_is_multiplied_once_for_an_adapter() -> None:
    linear, calls = nn.Linear(D_IN, 6).requires_grad_(False), []
    body = nn.ModuleDict({"only": linear})
    slots = LoraSlots(body, BaseLayout({"only": LinearShape(D_IN, 6, True)}, "", D_IN, True), 2)

    def multiply(x: Tensor) -> list[Tensor]:
        calls.append(len(x))
        return [linear(x)]

    slots.magnitudes.use(("only",), multiply)
    pair = pair_of(3, 6, 5)
    expected = expected_gain(linear, pair)
    adapter = adapter_of({"only": pair})
    for slot in (0, 1, 0):
        slots.write(slot, adapter)
        term = slots.weights["only"].terms[slot]
        assert term is not None
        assert term.bias is None
        assert term.gain is not None
        assert term.shift is not None
        torch.testing.assert_close(term.gain, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(term.shift, linear.bias * (1 - expected))
    assert calls == [5]

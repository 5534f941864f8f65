"""Every kernel equals the reference over dtype × tokens × popularity, ranks mixed; the reference equals the formula."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from adapters.batch import NO_SLOT, LoraBatch
from adapters.kernels import KERNELS, AddLora, LoraWeights, add_lora_reference

D_IN, D_OUT = 24, 40
RANKS = [1, 64, 2, 0, 16, 4, 8]
TOKENS = [0, 1, 2, 7, 32, 300]
# max |kernel − reference| / max |reference|; bf16 has 8 bits and rounds the shrunk values too
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SLOTS = range(len(RANKS))

POPULARITY: dict[str, Callable[[random.Random, int], list[int]]] = {
    "distinct": lambda rng, n: [t % len(RANKS) for t in range(n)],
    "uniform": lambda rng, n: sorted(rng.choices(SLOTS, k=n)),
    "unsorted": lambda rng, n: rng.choices(SLOTS, k=n),
    "zipf": lambda rng, n: sorted(rng.choices(SLOTS, [1 / (k + 1) for k in SLOTS], k=n)),
    "identical": lambda rng, n: [4] * n,
    "skewed": lambda rng, n: sorted(rng.choices(SLOTS, [1, 40, 1, 1, 1, 1, 1], k=n)),
}


def slots_of(popularity: str, tokens: int) -> list[int]:
    """The slot of each token; from four tokens on, every fourth (not on a grid) is the base's."""
    rng = random.Random(tokens)
    slots = POPULARITY[popularity](rng, tokens)
    for t in rng.sample(range(tokens), tokens // 4):
        slots[t] = NO_SLOT
    return slots


def random_weights(dtype: torch.dtype, with_bias: bool, seed: int = 0) -> LoraWeights:
    """All slots; rows past a slot's rank are NaN, so that one who reads them is seen."""
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(len(RANKS), max(RANKS), D_IN, generator=rng)
    b = torch.randn(len(RANKS), max(RANKS), D_OUT, generator=rng)
    for slot, rank in enumerate(RANKS):
        a[slot, rank:] = b[slot, rank:] = float("nan")
    bias = [torch.randn(D_OUT, generator=rng) if with_bias and slot % 2 else None for slot in SLOTS]
    return LoraWeights(a.to(dtype), b.to(dtype), [*RANKS], bias)


def random_rows(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(y, x) with y like the base's output."""
    rng = torch.Generator().manual_seed(tokens)
    y, x = torch.randn(tokens, D_OUT, generator=rng), torch.randn(tokens, D_IN, generator=rng)
    return y.to(dtype), x.to(dtype)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The reference is thousands of tiny products: threads gain nothing and wait for one another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[name for name in KERNELS if name != "reference"])
def kernel(request: pytest.FixtureRequest) -> AddLora:
    return KERNELS[request.param]


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_kernel_equals_the_reference(
    kernel: AddLora, dtype: torch.dtype, tokens: int, popularity: str, with_bias: bool
) -> None:
    slots = slots_of(popularity, tokens)
    weights, batch = random_weights(dtype, with_bias), LoraBatch.of_slots(slots)
    before, x = random_rows(tokens, dtype)
    y, expected, x_before = before.clone(), before.clone(), x.clone()
    kernel(y, x, weights, batch)
    add_lora_reference(expected, x, weights, batch)

    untouched = torch.tensor([slot == NO_SLOT or RANKS[slot] == 0 for slot in slots], dtype=torch.bool)
    assert torch.equal(y[untouched], before[untouched]), "rows without an adapter must stay as they are, bit for bit"
    assert torch.equal(x, x_before)
    adapted, reference = y[~untouched].float(), expected[~untouched].float()
    assert bool(torch.isfinite(reference).all())
    assert not len(reference) or not torch.equal(reference, before[~untouched].float())
    error = (adapted - reference).abs().max() if len(reference) else torch.tensor(0.0)
    assert error <= TOLERANCE[dtype] * (reference.abs().max() if len(reference) else 1)


@pytest.mark.parametrize("rank", [r for r in RANKS if r])
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_the_plain_formula(name: str, rank: int) -> None:
    """y = base + scaling · (x Aᵀ) Bᵀ + bias, in fp64."""
    rng = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, D_IN, generator=rng), torch.randn(D_OUT, rank, generator=rng)
    bias, scaling = torch.randn(D_OUT, generator=rng), 0.7
    weights = LoraWeights(a[None].clone(), (b.T * scaling)[None].clone(), [rank], [bias])
    y, x = random_rows(5, torch.float32)
    expected = y.double() + scaling * (x.double() @ a.double().T) @ b.double().T + bias.double()
    KERNELS[name](y, x, weights, LoraBatch.of_slots([0] * 5))
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", KERNELS)
def test_a_layer_without_adapter_in_a_slot_keeps_its_rows(name: str) -> None:
    """Rank 0: the slot's adapter has no term for this layer, whatever else the slot held before."""
    weights = random_weights(torch.float32, with_bias=True)
    y, x = random_rows(6, torch.float32)
    before = y.clone()
    KERNELS[name](y, x, weights, LoraBatch.of_slots([RANKS.index(0)] * 6))
    assert torch.equal(y, before)


@pytest.mark.parametrize("name", KERNELS)
def test_a_row_does_not_depend_on_its_neighbours_adapters(name: str) -> None:
    weights = random_weights(torch.float32, with_bias=True)
    y, x = random_rows(9, torch.float32)
    alone, mixed = y.clone(), y.clone()
    KERNELS[name](alone[4:5], x[4:5], weights, LoraBatch.of_slots([5]))
    KERNELS[name](mixed, x, weights, LoraBatch.of_slots([0, 0, 1, 2, 5, 4, 4, 6, NO_SLOT]))
    assert torch.equal(mixed[8], y[8])
    assert (mixed[4] - alone[4]).abs().max() <= 1e-5 * alone[4].abs().max()

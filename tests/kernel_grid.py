"""Which token belongs to which adapter: the popularities over which every kernel is tested, as punica has them."""

from __future__ import annotations

import random
from collections.abc import Callable

from adapters.batch import NO_SLOT

POPULARITY: dict[str, Callable[[random.Random, int, int], list[int]]] = {
    "distinct": lambda rng, slots, n: [t % slots for t in range(n)],
    "uniform": lambda rng, slots, n: sorted(rng.choices(range(slots), k=n)),
    "unsorted": lambda rng, slots, n: rng.choices(range(slots), k=n),
    "zipf": lambda rng, slots, n: sorted(rng.choices(range(slots), [1 / (k + 1) for k in range(slots)], k=n)),
    "identical": lambda rng, slots, n: [slots // 2] * n,
    "skewed": lambda rng, slots, n: sorted(rng.choices(range(slots), [1, 40, *[1] * (slots - 2)], k=n)),
}


def slots_of(popularity: str, tokens: int, slots: int) -> list[int]:
    """The slot of each token; from four tokens on, every fourth (not on a grid) is the base's."""
    rng = random.Random(tokens)
    chosen = POPULARITY[popularity](rng, slots, tokens)
    for t in rng.sample(range(tokens), tokens // 4):
        chosen[t] = NO_SLOT
    return chosen

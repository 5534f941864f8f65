"""A composition of adapters by name: `{"a": 0.7, "b": 0.3}` in a request, `a*0.7+b*0.3` where one name is expected."""

from __future__ import annotations

from collections.abc import Mapping

Parts = tuple[tuple[str, float], ...]
"""Name, or `name@digest-prefix`, and weight. No name has a `*` or `+` in it."""


class InvalidComposition(ValueError):
    """Adapters that cannot be one; the message says why."""


def written(adapters: Mapping[str, float]) -> str:
    """As one expression, in the order of the names: the same adapters and weights are the same composition."""
    return "+".join(f"{name}*{float(weight)!r}".replace("e+", "e") for name, weight in sorted(adapters.items()))


def parts_of(model: str) -> Parts:
    """Of an expression; of anything else none."""
    pairs = [part.rpartition("*") for part in model.split("+")]
    try:
        return tuple((name, float(weight)) for name, _, weight in pairs) if "*" in model else ()
    except ValueError:
        return ()


def names_in(model: str) -> tuple[str, ...]:
    """Of all its adapters; of a plain name itself."""
    return tuple(name for name, _ in parts_of(model)) or (model,)

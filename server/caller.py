"""Caller: who asks, and what they may. Knows nothing of keys, of files or of HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from server.composition import names_in

Right = Literal["infer", "admin", "metrics"]
RIGHTS: tuple[Right, ...] = get_args(Right)


class Forbidden(Exception):
    """A caller without the right to what was asked."""


@dataclass(frozen=True)
class Caller:
    """One holder of a key, or ANYONE. Whoever makes one has checked its values."""

    name: str
    rights: frozenset[str]
    """Of RIGHTS."""
    adapters: tuple[str, ...] = ("*",)
    """Patterns, as `fnmatch.fnmatchcase` reads them, over the names of models, the base model's among them."""
    queue_share: float = 1.0
    """Of the waiting queue, 0 < share <= 1."""
    requests_per_minute: int | None = None

    def may(self, right: Right) -> bool:
        return right in self.rights

    def may_use(self, name: str) -> bool:
        """name: a model's name, one version of it, `name@digest-prefix`, or a composition of such."""
        models = [part.partition("@")[0] for part in names_in(name)]
        return all(any(fnmatchcase(model, pattern) for pattern in self.adapters) for model in models)

    def check_use(self, name: str) -> None:
        """Raises Forbidden."""
        if not self.may_use(name):
            raise Forbidden(f"this key may not use {name[:256]!r}")


ANYONE = Caller("anyone", frozenset(RIGHTS))
"""Who asks when no keys are set."""

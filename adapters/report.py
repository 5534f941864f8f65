"""Report: what one checkpoint is to its base: where each tensor went, at which rank and scaling, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from adapters.adapter import Adapter, Limits

T = TypeVar("T")


@dataclass(frozen=True)
class Adapted:
    """What an adapter does to one layer."""

    rank: int
    scaling: float
    """The factor of B·A."""


@dataclass(frozen=True)
class Report:
    """What is told of an adapter beside its AdapterInfo."""

    problem_type: str | None
    """What a classifier's outputs mean; None: it has none."""
    host_bytes: int
    """Of host memory, while it is there."""
    slot_bytes: int
    """Of the device's memory, while it has a slot there; on the CPU a slot points into host memory and takes none."""
    modules: Mapping[str, Adapted]
    """By the layer's name in the base's body."""
    coverage: Mapping[str, str]
    """Tensor of the checkpoint -> where it went."""


def describe(adapter: Adapter, limits: Limits) -> Report:
    """limits: those that it was read under, or would be on the device in question."""
    return Report(
        problem_type=adapter.info.problem_type if adapter.info.labels else None,
        host_bytes=adapter.nbytes,
        slot_bytes=adapter.nbytes if limits.pinned else 0,
        modules=_in_order({name: Adapted(len(pair.a), pair.scaling) for name, pair in adapter.pairs.items()}),
        coverage=_in_order(adapter.coverage),
    )


def _in_order(named: Mapping[str, T]) -> dict[str, T]:
    """By name, numbers as numbers."""
    return dict(sorted(named.items(), key=lambda item: re.sub(r"\d+", lambda found: found[0].zfill(6), item[0])))

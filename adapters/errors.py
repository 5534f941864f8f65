"""Typed refusals of the adapter library. Knows nothing of HTTP: the server maps them to a status."""

from __future__ import annotations

from collections.abc import Sequence

MAX_REASON = 400
"""Characters."""


def shortened(reason: str) -> str:
    """What others wrote may be long: its beginning."""
    return reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}…"


class AdapterError(Exception):
    """Any refusal of this library; its text may be shown to the caller."""


class InvalidAdapter(AdapterError):
    """A checkpoint that is not served; `reasons` holds everything that was found wrong with it."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = tuple(reasons)


class InvalidName(AdapterError):
    """A name outside the pattern for adapter names."""


class AdapterNotFound(AdapterError):
    """No adapter has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no adapter is named {name!r}")
        self.name = name


class AdapterRefused(InvalidAdapter):
    """What lies under this name cannot be served; `reasons` says why."""

    def __init__(self, name: str, reasons: Sequence[str]) -> None:
        super().__init__(reasons)
        self.args = (f"adapter {name!r} is refused: {'; '.join(reasons)}",)
        self.name = name


class TooManyPins(AdapterError):
    """As many adapters are pinned to the device as may be."""


class AdapterExists(AdapterError):
    """A name is taken with other content, and no replacement was asked for."""


class RegistryFull(AdapterError):
    """Host memory holds as many adapters as it may; unload one first."""


class StoreInUse(AdapterError):
    """Another process has the adapter store open."""


class VersionNotFound(AdapterError):
    """This name has no version whose digest begins so, or more than one."""

    def __init__(self, name: str, prefix: str, matches: int) -> None:
        found = f"{matches} versions" if matches else "no version"
        super().__init__(f"adapter {name!r} has {found} whose digest begins with {prefix!r}")
        self.name = name
        self.prefix = prefix

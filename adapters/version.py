"""AdapterVersion: one content of an adapter, who holds it, and in which tiers it lies.

Changed under the registry's lock only.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

from adapters.adapter import Adapter, AdapterInfo


def promise() -> Future[int]:
    """A future that whoever waits for it cannot cancel, since others' work sets it."""
    future: Future[int] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(frozen=True)
class Source:
    """Where a checkpoint can be read again."""

    path: Path
    signature: str | None = None
    """As `directory.signature_of`, of files that others may change; None: nobody changes them."""
    known: AdapterInfo | None = field(default=None, compare=False)
    """What this process found when it read just these files: they need not be examined and hashed again."""

    def read_as(self, info: AdapterInfo) -> Source:
        """The same, after they were read."""
        return replace(self, known=info)


@dataclass(eq=False)
class AdapterVersion:
    """One adapter's content: always known by its digest, in host memory and on the device when it is needed there."""

    info: AdapterInfo
    source: Source | None
    """None: it exists in host memory only, and stays there."""
    adapter: Adapter | None = None
    """In host memory."""
    names: set[str] = field(default_factory=set)
    holders: int = 0
    """Requests and sequences that use it, waiting or running: it is not forgotten while there are any."""
    expected: int = 0
    """Those of them that will need it in memory: then it leaves that only for one that is owed service."""
    pins: int = 0
    """Of its names; while there are any it stays on the device."""
    slot: int | None = None
    slot_users: int = 0
    """Running sequences; neither slot nor host memory is taken while there are any."""
    used_at: int = 0
    """The registry's clock at its last use."""
    failure: str | None = None
    """Why it could not be read from its source."""
    failed_at: float = 0.0
    """Of time.monotonic()."""
    requests: int = 0
    last_used: float | None = None
    """Unix time of the last request."""
    loaded_in_s: float | None = None
    """How long its last reading took."""
    drained: Future[int] = field(default_factory=promise)
    """Bytes freed, when the last holder has let go of a version that no name points at."""

    @property
    def digest(self) -> str:
        return self.info.digest

    def prefer(self, source: Source | None) -> None:
        """The same content lies in `source` too: rather there, if others may change the files that are known."""
        if source is not None and (self.source is None or self.source.signature is not None):
            self.source = source

    @property
    def in_host(self) -> bool:
        return self.adapter is not None

    @property
    def tier(self) -> str:
        """`disk`, `host` or `device`: the highest in which it lies."""
        if self.slot is not None:
            return "device"
        return "host" if self.in_host else "disk"


@dataclass(eq=False)
class UnreadAdapter:
    """A checkpoint that was found but not read yet, so that its digest is not known."""

    info: AdapterInfo
    """What its config says; the digest is empty."""
    source: Source
    reading: Future[None] | None = None

    @property
    def tier(self) -> str:
        return "disk"

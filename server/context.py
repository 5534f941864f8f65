"""RequestContext: one HTTP request's id, who asks, and what the answer took. Knows nothing of HTTP or of the engine."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from server.caller import ANYONE, Caller


@dataclass
class RequestContext:
    """Filled while a request is served, and read at its end for the log and the trace. Event loop only."""

    id: str = ""
    caller: Caller = ANYONE
    trace_id: str = ""
    """Of OpenTelemetry's, where there is one."""
    started: float = field(default_factory=time.monotonic)
    models: dict[str, str | None] = field(default_factory=dict)
    """What answered -> its digest; None: the base model."""
    sequences: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float | None = None
    """The longest that one of its sequences waited."""
    first_token_s: float | None = None
    """From the request's start to its first token."""
    prompts: list[str] = field(default_factory=list)
    """Only where the operator asked for them."""


_CURRENT: ContextVar[RequestContext | None] = ContextVar("request", default=None)


def current() -> RequestContext:
    """Of the request that is being served; a fresh one where none is."""
    return _CURRENT.get() or RequestContext()


def enter(context: RequestContext) -> None:
    """From now on, and in all tasks and threads that are begun for it, this request is served."""
    _CURRENT.set(context)

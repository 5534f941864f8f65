"""AsyncEngine: the engine's thread on one side, asyncio on the other.

One thread loads the base, tests it, and runs every step, so that torch has one pool of workers (PERF: a second thread
costs a third of the speed). The event loop only queues sequences and reads their outputs. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from enum import Enum

from server.engine.departures import Departures
from server.engine.engine import Engine
from server.engine.request import RequestOutput, Sequence

MAX_UNREAD = 1024
"""Outputs of a sequence that wait for its reader; with more it is ended."""

logger = logging.getLogger(__name__)


class EngineState(Enum):
    STARTING = "starting"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"


class EngineNotReady(Exception):
    """Starting, stopping or failed; the message says which and why."""


class CannotStart(Exception):
    """`build` found that it cannot succeed, and the message says why: no defect of ours."""


class QueueFull(Exception):
    """As many sequences wait as may."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """When there will be room, at the rate at which sequences end."""


class RequestTimeout(Exception):
    """A sequence took longer than any may."""


class SlowReader(Exception):
    """Nobody took a sequence's outputs, so that it was ended."""


class Stream:
    """The outputs of one sequence, in order. Event loop only; leave it with `close` however it ends."""

    def __init__(self, engine: AsyncEngine, sequence: Sequence) -> None:
        self.sequence = sequence
        self.queue: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self.cut: RequestTimeout | SlowReader | None = None
        """Why it was ended before its time, if it was."""
        self.timer: asyncio.TimerHandle | None = None
        self._engine = engine
        self._ended = False

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        """Every output up to the one with a `finish_reason`."""
        while not self._ended:
            output = await self.queue.get()
            self._ended = output.finish_reason is not None
            yield output

    def close(self) -> bool:
        """Abort the sequence unless it has ended; whether it had not."""
        if self._ended:
            return False
        self._ended = True
        self._engine.abort(self.sequence)
        return True


class AsyncEngine:
    """Runs one Engine in a thread of its own. `build` is called in that thread."""

    def __init__(self, build: Callable[[], Engine], max_waiting: int, timeout_s: float = 600) -> None:
        """timeout_s: of a sequence, from its submission to its end."""
        self._build = build
        self._max_waiting = max_waiting
        self._timeout_s = timeout_s
        self._ids = itertools.count()
        self._departures = Departures()
        self._wake = threading.Condition()
        self._inbox: deque[tuple[str, Sequence]] = deque()
        self._closed = False
        """Guarded by `_wake`: nothing takes from the inbox any more."""
        self._news = False
        """Guarded by `_wake`: something changed that may let a waiting sequence run."""
        self._streams: dict[int, Stream] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = asyncio.Event()
        self._engine: Engine | None = None
        self.state = EngineState.STARTING
        self.reason = "the base model is being loaded"
        self.on_loaded: Callable[[], object] = lambda: None
        """Called in the engine's thread when all is loaded, before the first step."""
        self.on_failure: Callable[[], object] = lambda: None
        """Called in the event loop when the engine could not start, or has failed."""

    def start(self) -> None:
        """Begin to load. Event loop only, once."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def wait_started(self) -> None:
        """Until the engine is ready, or has failed."""
        await self._started.wait()

    @property
    def engine(self) -> Engine:
        """Raises EngineNotReady."""
        if self._engine is None or self.state is not EngineState.READY:
            raise EngineNotReady(self.reason)
        return self._engine

    @property
    def num_waiting(self) -> int:
        return len(self._inbox) + (len(self._engine.scheduler.waiting) if self._engine else 0)

    @property
    def num_running(self) -> int:
        return len(self._engine.scheduler.running) if self._engine else 0

    @property
    def failed(self) -> bool:
        return self.state is EngineState.FAILED

    def next_id(self) -> int:
        return next(self._ids)

    def num_waiting_of(self, owner: str) -> int:
        """Event loop only."""
        arrived = sum(what == "add" and sequence.owner == owner for what, sequence in self._inbox)
        return arrived + (self._engine.scheduler.waiting.owners[owner] if self._engine else 0)

    def check_room(self, count: int, owner: str = "", share: float = 1.0) -> None:
        """Raises QueueFull when `count` more sequences may not wait; share: of the queue, what `owner` may take.

        Event loop only.
        """
        self._check_room(self.num_waiting + count, self._max_waiting, "")
        if share < 1.0:
            limit = max(1, int(share * self._max_waiting))
            self._check_room(self.num_waiting_of(owner) + count, limit, " of yours")

    def _check_room(self, waiting: int, limit: int, whose: str) -> None:
        if waiting > limit:
            retry_after_s = self._departures.seconds_until(waiting - limit)
            raise QueueFull(f"{waiting} sequences{whose} would wait, {limit} may", retry_after_s)

    def submit(self, sequence: Sequence) -> Stream:
        """Hand a sequence, whose version is held, to the engine. Event loop only. Raises EngineNotReady.

        An idle engine wakes when the event loop has run what is ready, so that inputs of one request share a step.
        """
        stream = Stream(self, sequence)
        with self._wake:
            if self._closed or self.state is not EngineState.READY:
                raise EngineNotReady(self.reason)
            self._streams[sequence.id] = stream
            self._inbox.append(("add", sequence))
        loop = asyncio.get_running_loop()
        loop.call_soon(self._notify)
        late = RequestTimeout(f"not done within {self._timeout_s:g} s, the most that a request may take")
        stream.timer = loop.call_later(self._timeout_s, self._cut, stream, late)
        return stream

    def abort(self, sequence: Sequence) -> None:
        """End a sequence at the next step."""
        self._forget(sequence)
        with self._wake:
            self._inbox.append(("abort", sequence))
            self._wake.notify()

    def _cut(self, stream: Stream, error: RequestTimeout | SlowReader) -> None:
        """End a sequence for a reason of its client's, who is told when it has taken what it was given."""
        self.abort(stream.sequence)
        stream.cut = error
        stream.queue.put_nowait(RequestOutput(stream.sequence, finish_reason="error", error=str(error)))

    def _forget(self, sequence: Sequence) -> None:
        """It gives no outputs any more."""
        stream = self._streams.pop(sequence.id, None)
        if stream is not None and stream.timer is not None:
            stream.timer.cancel()

    def wake(self) -> None:
        """Have the engine look again at what waits: an adapter came into memory, a pin changed. Any thread."""
        with self._wake:
            self._news = True
            self._wake.notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    async def stop(self) -> None:
        """End the thread after its step; what still runs fails."""
        with self._wake:
            if self.state in (EngineState.STARTING, EngineState.READY):
                self.state, self.reason = EngineState.STOPPED, "the server is stopping"
            self._wake.notify()
        while self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, 1.0)

    def _run(self) -> None:
        """The engine's thread."""
        try:
            self._engine = self._build()
            self._engine.registry.host.changed = self.wake
            self._engine.registry.host.busy = lambda: self.num_running > 0
            self.on_loaded()
        except Exception as error:
            unexpected = None if isinstance(error, CannotStart) else error
            logger.error("the engine could not start: %s", error, exc_info=unexpected)
            self._fail(f"the engine could not start: {error}")
            self._call(self._started.set)
            return
        with self._wake:
            if self.state is EngineState.STARTING:
                self.state, self.reason = EngineState.READY, ""
        self._call(self._started.set)
        try:
            while self._receive(self._engine):
                self._deliver(self._engine.step())
            reason = "the server is stopping"
        except Exception:
            logger.exception("the engine's step failed")
            reason = "the engine failed"
            self._fail(reason)
        self._fail_rest(self._engine, reason)

    def _fail(self, reason: str) -> None:
        self.state, self.reason = EngineState.FAILED, reason
        self._call(self.on_failure)

    def _receive(self, engine: Engine) -> bool:
        """Take what arrived; wait when there is nothing to do; False when the thread shall end."""
        with self._wake:
            while self._nothing_to_do(engine):
                self._wake.wait()
            self._news = False
            arrived, self._inbox = self._inbox, deque()
        for what, sequence in arrived:
            if what == "add":
                engine.add(sequence)
            else:
                engine.abort(sequence)
        return self.state is EngineState.READY

    def _nothing_to_do(self, engine: Engine) -> bool:
        """Nothing came, and nothing runs: all that waits, if anything, waits for its adapter."""
        return not self._inbox and not self._news and engine.idle and self.state is EngineState.READY

    def _fail_rest(self, engine: Engine, reason: str) -> None:
        with self._wake:
            self._closed = True
            arrived, self._inbox = self._inbox, deque()
        for what, sequence in arrived:
            if what == "add":
                engine.add(sequence)
        self._deliver(engine.fail_all(reason))

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        if outputs:
            self._call(self._dispatch, outputs)

    def _dispatch(self, outputs: list[RequestOutput]) -> None:
        """Event loop: each output to its stream."""
        for output in outputs:
            stream = self._streams.get(output.sequence.id)
            if stream is not None:
                if stream.queue.qsize() >= MAX_UNREAD:
                    self._cut(stream, SlowReader("the answer is ended, since it was not read"))
                else:
                    stream.queue.put_nowait(output)
            if output.finish_reason is not None:
                self._forget(output.sequence)
                self._departures.note()

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            logger.debug("the event loop has ended")

"""An end in good order: no new requests, running ones finish, then the process ends with status 0."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future
from contextlib import suppress
from types import FrameType

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import RETRY_AFTER_S, error_body

logger = logging.getLogger(__name__)

OPERATIONS = ("/health", "/ready", "/metrics", "/version")
"""What an operator may ask to the end."""
DRAINING = error_body("the server is stopping", "overloaded_error", "draining")


class Traffic:
    """The requests that are being answered, and whether more are taken. Event loop only."""

    def __init__(self) -> None:
        self.draining = False
        self.running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        self.running += 1
        self._idle.clear()

    def end(self) -> None:
        self.running -= 1
        if self.running == 0:
            self._idle.set()

    async def drain(self, timeout_s: float) -> int:
        """Take no more, and wait for those that run; how many of them were not done in time."""
        self.draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self.running


class Admission:
    """Counts requests from first to last byte; while the server drains it answers new ones with 503, and those that are
    cut off before their answer began."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self.app = app
        self.traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPERATIONS:
            await self.app(scope, receive, send)
            return
        if self.traffic.draining:
            await _refuse(scope, receive, send)
            return
        started = False

        async def note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        self.traffic.begin()
        try:
            await self.app(scope, receive, note)
        except asyncio.CancelledError:
            if not self.traffic.draining:
                raise
            if not started:
                await _refuse(scope, receive, send)
        finally:
            self.traffic.end()


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    headers = {"Retry-After": RETRY_AFTER_S, "connection": "close"}
    await JSONResponse(DRAINING, 503, headers)(scope, receive, send)


class DrainingServer(uvicorn.Server):
    """uvicorn, which listens on while it drains, so that a client is told to go elsewhere; a second signal ends it."""

    def __init__(self, config: uvicorn.Config, traffic: Traffic, timeout_s: float) -> None:
        super().__init__(config)
        self._traffic = traffic
        self._timeout_s = timeout_s
        self._drain: Future[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal, in the main thread."""
        if self._drain is not None or not self.started:
            super().handle_exit(sig, frame)
        else:
            self._drain = asyncio.run_coroutine_threadsafe(self._end_in_order(), self.servers[0].get_loop())

    async def _end_in_order(self) -> None:
        logger.info("stopping: %d requests have %g s to finish", self._traffic.running, self._timeout_s)
        left = await self._traffic.drain(self._timeout_s)
        if left:
            logger.warning("%d requests were not done in time and are cut off", left)
        self.should_exit = True

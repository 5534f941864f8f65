"""Connections that wait for their client only so long. Knows nothing of requests or routes."""

from __future__ import annotations

import asyncio
import logging
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger(__name__)


class Connection(HttpToolsProtocol):
    """uvicorn's, cut off when the client sends no whole head of a request, or takes nothing of an answer, in time.

    What has not been taken is bounded meanwhile: the transport asks for no more once its buffer is full, and a
    sequence whose outputs nobody takes ends at `MAX_UNREAD` (async_engine). Event loop only.
    """

    timeout_s: ClassVar[float]
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect("sent no request")

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect("sent no whole request")

    def on_headers_complete(self) -> None:
        self._expect_nothing()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Of a request that has been answered already it is dropped, by a connection that is an idle one by then; all
        of it must come in time."""
        super().on_body(body)
        if self.cycle.response_complete:
            if self._timer is None:
                self._expect("sent no whole body to a request that was refused")
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_complete(self) -> None:
        if self.cycle.response_complete:
            self._expect_nothing()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect("took nothing of its answer")

    def resume_writing(self) -> None:
        self._expect_nothing()
        super().resume_writing()

    def _expect(self, otherwise: str) -> None:
        self._expect_nothing()
        self._timer = self.loop.call_later(self.timeout_s, self._cut_off, otherwise)

    def _expect_nothing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cut_off(self, reason: str) -> None:
        logger.warning("a client is cut off, since it %s for %g s", reason, self.timeout_s)
        self.transport.abort()


def connection_class(timeout_s: float) -> type[Connection]:
    """Connections with this bound, as uvicorn's `http` setting takes them."""
    return type("Connection", (Connection,), {"timeout_s": timeout_s})

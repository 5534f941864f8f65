"""Clients that cost next to nothing: bytes made beforehand, a bare protocol, connections that are kept.

Where clients share their processors with the server, what they take is missing there: httpx needs about a millisecond a
request, as much as a dozen refusals cost the server. Here it is some 0.05 ms. Connections are kept because clients keep
them (openai's, a gateway's); `keep=False` makes one for each request, for comparison.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

END_OF_HEAD = b"\r\n\r\n"


@dataclass
class Answered:
    """One request's answer; times in time.perf_counter() seconds."""

    status: int
    sent_at: float
    ended_at: float
    retry_after_s: int | None

    @property
    def taken_s(self) -> float:
        return self.ended_at - self.sent_at


class _Connection(asyncio.Protocol):
    """One request at a time; answers have a content-length."""

    _transport: asyncio.Transport
    _answer: asyncio.Future[tuple[bytes, float]]

    def __init__(self, idle: list[_Connection]) -> None:
        self._idle = idle
        self._received = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._idle:
            self._idle.remove(self)
        elif not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("no whole answer came"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, _, content = self._received.partition(END_OF_HEAD)
        length = _header(head, b"content-length")
        if length is not None and len(content) == length:
            self._received = b""
            self._answer.set_result((head, time.perf_counter()))

    async def ask(self, request: bytes) -> tuple[bytes, float]:
        """The head of the answer, and when all of it was there."""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        self._transport.close()


class PlainClient:
    """As many connections as there are requests at once. Event loop only."""

    def __init__(self, url: str, keep: bool = True) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        assert address.port is not None
        self._host, self._port = address.hostname, address.port
        self._keep = keep
        self._idle: list[_Connection] = []

    def request(self, path: str, body: bytes) -> bytes:
        """A POST of JSON, as it goes over the wire."""
        connection = "keep-alive" if self._keep else "close"
        head = f"POST {path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\nconnection: {connection}\r\n"
        return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body

    async def ask(self, request: bytes) -> Answered:
        """Raises ConnectionError."""
        sent_at = time.perf_counter()
        connection = self._idle.pop() if self._idle else await self._connect()
        head, ended_at = await connection.ask(request)
        if self._keep:
            self._idle.append(connection)
        else:
            connection.close()
        return Answered(int(head[9:12]), sent_at, ended_at, _header(head, b"retry-after"))

    async def _connect(self) -> _Connection:
        make = asyncio.get_running_loop().create_connection
        return (await make(lambda: _Connection(self._idle), self._host, self._port))[1]


def _header(head: bytes, name: bytes) -> int | None:
    """Of a number."""
    found = re.search(rb"\r\n%b: (\d+)" % name, head, re.IGNORECASE)
    return None if found is None else int(found[1])

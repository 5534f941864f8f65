"""Clients that send or take too slowly, and requests that take too long: bounded, told, and nothing is left behind."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import Live, live_server, service_for

MANY = {"model": "chat-b", "prompt": ["the fox"] * 16, "n": 16, "max_tokens": 250, "ignore_eos": True}
"""More than one sequence at a time can do in a second."""


@pytest.fixture(scope="module")
def hasty(base_location: dict[str, str], tiny_adapters: Path) -> Iterator[Live]:
    """A server that waits for nobody longer than a second, and runs one sequence at a time."""
    settings = {"client_timeout": 1, "request_timeout": 1, "max_num_seqs": 1, "adapter_dir": str(tiny_adapters)}
    with live_server(service_for(base_location["tiny-llama"], "tiny", **settings)) as live:
        yield live


@pytest.fixture
def impatient(base_location: dict[str, str], tiny_adapters: Path) -> Iterator[Live]:
    """The same, but for requests' time and how many run."""
    settings = {"client_timeout": 1, "adapter_dir": str(tiny_adapters)}
    with live_server(service_for(base_location["tiny-llama"], "tiny", **settings)) as live:
        yield live


def connect(live: Live) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect(("127.0.0.1", int(live.url.rsplit(":", 1)[1])))
    made.settimeout(60)
    return made


def request(body: dict[str, Any], length: int | None = None) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: "
    return f"{head}{length or len(content)}\r\n\r\n".encode() + content


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes; nothing when it resets."""
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n", b"GET /ready HTTP/1.1\r\nx: "])
def test_half_a_head_is_not_waited_for(hasty: Live, sent: bytes) -> None:
    with connect(hasty) as connection:
        connection.sendall(sent)
        assert read_all(connection) == b""


def test_half_a_body_is_answered(hasty: Live) -> None:
    with connect(hasty) as connection:
        connection.sendall(request({"model": "chat-b", "prompt": "the fox"}, length=10_000))
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in answer
    assert b"nothing of the body came for 1 s" in answer


def test_a_request_that_takes_too_long_is_ended(hasty: Live) -> None:
    answer = httpx.post(f"{hasty.url}/v1/completions", json=MANY, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "request_timeout")
    assert answer.headers["retry-after"]
    assert_idle(hasty)


def test_a_stream_that_takes_too_long_says_so(hasty: Live) -> None:
    answer = httpx.post(f"{hasty.url}/v1/completions", json=MANY | {"stream": True}, timeout=60)
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert json.loads(events[0])["choices"][0]["text"], "it began well"
    assert json.loads(events[-2])["error"]["code"] == "request_timeout"
    assert events[-1] == "[DONE]"
    assert_idle(hasty)


def test_who_takes_nothing_of_a_stream_is_cut_off(impatient: Live) -> None:
    """Far more than the buffers of both sides hold."""
    body = MANY | {"prompt": ["the fox"] * 4, "logprobs": 20, "stream": True}
    with connect(impatient) as connection:
        connection.sendall(request(body))
        assert connection.recv(9) == b"HTTP/1.1 "
        assert_idle(impatient)
        rest = read_all(connection)
        assert b"[DONE]" not in rest
        assert len(rest) < 8 << 20
    assert httpx.post(f"{impatient.url}/v1/completions", json=MANY | {"n": 1}, timeout=60).status_code == 200


def assert_idle(live: Live) -> None:
    """At once, or when the connection has been cut off; nobody holds an adapter then."""
    engine = live.service.async_engine
    for _ in range(100_000):
        if engine.num_running + engine.num_waiting == 0 and not live.service.metrics.live:
            break
        httpx.get(f"{live.url}/health")
    assert engine.num_running + engine.num_waiting == 0
    version = live.service.registry.get("chat-b")
    assert version.holders == 0  # type: ignore[union-attr]

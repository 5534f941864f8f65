"""Where no more may wait, a request for sequences is refused before its body is read; everything else is served."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts

from server.api.app import create_app
from server.api.door import DROPPED_BYTES
from server.keys import make_key
from tests.support import Live, live_server, service_for
from tests.test_operations import metric

KEYS: dict[str, dict[str, Any]] = {
    "team": {"rights": ["infer", "admin", "metrics"]},
    "small": {"rights": ["infer"], "queue_share": 0.5},
    "scraper": {"rights": ["metrics"]},
}
MAX_WAITING = 4
CLIENT_TIMEOUT_S = 3.0
FOR_SEQUENCES = {
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify", "/classify", "/v1/predict",
}  # fmt: skip
PREDICT = "/v1/predict"
BROKEN = b"{"
"""What the body of a request is that is refused unread: else it were 422."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """The key file, and name -> headers."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    made = {name: make_key(path, name, **settings) for name, settings in KEYS.items()}
    common = {"content-type": "application/json"}
    return path, {name: {"authorization": f"Bearer {key}", **common} for name, key in made.items()}


@pytest.fixture(scope="module")
def headers(keys: tuple[Path, dict[str, dict[str, str]]]) -> dict[str, dict[str, str]]:
    return keys[1]


@pytest.fixture(scope="module")
def small(base_location: dict[str, str], tiny_adapters: Path, keys: tuple[Path, Any]) -> Iterator[Live]:
    """A server where few may wait."""
    settings = {
        "adapter_dir": str(tiny_adapters),
        "api_key_file": str(keys[0]),
        "max_waiting": MAX_WAITING,
        "client_timeout": CLIENT_TIMEOUT_S,
    }
    with live_server(service_for(base_location["tiny-llama"], "tiny", **settings)) as live:
        yield live


def sort(live: Live, headers: dict[str, str], count: int = 1) -> httpx.Response:
    body = {"task": "sort", "inputs": ["the fox"] * count}
    return httpx.post(live.url + PREDICT, json=body, headers=headers, timeout=60)


@contextmanager
def waiting(live: Live, headers: dict[str, str], count: int) -> Iterator[None]:
    """The engine's thread stands at the end of a step meanwhile, and `count` sequences wait; all are answered then."""
    engine = live.service.async_engine
    observe, stands, go_on = engine.engine.observe_step, Event(), Event()

    def stand(_tokens: float) -> None:
        stands.set()
        assert go_on.wait(60)

    engine.engine.observe_step = stand
    with ThreadPoolExecutor() as threads:
        answers = [threads.submit(sort, live, headers)]
        try:
            assert stands.wait(60)
            answers.append(threads.submit(sort, live, headers, count))
            while engine.num_waiting < count:
                httpx.get(f"{live.url}/health")
            yield
            assert engine.num_waiting == count
        finally:
            engine.engine.observe_step = observe
            go_on.set()
    assert [answer.result().status_code for answer in answers] == [200, 200]


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_full_queue_refuses_unread_what_is_for_sequences_and_serves_the_rest(
    small: Live, headers: dict[str, dict[str, str]]
) -> None:
    paths = {str(r.path) for r in iter_route_contexts(create_app(small.service).routes) if "POST" in (r.methods or ())}
    assert len(paths) > len(FOR_SEQUENCES)
    with waiting(small, headers["team"], MAX_WAITING):
        next_id = small.service.async_engine.next_id()
        for path in sorted(paths):
            answer = httpx.post(small.url + path.replace("{name}", "sort"), content=BROKEN, headers=headers["team"])
            if path not in FOR_SEQUENCES:
                assert code(answer) == (422, "invalid_json"), path
                continue
            assert code(answer) == (429, "queue_full"), path
            assert answer.json()["error"]["message"] == "5 sequences would wait, 4 may"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert answer.headers["x-request-id"]
            assert metric(small, "multilora:http_requests_total", headers["team"])[path, "POST", "429"] == 1
        assert small.service.async_engine.next_id() == next_id + 1, "the engine was asked for nothing"
        for path in ("/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/adapters/sort"):
            assert httpx.get(small.url + path, headers=headers["team"]).status_code == 200
        body = {"prompt": "the fox"}
        assert httpx.post(f"{small.url}/tokenize", json=body, headers=headers["team"]).json()["count"]
        assert httpx.get(small.url + PREDICT, headers=headers["team"]).status_code == 405
    assert code(httpx.post(small.url + PREDICT, content=BROKEN, headers=headers["team"])) == (422, "invalid_json")


def test_the_exact_count_is_checked_where_there_is_room_for_one(
    small: Live, headers: dict[str, dict[str, str]]
) -> None:
    with waiting(small, headers["team"], MAX_WAITING - 1):
        assert code(sort(small, headers["team"], 2)) == (429, "queue_full")
        assert code(httpx.post(small.url + PREDICT, content=BROKEN, headers=headers["team"])) == (422, "invalid_json")


def test_a_full_share_refuses_its_holder_alone(small: Live, headers: dict[str, dict[str, str]]) -> None:
    with waiting(small, headers["small"], MAX_WAITING // 2):
        refused = httpx.post(small.url + PREDICT, content=BROKEN, headers=headers["small"])
        assert code(refused) == (429, "queue_full")
        assert refused.json()["error"]["message"] == "3 sequences of yours would wait, 2 may"
        passed = httpx.post(small.url + PREDICT, content=BROKEN, headers=headers["team"])
        assert code(passed) == (422, "invalid_json")


def test_who_may_not_ask_is_told_so_first(small: Live, headers: dict[str, dict[str, str]]) -> None:
    with waiting(small, headers["team"], MAX_WAITING):
        assert code(sort(small, {})) == (401, "invalid_api_key")
        assert code(sort(small, headers["scraper"])) == (403, "forbidden")
        assert code(sort(small, headers["small"])) == (429, "queue_full")


class Plain:
    """A connection, to say and to hear bytes."""

    def __init__(self, live: Live, headers: dict[str, str]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), 60)
        self.authorization = f"authorization: {headers['authorization']}\r\n"

    def begin(self, *lines: str) -> None:
        """A request's head."""
        head = "".join(f"{line}\r\n" for line in (f"POST {PREDICT} HTTP/1.1", "host: a", *lines))
        self.socket.sendall((head + self.authorization + "\r\n").encode())

    def refused(self) -> bytes:
        """The whole answer, from its end: JSON."""
        received = b""
        while not received.endswith(b'"queue_full"}}'):
            piece = self.socket.recv(1 << 16)
            assert piece, received
            received += piece
        assert received.startswith(b"HTTP/1.1 429 ")
        return received


@pytest.fixture
def plain(small: Live, headers: dict[str, dict[str, str]]) -> Iterator[Plain]:
    made = Plain(small, headers["team"])
    with made.socket:
        yield made


def test_the_connection_of_a_refused_request_is_kept(
    small: Live, headers: dict[str, dict[str, str]], plain: Plain
) -> None:
    """Also when the body comes after the answer; what follows on it is answered."""
    with waiting(small, headers["team"], MAX_WAITING):
        for length in (5, DROPPED_BYTES, 0):
            plain.begin(f"content-length: {length}")
            assert b"\r\nconnection: close\r\n" not in plain.refused(), "answered before the body"
            plain.socket.sendall(b"x" * length)


@pytest.mark.parametrize("line", [f"content-length: {DROPPED_BYTES + 1}", "transfer-encoding: chunked"])
def test_a_long_body_is_not_waited_for(
    small: Live, headers: dict[str, dict[str, str]], plain: Plain, line: str
) -> None:
    with waiting(small, headers["team"], MAX_WAITING):
        plain.begin(line)
        assert b"\r\nconnection: close\r\n" in plain.refused()
        assert plain.socket.recv(1) == b""


def test_half_a_dropped_body_does_not_hold_the_connection(
    small: Live, headers: dict[str, dict[str, str]], plain: Plain
) -> None:
    with waiting(small, headers["team"], MAX_WAITING):
        plain.begin("content-length: 10")
        plain.refused()
        plain.socket.sendall(b"x" * 5)
        assert plain.socket.recv(1) == b"", "closed as an idle one is"


def test_a_dropped_body_that_comes_in_drops_is_not_waited_for(
    small: Live, headers: dict[str, dict[str, str]], plain: Plain
) -> None:
    """Although the connection is never idle."""
    with waiting(small, headers["team"], MAX_WAITING):
        plain.begin(f"content-length: {DROPPED_BYTES}")
        plain.refused()
        began = time.monotonic()
        with suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() - began < 20 * CLIENT_TIMEOUT_S:
                plain.socket.sendall(b"x")
                time.sleep(0.2)
        assert time.monotonic() - began < 20 * CLIENT_TIMEOUT_S, "it may go on for ever"

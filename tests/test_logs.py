"""What the log holds: a line for each request, as text and as JSON; prompts only when asked for."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.logs import JsonFormatter
from tests.support import live_server, service_for


@contextmanager
def json_lines() -> Iterator[list[dict[str, Any]]]:
    """What is logged as JSON, readable when the block has ended."""
    stream, lines = io.StringIO(), list[dict[str, Any]]()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        lines += [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("prompts", [False, True])
def test_a_request_leaves_a_line(base_location: dict[str, str], tiny_adapters: Path, prompts: bool) -> None:
    service = service_for(
        base_location["tiny-llama"], "tiny", adapter_dir=str(tiny_adapters), log_prompts=prompts, metrics_max_adapters=1
    )
    chat = {"model": "chat-a", "messages": [{"role": "user", "content": "the naïve fox"}], "max_tokens": 4, "n": 2}
    items = [{"task": "sort", "input": "a dog"}, {"task": "tiny", "input": "a cat"}]
    with json_lines() as lines, live_server(service) as live:
        answer = httpx.post(f"{live.url}/v1/chat/completions", json=chat, headers={"x-request-id": "mine"}, timeout=60)
        httpx.post(f"{live.url}/v1/predict", json={"items": items, "inputs": None}, timeout=60)
        httpx.get(f"{live.url}/nowhere%0a?secret=1")
        httpx.get(f"{live.url}/health")
    first, second, third = [line for line in lines if line["logger"] == "server.requests"]
    usage = answer.json()["usage"]
    assert first["request_id"] == "mine"
    assert (first["method"], first["path"], first["status"]) == ("POST", "/v1/chat/completions", 200)
    assert first["adapters"] == {"chat-a": answer.headers["x-adapter-digest"]}
    assert first["sequences"] == 2
    assert first["prompt_tokens"] == 2 * usage["prompt_tokens"]
    assert first["completion_tokens"] == usage["completion_tokens"]
    assert 0 < first["queue_s"] < first["first_token_s"] < first["duration_s"]
    assert second["adapters"].keys() == {"sort", "tiny"}
    assert second["adapters"]["tiny"] is None
    assert (third["path"], third["status"], third["sequences"]) == ("/nowhere%0a", 404, 0)
    assert all(line["time"].endswith("+00:00") and line["level"] == "info" for line in (first, second, third))
    if prompts:
        assert "the naïve fox" in first["prompts"][0]
        assert second["prompts"][0] == "a dog"
    else:
        assert not any(word in json.dumps(lines, ensure_ascii=False) for word in ("naïve", "a dog", "a cat"))


def test_an_exception_is_one_line() -> None:
    with json_lines() as lines:
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("server.x").exception("it %s", "failed")
    assert lines[0]["message"] == "it failed"
    assert lines[0]["exception"].endswith("ValueError: two\nlines")
    assert "request_id" not in lines[0]


def test_requests_need_leave_no_line(base_location: dict[str, str]) -> None:
    service = service_for(base_location["tiny-llama"], "tiny", log_requests=False)
    with json_lines() as lines, live_server(service) as live:
        httpx.get(f"{live.url}/version")
    assert not [line for line in lines if line["logger"] == "server.requests"]

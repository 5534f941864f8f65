"""Broken requests: each gets its status and a message that names the fault, and the server goes on serving."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support import Live, live_server, service_for

HELLO = [{"role": "user", "content": "the fox"}]
CHAT, COMPLETE, PREDICT = "/v1/chat/completions", "/v1/completions", "/v1/predict"
EMBED, CLASSIFY = "/v1/embeddings", "/v1/classify"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
LONG = "the fox " * 400


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "chat-a", "messages": HELLO, **fields}


def complete(**fields: Any) -> dict[str, Any]:
    return {"model": "chat-a", "prompt": "the fox", **fields}


BROKEN = [
    # (route, body, status, what the message must hold)
    (CHAT, chat(model="absent"), 404, "'absent' does not exist"),
    (CHAT, chat(model="sort"), 400, "'sort' serves SEQ_CLS, not CAUSAL_LM"),
    (CHAT, chat(messages=[{"role": "user", "content": LONG}]), 400, "256"),
    (CHAT, chat(max_tokens=1000), 400, "max_tokens is 1000"),
    (CHAT, chat(min_tokens=9, max_tokens=5), 400, "min_tokens 9 is more than max_tokens 5"),
    (CHAT, chat(stop_token_ids=[320]), 400, "outside the vocabulary of 320"),
    (CHAT, chat(stop_token_ids=[-1]), 422, "stop_token_ids"),
    (CHAT, chat(messages=[]), 422, "messages"),
    (CHAT, chat(messages="hello"), 422, "messages"),
    (CHAT, chat(messages=[{"role": "user"}]), 422, "content"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 422, "type"),
    (CHAT, chat(temperature=3), 422, "temperature"),
    (CHAT, chat(temperature="warm"), 422, "temperature"),
    (CHAT, chat(temperature="1"), 422, "temperature"),
    (CHAT, chat(max_tokens="5"), 422, "max_tokens"),
    (CHAT, chat(stream="false"), 422, "stream"),
    (CHAT, chat(top_p=0), 422, "top_p"),
    (CHAT, chat(top_k=-2), 422, "top_k"),
    (CHAT, chat(top_k=2**63), 422, "top_k"),
    (CHAT, chat(repetition_penalty=1e-320), 422, "repetition_penalty"),
    (CHAT, {"model": "chat-a", **{f"f{i}": i for i in range(200)}}, 422, "201 fields"),
    (CHAT, chat(n=0), 422, "n:"),
    (CHAT, chat(n=17), 422, "n:"),
    (CHAT, chat(stop=["x"] * 17), 422, "stop"),
    (CHAT, chat(stop=[""]), 422, "stop"),
    (CHAT, chat(top_logprobs=3), 422, "top_logprobs needs logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 422, "top_logprobs"),
    (CHAT, chat(max_tokens=0), 422, "max_tokens"),
    (CHAT, chat(max_tokens=3, max_completion_tokens=4), 422, "differ"),
    (CHAT, chat(stream_options={"include_usage": True}), 422, "stream_options"),
    (CHAT, chat(tools=[]), 422, "tools"),
    (CHAT, chat(response_format={"type": "json"}), 422, "response_format"),
    (CHAT, chat(logit_bias={"x": 2}), 422, "logit_bias"),
    (CHAT, chat(logit_bias={"-1": 2}), 422, "logit_bias"),
    (CHAT, chat(logit_bias={"1": 101}), 422, "logit_bias"),
    (CHAT, chat(logit_bias={str(i): 1 for i in range(1025)}), 422, "logit_bias"),
    (CHAT, chat(logit_bias={"1": 1, "320": 1}), 400, "logit_bias: [320] are outside the vocabulary of 320"),
    (TOKENIZE, {}, 422, "either prompt or messages"),
    (TOKENIZE, {"prompt": "a", "messages": HELLO}, 422, "either prompt or messages"),
    (TOKENIZE, {"prompt": "a", "add_generation_prompt": True}, 422, "add_generation_prompt for messages"),
    (TOKENIZE, {"messages": HELLO, "add_special_tokens": True}, 422, "add_special_tokens is for a prompt"),
    (TOKENIZE, {"prompt": "a", "model": "absent"}, 404, "'absent' does not exist"),
    (DETOKENIZE, {"tokens": [320]}, 400, "token id 320"),
    (DETOKENIZE, {"tokens": [-1]}, 422, "tokens"),
    (DETOKENIZE, {"tokens": [1], "model": "absent"}, 404, "'absent' does not exist"),
    (CHAT, chat(frobnicate=1), 422, "frobnicate"),
    (CHAT, {"messages": HELLO}, 422, "model"),
    (CHAT, [], 422, "dictionary"),
    (COMPLETE, complete(model="embed"), 400, "'embed' serves FEATURE_EXTRACTION"),
    (COMPLETE, complete(prompt=""), 400, "no tokens"),
    (COMPLETE, complete(prompt=[]), 422, "prompt"),
    (COMPLETE, complete(prompt=[5, 320]), 400, "token id 320"),
    (COMPLETE, complete(prompt=[-1]), 422, "prompt"),
    (COMPLETE, complete(prompt=["x"] * 300), 422, "300 inputs"),
    (COMPLETE, complete(prompt=list(range(256))), 400, "256 tokens"),
    (COMPLETE, complete(max_tokens=0), 422, "max_tokens: 0 goes with echo"),
    (CHAT, chat(echo=True), 422, "echo"),
    (COMPLETE, complete(suffix="x"), 422, "suffix"),
    (EMBED, {"model": "embed", "input": ""}, 400, "no tokens"),
    (EMBED, {"model": "embed", "input": LONG}, 400, "the context holds 256"),
    (EMBED, {"model": "chat-a", "input": "x"}, 400, "'chat-a' serves CAUSAL_LM, not FEATURE_EXTRACTION"),
    (EMBED, {"model": "embed", "input": "x", "dimensions": 3}, 422, "dimensions"),
    (EMBED, {"model": "embed", "input": "x", "encoding_format": "hex"}, 422, "encoding_format"),
    (CLASSIFY, {"model": "tiny", "input": "x"}, 400, "'tiny' serves CAUSAL_LM and FEATURE_EXTRACTION"),
    (CLASSIFY, {"model": "tag", "input": "x"}, 400, "'tag' serves TOKEN_CLS"),
    (CLASSIFY, {"model": "sort", "input": ["x", ""]}, 400, "no tokens"),
    (PREDICT, {}, 422, "send items, or task and inputs"),
    (PREDICT, {"task": "sort"}, 422, "send items, or task and inputs"),
    (PREDICT, {"task": "sort", "inputs": []}, 422, "inputs"),
    (PREDICT, {"task": "sort", "inputs": "x", "items": []}, 422, "items"),
    (PREDICT, {"items": [{"task": "sort", "input": "x"}], "task": "sort"}, 422, "either items, or task"),
    (PREDICT, {"items": [{"task": "sort", "input": "x", "params": {}}]}, 422, "items.0.params"),
    (PREDICT, {"items": [{"task": "chat-a", "input": "x", "parameters": {"n": 2}}]}, 422, "parameters.n"),
    (PREDICT, {"task": "sort", "inputs": ["x"] * 257}, 422, "257 inputs"),
]


@pytest.mark.parametrize(("route", "body", "status", "message"), BROKEN)
def test_broken_requests(live: Live, route: str, body: Any, status: int, message: str) -> None:
    answer = httpx.post(live.url + route, json=body, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, message in error["message"]) == (status, True), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert_serves(live)


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 422, "invalid_request"),
        (b"{", 422, "invalid_json"),
        (b"null", 422, "invalid_request"),
        (b"\xff\xfe", 422, "invalid_json"),
        (b'{"task": "sort", "inputs": "\\ud800"}', 422, "invalid_request"),
        (b'{"items": [{"task": "chat-a", "input": "\\udc00"}]}', 422, "invalid_request"),
        (b'{"task": "\\ud800", "inputs": "x"}', 422, "invalid_request"),
        (b'{"task": "sort", "inputs": "x", "\\ud800": 1}', 422, "invalid_request"),
        (b'{"task": "sort", "inputs": "x", "tokens": NaN}', 422, "invalid_request"),
        (b'{"task": "chat-a", "inputs": "x", "parameters": {"temperature": Infinity}}', 422, "invalid_request"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, 422, "invalid_json"),
        (b'{"task": "sort", "inputs": ' + b"[" * 900 + b"]" * 900 + b"}", 422, "invalid_request"),
        (b'{"task": "sort", "inputs": "x", "parameters": {"seed": ' + b"1" * 5000 + b"}}", 422, "invalid_json"),
    ],
)
def test_bodies_that_are_no_request(live: Live, content: bytes, status: int, code: str) -> None:
    answer = httpx.post(live.url + PREDICT, content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert_serves(live)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, {"model": "chat-a", "messages": [1] * 100_000}),
        (COMPLETE, {"model": "chat-a", "prompt": [{}] * 100_000}),
        (PREDICT, {"items": [{}] * 100_000}),
        (EMBED, {"model": "embed", "input": [1.5] * 100_000}),
    ],
)
def test_of_many_faults_the_first_are_told(live: Live, route: str, body: dict[str, Any]) -> None:
    answer = httpx.post(live.url + route, json=body, timeout=60)
    assert answer.status_code == 422
    assert len(answer.text) < 2000
    assert_serves(live)


def test_an_encoder_does_not_chat(base_location: dict[str, str]) -> None:
    with live_server(service_for(base_location["tiny-bert"], "bert")) as encoder:
        for route, body in ((CHAT, chat(model="bert")), (COMPLETE, complete(model="bert"))):
            answer = httpx.post(encoder.url + route, json=body)
            assert answer.status_code == 400
            assert "'bert' serves FEATURE_EXTRACTION, not CAUSAL_LM" in answer.json()["error"]["message"]


def test_methods_that_a_route_has_not(live: Live) -> None:
    answer = httpx.get(live.url + PREDICT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    several = httpx.patch(f"{live.url}/v1/adapters/chat-a")
    assert (several.status_code, several.headers["allow"]) == (405, "GET, PUT, DELETE")


@pytest.fixture
def small(base_location: dict[str, str], tiny_adapters: Any) -> Iterator[Live]:
    """A server with little room for bodies and waiting sequences."""
    service = service_for(
        base_location["tiny-llama"], "tiny", adapter_dir=str(tiny_adapters), max_body_bytes=2000, max_waiting=3
    )
    with live_server(service) as running:
        yield running


def test_a_body_over_the_limit_is_refused_before_and_while_it_is_read(small: Live) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"task": "sort", "inputs": "'
        for _ in range(100):
            yield b"x" * 100
        yield b'"}'

    for content in (b"x" * 3000, chunks()):
        answer = httpx.post(small.url + PREDICT, content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        assert "2000 bytes" in answer.json()["error"]["message"]
        assert answer.headers["x-request-id"]
    assert_serves(small)


def test_a_full_queue_is_told(small: Live) -> None:
    answer = httpx.post(small.url + PREDICT, json={"task": "sort", "inputs": ["x"] * 4})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert_serves(small)
    small.service.async_engine.engine.scheduler.check_integrity()


def assert_serves(live: Live) -> None:
    answer = httpx.post(live.url + PREDICT, json={"task": "sort", "inputs": "the fox"}, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["results"][0]["label"].startswith("LABEL_")

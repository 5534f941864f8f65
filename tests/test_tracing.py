"""Traces: a collector receives a span for each request, in the client's own trace, with tokens and times."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from server.api.tracing import make_provider, wanted
from tests.support import live_server, service_for

TRACE = "0af7651916cd43dd8448eb211c80319c"


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Its address, and what it receives."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            received.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", received
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def test_a_request_is_a_span(
    base_location: dict[str, str],
    tiny_adapters: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with collector() as (address, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        service = service_for(base_location["tiny-llama"], "tiny", adapter_dir=str(tiny_adapters))
        with live_server(service) as live, caplog.at_level(logging.INFO):
            headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-request-id": "mine"}
            body = {"model": "chat-a", "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 4,
                    "ignore_eos": True}  # fmt: skip
            answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
            assert answer.status_code == 200
            assert httpx.get(f"{live.url}/v1/models/unknown").status_code == 404
    resources = [resource for request in received for resource in request.resource_spans]
    assert {a.value.string_value for r in resources for a in r.resource.attributes if a.key == "service.name"} == {
        "multilora"
    }
    spans = {span.name: span for r in resources for scope in r.scope_spans for span in scope.spans}
    assert spans.keys() == {"POST /v1/chat/completions", "GET /v1/models/{model}"}
    chat = spans["POST /v1/chat/completions"]
    assert chat.trace_id.hex() == TRACE
    assert chat.parent_span_id.hex() == "b7ad6b7169203331"
    found = {attribute.key: attribute.value for attribute in chat.attributes}
    assert found["http.response.status_code"].int_value == 200
    assert found["gen_ai.request.id"].string_value == "mine"
    assert found["gen_ai.request.model"].string_value == "chat-a"
    assert found["gen_ai.usage.output_tokens"].int_value == 4
    assert found["gen_ai.usage.input_tokens"].int_value == answer.json()["usage"]["prompt_tokens"]
    assert found["gen_ai.latency.time_to_first_token"].double_value > 0
    assert "the fox" not in str(chat)
    other = {attribute.key: attribute.value for attribute in spans["GET /v1/models/{model}"].attributes}
    assert other["http.response.status_code"].int_value == 404
    assert "gen_ai.request.model" not in other


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a"}, True),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, False),
        ({"OTEL_SERVICE_NAME": "a"}, False),
    ],
)
def test_the_standard_variables_decide(environment: dict[str, str], expected: bool) -> None:
    assert wanted(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [{"OTEL_TRACES_EXPORTER": "zipkin"},
     {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}],
)  # fmt: skip
def test_what_is_not_there_is_said(environment: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    assert make_provider(environment) is None
    assert "no traces" in caplog.text

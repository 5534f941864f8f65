"""Health, readiness, metrics, version, ids; while starting, and when the engine has failed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

import server
from server.config import ServerConfig
from server.engine.async_engine import EngineState
from server.service import LoadedBase, Service
from tests.support import Live, live_server, service_for


def metric(live: Live, name: str, headers: dict[str, str] | None = None) -> dict[tuple[str, ...], float]:
    """Label values -> value."""
    text = httpx.get(f"{live.url}/metrics", headers=headers).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {tuple(sample.labels.values()): sample.value for sample in samples if sample.name == name}


def test_health_ready_and_version(live: Live) -> None:
    assert httpx.get(f"{live.url}/health").status_code == 200
    assert httpx.get(f"{live.url}/ready").json() == {"status": "ready"}
    assert httpx.get(f"{live.url}/version").json() == {"version": server.__version__}


def test_metrics_count_what_was_served(live: Live) -> None:
    before = metric(live, "multilora:request_success_total").get(("done", "SEQ_CLS"), 0)
    tokens = metric(live, "multilora:prompt_tokens_total")[()]
    answer = httpx.post(f"{live.url}/v1/predict", json={"task": "sort", "inputs": ["the fox", "the dog"]})
    usage = sum(result["usage"]["prompt_tokens"] for result in answer.json()["results"])
    assert metric(live, "multilora:request_success_total")["done", "SEQ_CLS"] == before + 2
    assert metric(live, "multilora:prompt_tokens_total")[()] == tokens + usage
    assert metric(live, "multilora:adapters")[()] == 5
    assert metric(live, "multilora:num_requests_running")[()] == 0
    assert metric(live, "multilora:num_preemptions_total")[()] == 0


def test_metrics_show_where_adapters_are(base_location: dict[str, str], tiny_adapters: Path) -> None:
    settings = {"adapter_dir": str(tiny_adapters), "max_loras": 2, "max_cpu_loras": 2, "metrics_max_adapters": 2}
    with live_server(service_for(base_location["tiny-llama"], "tiny", **settings)) as live:
        for name in ("sort", "chat-a", "chat-b", "sort"):
            answer = httpx.post(f"{live.url}/v1/predict", json={"task": name, "inputs": "the fox"}, timeout=60)
            assert answer.status_code == 200, answer.text
        assert metric(live, "multilora:lora_slots_used")[()] == 2
        assert metric(live, "multilora:lora_host_adapters")[()] == 2
        assert metric(live, "multilora:lora_host_bytes")[()] >= metric(live, "multilora:lora_device_bytes")[()] > 0
        loads = metric(live, "multilora:lora_loads_total")[()]
        assert loads >= 5 + 2, "each once at start, and those that had left again"
        assert metric(live, "multilora:lora_load_seconds_count")[()] == loads
        assert metric(live, "multilora:lora_evictions_total")[("host",)] >= 5
        assert sum(metric(live, "multilora:lora_hits_total").values()) == 4
        requests = metric(live, "multilora:adapter_requests_total")
        assert requests == {("sort",): 2, ("chat-a",): 1, ("other",): 1}
        assert metric(live, "multilora:adapter_tokens_total")["chat-a", "generation"] > 0
        httpx.delete(f"{live.url}/v1/adapters/sort")
        httpx.post(f"{live.url}/v1/predict", json={"task": "tag", "inputs": "the fox"}, timeout=60)
        assert ("tag",) in metric(live, "multilora:adapter_requests_total"), "it has the place of one that is gone"
        assert ("sort",) not in metric(live, "multilora:adapter_requests_total")


def test_request_ids_come_back(live: Live) -> None:
    given = httpx.get(f"{live.url}/health", headers={"x-request-id": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    made = [httpx.get(f"{live.url}/nowhere").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    bad = httpx.get(f"{live.url}/health", headers={"x-request-id": "a b\t<c>"})
    assert bad.headers["x-request-id"] != "a b\t<c>"


def test_the_api_describes_itself(live: Live) -> None:
    described = httpx.get(f"{live.url}/openapi.json").json()["paths"]
    for path in ("/v1/predict", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify",
                 "/v1/models", "/v1/adapters", "/v1/adapters/{name}", "/health", "/ready", "/metrics"):  # fmt: skip
        assert path in described


def test_every_route_tells_what_any_of_them_may_answer(live: Live) -> None:
    described = httpx.get(f"{live.url}/openapi.json").json()["paths"]
    for path, methods in described.items():
        for method, operation in methods.items():
            told = {int(status) for status in operation["responses"]}
            shared = {413} if path in ("/health", "/ready") else {401, 403, 413, 429, 500, 503}
            assert shared <= told, f"{method} {path}"
            assert ({401, 403, 429} & told == set()) == (path in ("/health", "/ready"))
            for status in filter(lambda status: status >= 400, told):
                assert "ErrorBody" in str(operation["responses"][str(status)]["content"]["application/json"])


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/tokenize", "/v1/adapters/sort/merge", "/v1/nothing"])
def test_routes_that_are_not_there_answer_404(live: Live, path: str) -> None:
    answer = httpx.post(live.url + path, json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_while_the_base_loads_requests_are_told_to_wait() -> None:
    release = threading.Event()

    def load() -> LoadedBase:
        assert release.wait(60)
        raise RuntimeError("the disk is gone")

    service = Service(ServerConfig(), load)
    with live_server(service, wait=False) as live:
        assert httpx.get(f"{live.url}/health").status_code == 200
        for answer in (
            httpx.get(f"{live.url}/ready"),
            httpx.get(f"{live.url}/v1/models"),
            httpx.get(f"{live.url}/v1/adapters"),
            httpx.put(f"{live.url}/v1/adapters/x", json={"source": "x"}),
            httpx.post(f"{live.url}/v1/predict", json={"task": "x", "inputs": "y"}),
            httpx.post(f"{live.url}/v1/embeddings", json={"model": "x", "input": "y"}),
            httpx.post(f"{live.url}/v1/chat/completions", json={"model": "x", "messages": [_message()]}),
        ):
            assert answer.status_code == 503, answer.request.url
            assert answer.headers["retry-after"]
            assert "loaded" in answer.json()["error"]["message"]
        assert metric(live, "multilora:adapters")[()] == 0
        release.set()
        live.wait_started()
        assert service.async_engine.state is EngineState.FAILED
        failed = httpx.get(f"{live.url}/health")
        assert failed.status_code == 500
        assert "the disk is gone" in failed.json()["error"]["message"]
        assert httpx.get(f"{live.url}/ready").status_code == 503


def test_a_failing_step_ends_every_request_with_an_error(
    base_location: dict[str, str], tiny_adapters: Path, caplog: Any
) -> None:
    service = service_for(base_location["tiny-llama"], "tiny", adapter_dir=str(tiny_adapters))
    with live_server(service) as live:
        service.async_engine.engine.base.body.norm = nn.Linear(1, 1)  # the next step must fail
        answer = httpx.post(f"{live.url}/v1/predict", json={"task": "tiny", "inputs": ["the fox", "the dog"]})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert answer.headers["x-request-id"]
        assert httpx.get(f"{live.url}/health").status_code == 500
        later = httpx.post(f"{live.url}/v1/predict", json={"task": "tiny", "inputs": "the fox"})
        assert later.status_code == 503
    assert "the engine's step failed" in caplog.text


def _message() -> dict[str, str]:
    return {"role": "user", "content": "hello"}

"""Keys over HTTP: every route asks for one, rights and patterns hold, rates and shares too, and nothing is told."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.routing import iter_route_contexts

from server.api.app import create_app
from server.api.authentication import OPEN
from server.keys import make_key
from tests.support import Live, live_server, service_for

KEYS: dict[str, dict[str, Any]] = {
    "user": {"rights": ["infer"], "adapters": ["chat-*", "sort"]},
    "everything": {"rights": ["infer", "admin"]},
    "team": {"rights": ["admin"], "adapters": ["chat-*"]},
    "scraper": {"rights": ["metrics"]},
    "slow": {"rights": ["infer"], "requests_per_minute": 2},
    "small": {"rights": ["infer"], "queue_share": 0.5},
}
CHAT = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 3}
REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "predict": ("POST", "/v1/predict", {"task": "sort", "inputs": "the fox"}),
    "chat": ("POST", "/v1/chat/completions", {"model": "chat-a", **CHAT}),
    "other chat": ("POST", "/v1/chat/completions", {"model": "tiny", **CHAT}),
    "embeddings": ("POST", "/v1/embeddings", {"model": "tiny", "input": "the fox"}),
    "tokenize": ("POST", "/tokenize", {"prompt": "the fox"}),
    "tokenize for": ("POST", "/tokenize", {"model": "tag", "prompt": "the fox"}),
    "model": ("GET", "/v1/models/tag", {}),
    "adapters": ("GET", "/v1/adapters", {}),
    "adapter": ("GET", "/v1/adapters/chat-a", {}),
    "other adapter": ("GET", "/v1/adapters/sort", {}),
    "unknown adapter": ("GET", "/v1/adapters/chat-none", {}),
    "put another's": ("PUT", "/v1/adapters/chat-mine", {"source": "sort"}),
    "load another's": ("POST", "/v1/load_lora_adapter", {"lora_name": "chat-mine", "lora_path": "./chat-a/../sort"}),
    "load as another": ("POST", "/v1/load_lora_adapter", {"lora_name": "tag", "lora_path": "chat-a"}),
    "unload another's": ("POST", "/v1/unload_lora_adapter", {"lora_name": "sort"}),
    "delete another's": ("DELETE", "/v1/adapters/sort", {}),
    "metrics": ("GET", "/metrics", {}),
    "docs": ("GET", "/docs", {}),
    "version": ("GET", "/version", {}),
    "nowhere": ("GET", "/nowhere", {}),
}
ALLOWED = {
    "user": {"predict": 200, "chat": 200, "tokenize": 200, "docs": 200, "version": 200, "nowhere": 404},
    "team": {"adapters": 200, "adapter": 200, "unknown adapter": 404, "metrics": 200, "docs": 200, "version": 200,
             "nowhere": 404},
    "scraper": {"metrics": 200, "docs": 200, "version": 200, "nowhere": 404},
}  # fmt: skip


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The key file, and name -> key."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return path, {name: make_key(path, name, **settings) for name, settings in KEYS.items()}


@pytest.fixture(scope="module")
def guarded(
    base_location: dict[str, str], tiny_adapters: Path, keys: tuple[Path, dict[str, str]], tmp_path_factory: Any
) -> Iterator[Live]:
    """A server that asks for keys."""
    folder = tmp_path_factory.mktemp("guarded")
    shutil.copytree(tiny_adapters, folder, dirs_exist_ok=True)
    settings = {"adapter_dir": str(folder), "api_key_file": str(keys[0]), "max_waiting": 4}
    with live_server(service_for(base_location["tiny-llama"], "tiny", **settings)) as live:
        yield live


def ask(live: Live, key: str | None, what: str) -> httpx.Response:
    method, path, body = REQUESTS[what]
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.request(method, live.url + path, json=body or None, headers=headers, timeout=60)


def test_every_route_but_two_asks_for_a_key(guarded: Live) -> None:
    app = create_app(guarded.service)
    walked = 0
    for route in iter_route_contexts(app.routes):
        path = (route.path or "").replace("{name}", "chat-a").replace("{model}", "chat-a")
        for method in route.methods or ():
            for headers in ({}, {"authorization": "Bearer ml-wrong"}, {"authorization": "Basic bWw6bWw="}):
                answer = httpx.request(method, guarded.url + path, headers=headers)
                if path in OPEN:
                    assert answer.status_code == 200
                    continue
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.headers["x-request-id"]
                assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"
                walked += 1
    assert walked > 60
    assert httpx.get(guarded.url + "/nowhere").status_code == 401


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("what", REQUESTS)
def test_rights_and_patterns(guarded: Live, keys: tuple[Path, dict[str, str]], name: str, what: str) -> None:
    answer = ask(guarded, keys[1][name], what)
    expected = ALLOWED[name].get(what, 403)
    assert answer.status_code == expected, answer.text
    if expected == 403:
        assert answer.json()["error"]["code"] == "forbidden"


def test_lists_hold_what_the_caller_may_use(guarded: Live, keys: tuple[Path, dict[str, str]]) -> None:
    (Path(guarded.service.config.adapter_dir) / "broken").mkdir(exist_ok=True)
    clients = {
        name: openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=keys[1][name]) for name in ("user", "everything")
    }
    listed = {name: {model.id for model in client.models.list()} for name, client in clients.items()}
    for client in clients.values():
        client.close()
    assert listed == {
        "user": {"chat-a", "chat-b", "sort"}, "everything": {"tiny", "chat-a", "chat-b", "sort", "tag", "embed"},
    }  # fmt: skip
    rows = ask(guarded, keys[1]["team"], "adapters").json()["data"]
    assert {row["name"] for row in rows} == {"chat-a", "chat-b"}


def test_an_item_that_is_forbidden_fails_alone(guarded: Live, keys: tuple[Path, dict[str, str]]) -> None:
    items = [{"task": "sort", "input": "the fox"}, {"task": "tag", "input": "the fox"}]
    headers = {"authorization": f"bearer {keys[1]['user']}"}
    answer = httpx.post(f"{guarded.url}/v1/predict", json={"items": items}, headers=headers, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["results"][0]["label"]
    assert answer.json()["results"][1]["error"]["code"] == "forbidden"


def test_a_rate_is_kept(guarded: Live, keys: tuple[Path, dict[str, str]]) -> None:
    answers = [ask(guarded, keys[1]["slow"], "version") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"


def test_a_share_of_the_queue_is_all_that_one_may_take(guarded: Live, keys: tuple[Path, dict[str, str]]) -> None:
    def predict(name: str, count: int) -> httpx.Response:
        headers = {"authorization": f"Bearer {keys[1][name]}"}
        body = {"task": "sort", "inputs": ["the fox"] * count}
        return httpx.post(f"{guarded.url}/v1/predict", json=body, headers=headers, timeout=60)

    assert predict("small", 2).status_code == 200
    refused = predict("small", 3)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert "of yours" in refused.json()["error"]["message"]
    assert predict("user", 4).status_code == 200
    assert predict("user", 5).status_code == 429


def test_a_key_that_is_taken_out_of_the_file_is_refused(base_location: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, other = make_key(path, "a"), make_key(path, "b")
    with live_server(service_for(base_location["tiny-llama"], "tiny", api_key_file=str(path))) as live:
        assert ask(live, key, "version").status_code == 200
        content = json.loads(path.read_text())
        content["keys"] = content["keys"][1:]
        path.write_text(json.dumps(content))
        while ask(live, key, "version").status_code != 401:
            pass
        assert ask(live, other, "version").status_code == 200


def test_the_log_holds_who_asked_but_no_key(
    guarded: Live, keys: tuple[Path, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    path, known = keys
    hashes = [entry["sha256"] for entry in json.loads(path.read_text())["keys"]]
    with caplog.at_level(logging.DEBUG):
        for key in (known["user"], known["scraper"], "ml-mistyped", None):
            for what in REQUESTS:
                answer = ask(guarded, key, what)
                assert key is None or key not in answer.text + str(answer.headers)
    ours = [record for record in caplog.records if record.name.startswith(("server", "adapters", "uvicorn"))]
    assert {record.__dict__["fields"]["key"] for record in ours if "key" in record.__dict__.get("fields", {})} == {
        "user",
        "scraper",
    }
    told = "\n".join(f"{record.getMessage()} {record.__dict__}" for record in ours)
    for secret in (*known.values(), *hashes, "ml-mistyped"):
        assert secret not in told

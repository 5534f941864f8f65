"""Adapters come, change and go over HTTP while the server serves."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.engine.request import StepRecord
from tests.support import Live, Spec, live_server, make_adapter, service_for

HELLO = [{"role": "user", "content": "the quick brown fox"}]


@pytest.fixture
def root(tmp_path: Path, tiny_adapters: Path) -> Path:
    """A copy of the tiny adapters, below which adapters may be loaded."""
    return Path(shutil.copytree(tiny_adapters, tmp_path / "root"))


@pytest.fixture
def changing(base_location: dict[str, str], root: Path) -> Iterator[Live]:
    """A server that starts without adapters."""
    service = service_for(base_location["tiny-llama"], "tiny", adapter_root=str(root), max_cpu_loras=3)
    with live_server(service) as running:
        yield running


def put(live: Live, name: str, source: str) -> httpx.Response:
    return httpx.put(f"{live.url}/v1/adapters/{name}", json={"source": source}, timeout=60)


def chat(live: Live, model: str) -> str:
    body = {"model": model, "messages": HELLO, "temperature": 0, "max_tokens": 8}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def names(live: Live) -> list[str]:
    return [row["name"] for row in httpx.get(f"{live.url}/v1/adapters").json()["data"]]


def test_put_serves_at_once_and_the_same_again_changes_nothing(changing: Live) -> None:
    first = put(changing, "support", "chat-a")
    assert first.status_code == 201
    assert first.json()["digest"] == first.headers["x-adapter-digest"]
    again = put(changing, "support", "chat-a")
    assert (again.status_code, again.json()["digest"]) == (200, first.json()["digest"])
    assert chat(changing, "support") != chat(changing, "tiny")
    assert names(changing) == ["support"]


def test_new_content_replaces_the_old(changing: Live) -> None:
    old = put(changing, "support", "chat-a").json()["digest"]
    before = chat(changing, "support")
    answer = put(changing, "support", "chat-b")
    assert answer.status_code == 201
    assert answer.json()["digest"] != old
    assert chat(changing, "support") != before


def test_delete_ends_the_name_and_frees(changing: Live) -> None:
    size = put(changing, "support", "chat-a").json()["bytes"]
    answer = httpx.delete(f"{changing.url}/v1/adapters/support")
    assert (answer.status_code, answer.json()["freed_bytes"]) == (200, size)
    body = {"model": "support", "messages": HELLO}
    gone = httpx.post(f"{changing.url}/v1/chat/completions", json=body)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert httpx.delete(f"{changing.url}/v1/adapters/support").status_code == 404


def test_a_running_request_ends_on_the_version_it_started_with(changing: Live) -> None:
    put(changing, "support", "chat-a")
    body = {"model": "support", "prompt": "fox", "seed": 3, "max_tokens": 200, "ignore_eos": True}
    expected = httpx.post(f"{changing.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

    async def replace_in_between() -> tuple[str, int]:
        async with httpx.AsyncClient(base_url=changing.url, timeout=60) as client:
            text = ""
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
                events = stream.aiter_lines()
                await anext(events)
                replaced = await client.put("/v1/adapters/support", json={"source": "chat-b"})
                deleted = await client.delete("/v1/adapters/support")
                assert (replaced.status_code, deleted.status_code) == (201, 200)
                async for line in events:
                    if line.startswith("data: {"):
                        text += httpx.Response(200, text=line[6:]).json()["choices"][0]["text"]
            return text, deleted.json()["freed_bytes"]

    rest, freed = asyncio.run(replace_in_between())
    assert expected.endswith(rest)
    assert len(rest) > len(expected) // 2
    assert freed > 0
    assert names(changing) == []


def test_one_adapter_shows_its_coverage(live: Live) -> None:
    row = httpx.get(f"{live.url}/v1/adapters/tag").json()
    assert row["task_type"] == "TOKEN_CLS"
    assert row["labels"] == [f"LABEL_{i}" for i in range(4)]
    assert row["rank"] == 16
    assert any("score" in place for place in row["coverage"].values())
    assert httpx.get(f"{live.url}/v1/adapters/absent").status_code == 404


def test_the_list_is_paged_and_filtered(live: Live) -> None:
    first = httpx.get(f"{live.url}/v1/adapters", params={"limit": 2}).json()
    assert [row["name"] for row in first["data"]] == ["chat-a", "chat-b"]
    assert first["has_more"]
    rest = httpx.get(f"{live.url}/v1/adapters", params={"after": "chat-b"}).json()
    assert [row["name"] for row in rest["data"]] == ["embed", "sort", "tag"]
    assert not rest["has_more"]
    assert httpx.get(f"{live.url}/v1/adapters", params={"state": "refused"}).json()["data"] == []
    assert httpx.get(f"{live.url}/v1/adapters", params={"state": "lost"}).status_code == 422


def test_no_memory_for_one_more(changing: Live) -> None:
    for name, source in (("a", "chat-a"), ("b", "chat-b"), ("c", "sort")):
        assert put(changing, name, source).status_code == 201
    full = put(changing, "d", "tag")
    assert full.status_code == 503
    assert full.headers["retry-after"]
    assert put(changing, "again", "chat-a").status_code == 201, "the same content needs no more memory"


@pytest.mark.parametrize("source", ["../outside", "/etc", "chat-a/../../outside", "a\0b", "x" * 4000])
def test_paths_outside_the_root_are_refused(changing: Live, root: Path, source: str) -> None:
    shutil.copytree(root / "chat-a", root.parent / "outside")
    answer = put(changing, "support", source)
    assert answer.status_code == 422
    assert str(root.parent) not in answer.text
    assert names(changing) == []


def test_a_link_out_of_the_root_is_refused(changing: Live, root: Path) -> None:
    shutil.copytree(root / "chat-a", root.parent / "outside")
    (root / "link").symlink_to(root.parent / "outside")
    assert put(changing, "support", "link").status_code == 422


@pytest.mark.parametrize("name", ["tiny", "a b", ".hidden", "x" * 200, "ä"])
def test_names_that_are_refused(changing: Live, name: str) -> None:
    answer = put(changing, name, "chat-a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_name")


def test_vllm_routes(changing: Live) -> None:
    def load(**body: object) -> httpx.Response:
        return httpx.post(f"{changing.url}/v1/load_lora_adapter", json=body, timeout=60)

    answer = load(lora_name="sql", lora_path="chat-a")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert load(lora_name="sql", lora_path="chat-a").status_code == 400
    assert load(lora_name="sql", lora_path="chat-b").status_code == 400
    assert load(lora_name="sql", lora_path="chat-b", load_inplace=True).status_code == 200
    assert load(lora_name="other", lora_path="nowhere").status_code == 404
    assert load(lora_name="other").status_code == 422
    assert names(changing) == ["sql"]
    answer = httpx.post(f"{changing.url}/v1/unload_lora_adapter", json={"lora_name": "sql"})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    answer = httpx.post(f"{changing.url}/v1/unload_lora_adapter", json={"lora_name": "sql"})
    assert answer.status_code == 404


def test_more_adapters_than_slots_take_turns(base_location: dict[str, str], root: Path) -> None:
    for i in range(5):
        make_adapter(base_location["tiny-llama"], root, Spec(f"more-{i}", "SEQ_CLS", 4, ["q_proj"], labels=2))
    service = service_for(base_location["tiny-llama"], "tiny", adapter_dir=str(root), max_loras=2)
    with live_server(service) as live:
        engine = service.async_engine.engine
        tasks = ["chat-a", "chat-b", "sort", *(f"more-{i}" for i in range(5))]
        items = [{"task": task, "input": "the fox"} for task in tasks * 3]
        answer = httpx.post(f"{live.url}/v1/predict", json={"items": items}, timeout=60)
        assert [result["task"] for result in answer.json()["results"]] == tasks * 3
        assert all("error" not in result for result in answer.json()["results"])
        steps: list[StepRecord] = list(engine.steps)
        assert max(len({slot for slot in step.slots if slot >= 0}) for step in steps) == 2

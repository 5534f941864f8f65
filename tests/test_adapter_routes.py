"""Adapters come, change and go over HTTP while the server serves."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engine.request import StepRecord
from server.service import Service
from tests.support import Live, Spec, live_server, make_adapter, service_for

HELLO = [{"role": "user", "content": "the quick brown fox"}]


@pytest.fixture
def root(tmp_path: Path, tiny_adapters: Path) -> Path:
    """A copy of the tiny adapters, below which adapters may be loaded."""
    return Path(shutil.copytree(tiny_adapters, tmp_path / "root"))


@pytest.fixture
def changing(base_location: dict[str, str], root: Path) -> Iterator[Live]:
    """A server that starts without adapters."""
    service = service_for(base_location["tiny-llama"], "tiny", adapter_root=str(root), max_loras=3, max_cpu_loras=3)
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
    digest = put(changing, "support", "chat-a").json()["digest"]
    held = changing.service.registry.host.num_bytes
    answer = httpx.delete(f"{changing.url}/v1/adapters/support")
    assert answer.json() == {"name": "support", "digest": digest, "freed_bytes": held}
    assert changing.service.registry.host.num_bytes == 0 < held
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
    assert row["modules"]["layers.0.self_attn.q_proj"] == {"rank": 16, "scaling": 2.0}
    assert row["host_bytes"] > 0
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


def test_more_adapters_than_host_memory_holds_are_all_served(changing: Live) -> None:
    sources = ("chat-a", "chat-b", "sort", "tag", "embed")
    for source in sources:
        assert put(changing, source, source).status_code == 201
    tiers = [row["tier"] for row in httpx.get(f"{changing.url}/v1/adapters").json()["data"]]
    assert sorted(tiers) == ["disk", "disk", "host", "host", "host"]
    items = [{"task": source, "input": "the fox"} for source in sources * 3]
    answer = httpx.post(f"{changing.url}/v1/predict", json={"items": items}, timeout=60)
    assert all("error" not in result for result in answer.json()["results"])
    changing.service.async_engine.engine.registry.check_integrity()


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


def files(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "README.md"}


def upload(live: Live, name: str, content: dict[str, bytes]) -> httpx.Response:
    return httpx.put(f"{live.url}/v1/adapters/{name}", files=content, timeout=60)


def test_an_upload_is_served_like_a_path(changing: Live, root: Path) -> None:
    first = upload(changing, "support", files(root / "chat-a"))
    assert first.status_code == 201, first.text
    assert first.headers["x-adapter-digest"] == first.json()["digest"]
    assert upload(changing, "support", files(root / "chat-a")).status_code == 200
    assert put(changing, "support", "chat-a").status_code == 200, "the same content, by another way"
    by_path = put(changing, "other", "chat-b")
    assert upload(changing, "support", files(root / "chat-b")).json()["digest"] == by_path.json()["digest"]


def test_uploads_that_are_refused_leave_nothing(changing: Live, root: Path) -> None:
    good = files(root / "chat-a")
    broken = upload(changing, "a", {**good, "adapter_model.safetensors": b"no tensors"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (422, "invalid_adapter")
    assert "adapter_model.safetensors is broken" in broken.json()["error"]["message"]
    extra = upload(changing, "a", {**good, "virus.exe": b"x"})
    assert (extra.status_code, extra.json()["error"]["code"]) == (422, "invalid_upload")
    url = f"{changing.url}/v1/adapters/a"
    assert httpx.put(url, content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.put(url, json={"source": "chat-a", "more": 1}).status_code == 422
    store = changing.service.lifecycle.catalog.store
    assert names(changing) == []
    assert store.audit() == []
    assert list(store.path("x").parent.parent.joinpath("incoming").iterdir()) == []


def test_an_upload_over_the_limit(base_location: dict[str, str], root: Path) -> None:
    service = service_for(base_location["tiny-llama"], "tiny", max_adapter_bytes=1000)
    with live_server(service) as live:
        by_loader = upload(live, "a", files(root / "chat-a"))
        assert (by_loader.status_code, by_loader.json()["error"]["code"]) == (422, "invalid_adapter")
        too_large = upload(live, "a", {"adapter_model.safetensors": b"\0" * (5 << 20)})
        assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "too_large")


def test_rollback_and_one_version_by_its_digest(changing: Live, root: Path) -> None:
    first = upload(changing, "support", files(root / "chat-a")).json()["digest"]
    before = chat(changing, "support")
    second = upload(changing, "support", files(root / "chat-b")).json()["digest"]
    after = chat(changing, "support")
    assert after != before
    assert chat(changing, f"support@{first[:10]}") == before
    assert chat(changing, f"support@{second}") == after
    kept = httpx.get(f"{changing.url}/v1/adapters/support").json()["versions"]
    assert [version["digest"] for version in kept] == [second, first]
    url = f"{changing.url}/v1/adapters/support/rollback"
    back = httpx.post(url, json={"digest": first[:10]})
    assert (back.status_code, back.headers["x-adapter-digest"]) == (200, first)
    assert chat(changing, "support") == before
    missing = httpx.post(url, json={"digest": "0000"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "version_not_found")
    assert httpx.post(f"{changing.url}/v1/adapters/none/rollback", json={"digest": first}).status_code == 404
    assert httpx.post(url, json={"digest": "not hexadecimal"}).status_code == 422


@pytest.mark.parametrize("model", ["support@0000", "none@1234", "tiny@1234", "support@"])
def test_versions_that_are_not_there(changing: Live, root: Path, model: str) -> None:
    upload(changing, "support", files(root / "chat-a"))
    body = {"model": model, "messages": HELLO}
    answer = httpx.post(f"{changing.url}/v1/chat/completions", json=body)
    assert answer.status_code == 404, answer.text


def test_pins_come_onto_the_device(changing: Live, root: Path) -> None:
    for name in ("chat-a", "chat-b", "sort"):
        put(changing, name, name)

    def pin(name: str, pinned: bool) -> httpx.Response:
        return httpx.post(f"{changing.url}/v1/adapters/{name}/pin", json={"pinned": pinned})

    assert pin("chat-a", True).json()["pinned"]
    assert pin("sort", True).status_code == 200
    full = pin("chat-b", True)
    assert (full.status_code, full.json()["error"]["code"]) == (409, "too_many_pins")
    for _ in range(1000):  # the engine places it at its next step: ask until it has
        tiers = {r["name"]: r["tier"] for r in httpx.get(f"{changing.url}/v1/adapters").json()["data"]}
        if tiers["chat-a"] == tiers["sort"] == "device":
            break
    assert tiers == {"chat-a": "device", "sort": "device", "chat-b": "host"}
    assert not pin("sort", False).json()["pinned"]
    assert pin("none", True).status_code == 404


def test_uploads_and_pins_are_there_after_a_restart(base_location: dict[str, str], root: Path, tmp_path: Path) -> None:
    def service() -> Service:
        return service_for(base_location["tiny-llama"], "tiny", store_dir=str(tmp_path / "kept"))

    with live_server(service()) as live:
        digest = upload(live, "support", files(root / "chat-a")).json()["digest"]
        text = chat(live, "support")
        httpx.post(f"{live.url}/v1/adapters/support/pin", json={"pinned": True})
        upload(live, "gone", files(root / "chat-b"))
        httpx.delete(f"{live.url}/v1/adapters/gone")
    with live_server(service()) as live:
        [row] = httpx.get(f"{live.url}/v1/adapters").json()["data"]
        assert (row["name"], row["digest"], row["pinned"]) == ("support", digest, True)
        assert chat(live, "support") == text


def test_two_servers_do_not_share_a_store(base_location: dict[str, str], tmp_path: Path) -> None:
    settings = {"store_dir": str(tmp_path / "kept")}
    with live_server(service_for(base_location["tiny-llama"], "tiny", **settings)):
        second = service_for(base_location["tiny-llama"], "tiny", **settings)
        with live_server(second) as live:
            answer = httpx.get(f"{live.url}/ready")
            assert answer.status_code == 503
            assert "in use" in answer.json()["error"]["message"]


def test_a_full_disk_is_told(changing: Live, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(changing.service.lifecycle.catalog.store, "commit", full)
    answer = upload(changing, "support", files(root / "chat-a"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_space")
    assert answer.headers["retry-after"]
    assert names(changing) == []


def test_an_adapter_whose_files_break_while_it_waits(base_location: dict[str, str], root: Path) -> None:
    service = service_for(base_location["tiny-llama"], "tiny", adapter_dir=str(root), max_loras=1, max_cpu_loras=1)
    with live_server(service) as live:
        chat(live, "chat-b")
        (root / "chat-a" / "adapter_model.safetensors").write_bytes(b"broken")
        body = {"model": "chat-a", "messages": HELLO}
        answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) in [(503, "adapter_lost"), (422, "invalid_adapter")]
        assert chat(live, "chat-b")
        service.async_engine.engine.scheduler.check_integrity()


def wait_for(live: Live, name: str, status: int, **fields: object) -> dict[str, Any]:
    """Ask for an adapter until it is as expected: nothing tells from outside when the watch has seen it."""
    for _ in range(5000):
        answer = httpx.get(f"{live.url}/v1/adapters/{name}")
        row: dict[str, Any] = answer.json()
        if answer.status_code == status and all(row.get(key) == value for key, value in fields.items()):
            return row
    raise AssertionError(f"{name} is {answer.status_code} {row}, expected {status} {fields}")


def test_a_directory_that_is_dropped_in_changed_and_removed(base_location: dict[str, str], root: Path) -> None:
    shutil.move(root / "chat-b", root.parent / "chat-b")
    service = service_for(base_location["tiny-llama"], "tiny", adapter_dir=str(root))
    with live_server(service) as live:
        assert "chat-b" not in names(live)
        shutil.copytree(root.parent / "chat-b", root / "chat-b")
        dropped = wait_for(live, "chat-b", 200, state="ready")
        before = chat(live, "chat-b")
        shutil.copytree(root / "chat-a", root / "chat-b", dirs_exist_ok=True)
        digest = httpx.get(f"{live.url}/v1/adapters/chat-a").json()["digest"]
        assert digest != dropped["digest"]
        wait_for(live, "chat-b", 200, digest=digest)
        assert chat(live, "chat-b") == chat(live, "chat-a") != before
        shutil.rmtree(root / "chat-b")
        wait_for(live, "chat-b", 404)


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

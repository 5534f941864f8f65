"""Broken checkpoints over HTTP: 422 and the fault by name, listed as refused at start; the server goes on serving."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import ServerConfig
from tests.support import Live, live_server, service_for
from tests.test_checkpoint import BROKEN, LIMITS, Break, Workshop

LIMIT_FLAGS: dict[str, Any] = {n: v for n, v in vars(LIMITS).items() if n in ServerConfig.__dataclass_fields__}
BASE_OF = {"chat": "tiny-llama", "sort": "tiny-llama", "biased": "tiny-bert"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def servers(base_location: dict[str, str], workshop: Workshop, root: Path) -> Iterator[dict[str, Live]]:
    """One for each base, each with a good adapter named `good`."""
    for name in ("sort", "biased"):
        shutil.copytree(workshop.good[name], root / f"good-{name}")
    llama = service_for(base_location["tiny-llama"], "base", adapter_root=str(root), **LIMIT_FLAGS)
    bert = service_for(base_location["tiny-bert"], "base", adapter_root=str(root), **LIMIT_FLAGS)
    with live_server(llama) as on_llama, live_server(bert) as on_bert:
        assert put(on_llama, "good", "good-sort").status_code == 201
        assert put(on_bert, "good", "good-biased").status_code == 201
        yield {"tiny-llama": on_llama, "tiny-bert": on_bert}


def put(live: Live, name: str, source: str) -> httpx.Response:
    return httpx.put(f"{live.url}/v1/adapters/{name}", json={"source": source}, timeout=60)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_and_nothing_changes(
    case: str, workshop: Workshop, root: Path, servers: dict[str, Live]
) -> None:
    name, break_it, fault = BROKEN[case]
    live = servers[BASE_OF[name]]
    (root / case).mkdir()
    break_it(workshop.copy(name, root / case))
    before = httpx.get(f"{live.url}/v1/adapters").json()
    for target in ("broken", "good"):
        answer = put(live, target, f"{case}/{name}")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (422, "invalid_adapter")
        assert re.search(fault, error["message"]), error["message"]
        assert str(root) not in error["message"]
    assert httpx.get(f"{live.url}/v1/adapters").json() == before
    served = httpx.post(f"{live.url}/v1/predict", json={"task": "good", "inputs": "the fox"}, timeout=60)
    assert served.status_code == 200
    live.service.registry.check_integrity()


def test_an_adapter_of_another_base_is_refused(servers: dict[str, Live]) -> None:
    answer = put(servers["tiny-bert"], "other", "good-sort")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_adapter")
    assert "the base has no linear layer" in answer.json()["error"]["message"]


def test_a_broken_directory_is_listed_and_touches_nothing_else(
    base_location: dict[str, str], workshop: Workshop, tmp_path: Path
) -> None:
    cases: dict[str, Break] = {case: BROKEN[case][1] for case in ("truncated", "nan", "rank-zero", "no-config")}
    for case, break_it in cases.items():
        break_it(Path(shutil.copytree(workshop.good["chat"], tmp_path / case)))
    shutil.copytree(workshop.good["sort"], tmp_path / "sort")
    (tmp_path / "notes.txt").write_text("no adapter")
    service = service_for(base_location["tiny-llama"], "base", adapter_dir=str(tmp_path))
    with live_server(service) as live:
        rows = {row["name"]: row for row in httpx.get(f"{live.url}/v1/adapters").json()["data"]}
        assert {name: row["state"] for name, row in rows.items()} == {
            "truncated": "refused", "nan": "refused", "rank-zero": "refused", "no-config": "refused", "sort": "ready",
        }  # fmt: skip
        for case in cases:
            assert re.search(BROKEN[case][2], rows[case]["reasons"][0])
        shutil.copytree(workshop.good["chat"], tmp_path / "nan", dirs_exist_ok=True)
        assert httpx.get(f"{live.url}/v1/adapters/nan").json()["state"] == "refused"
        assert put(live, "nan", "nan").status_code == 201, "mended, it is served"
        assert httpx.get(f"{live.url}/v1/adapters?state=refused").json()["data"] != []
        states = {row["name"]: row["state"] for row in httpx.get(f"{live.url}/v1/adapters").json()["data"]}
        assert states["nan"] == "ready"

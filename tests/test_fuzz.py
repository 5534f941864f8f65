"""A short run of `make fuzz`: what the server answers is what /openapi.json says."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx

from tests.fuzz import NAME, fuzz
from tests.support import live_server, service_for


def test_the_answers_are_those_described(base_location: dict[str, str], tiny_adapters: Path, tmp_path: Path) -> None:
    root, adapters, run = tmp_path / "root", tmp_path / "adapters", tmp_path / "run"
    for copy in (root, adapters):
        shutil.copytree(tiny_adapters, copy)
    run.mkdir()
    settings = {"adapter_dir": str(adapters), "adapter_root": str(root)}
    with live_server(service_for(base_location["tiny-llama"], NAME, **settings)) as live:
        found = fuzz(live, run, examples=10)
        described = httpx.get(f"{live.url}/openapi.json").json()["paths"]
        assert httpx.get(f"{live.url}/ready").status_code == 200
    assert found.status == 0, found.output
    assert found.cases > 1000
    routes = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    assert found.routes.keys() == routes
    for route, answers in found.routes.items():
        assert answers.served > 0.1, f"{route} hardly ever gets past its checks:\n{found.table()}"

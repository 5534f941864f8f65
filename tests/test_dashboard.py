"""The Grafana dashboard asks for series that the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx

from tests.support import Live

FILE = Path(__file__).parent.parent / "dashboards" / "grafana.json"


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(FILE.read_text())["panels"]
    return found


def test_every_series_is_there(live: Live) -> None:
    for task in ("chat-a", "sort"):
        answer = httpx.post(f"{live.url}/v1/predict", json={"task": task, "inputs": "the fox"}, timeout=60)
        assert answer.status_code == 200
    lines = [line for line in httpx.get(f"{live.url}/metrics").text.splitlines() if not line.startswith("#")]
    labels = {re.split(r"[{ ]", line)[0]: line for line in lines}
    expressions = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    assert len(expressions) > 30
    for expression in expressions:
        names = re.findall(r"multilora:\w+", expression)
        assert names
        for name in names:
            assert name in labels, f"{name} of {expression}"
        for label in re.findall(r"by \((?:le, )?(\w+)\)", expression):
            assert label == "le" or f'{label}="' in labels[names[0]], expression


def test_panels_stand_apart() -> None:
    places = [panel["gridPos"] for panel in panels()]
    assert len({panel["id"] for panel in panels()}) == len(places)
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert all(x < 24 for x, _ in cells)

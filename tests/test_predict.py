"""POST /v1/predict over a real socket: every kind of task, in one call and in one forward pass."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from adapters.batch import NO_SLOT
from tests.support import Live

TEXT = "the quick brown fox jumps"
MIXED: list[dict[str, Any]] = [
    {"task": "chat-a", "input": TEXT, "parameters": {"max_tokens": 6}},
    {"task": "chat-b", "input": TEXT, "parameters": {"max_tokens": 6}},
    {"task": "sort", "input": TEXT},
    {"task": "tag", "input": TEXT},
    {"task": "embed", "input": TEXT},
    {"task": "tiny", "input": TEXT, "parameters": {"max_tokens": 6}},
]


def predict(live: Live, **body: object) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/predict", json=body, timeout=60)


def test_all_kinds_of_task_share_one_forward_pass(live: Live) -> None:
    engine = live.service.async_engine.engine
    for _ in range(10):  # a step may be ending just when the items arrive, and take only the first of them along
        engine.steps.clear()
        assert predict(live, items=MIXED).status_code == 200
        step = max(engine.steps, key=lambda s: len(s.tasks))
        if len(step.tasks) == len(MIXED):
            break
    slot_of = {name: engine.registry.current(name).slot for name, _ in engine.registry.list()} | {"tiny": NO_SLOT}
    types = [result["type"] for result in predict(live, items=MIXED).json()["results"]]
    expected = {(slot_of[item["task"]], kind) for item, kind in zip(MIXED, types, strict=True)}
    assert set(zip(step.slots, step.tasks, strict=True)) == expected
    assert len(expected) == 6, "five adapters and the base, four kinds of task"


def test_mixed_items_answer_in_order_as_each_would_alone(live: Live) -> None:
    results = predict(live, items=MIXED).json()["results"]
    assert [result["task"] for result in results] == [item["task"] for item in MIXED]
    for item, result in zip(MIXED, results, strict=True):
        alone = predict(live, items=[item]).json()["results"][0]
        assert set(alone) == set(result)
        for key, value in result.items():
            if key in ("text", "label", "type", "digest", "usage", "finish_reason"):
                assert alone[key] == value
            elif key == "embedding":
                np.testing.assert_allclose(alone[key], value, atol=1e-5)


def test_types_fix_the_fields(live: Live) -> None:
    chat, _, sort, tag, embed, base = predict(live, items=MIXED).json()["results"]
    assert (chat["type"], sort["type"], tag["type"]) == ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")
    assert isinstance(chat["text"], str)
    assert chat["usage"]["completion_tokens"] <= 6
    assert sort["score"] == max(sort["scores"].values())
    assert set(sort["scores"]) == {"LABEL_0", "LABEL_1", "LABEL_2"}
    for entity in tag["entities"]:
        assert TEXT[entity["start"] : entity["end"]] == entity["text"]
    assert "tokens" not in tag
    assert len(embed["embedding"]) == 64
    assert base["digest"] is None


def test_tokens_come_when_asked(live: Live) -> None:
    result = predict(live, task="tag", inputs=TEXT, tokens=True).json()["results"][0]
    assert "".join(token["text"] for token in result["tokens"]) == TEXT.replace(" ", "")


def test_one_task_with_a_list(live: Live) -> None:
    answer = predict(live, task="sort", inputs=["the fox", "the dog", "the fox"])
    first, _, third = answer.json()["results"]
    assert first["scores"] == pytest.approx(third["scores"], abs=1e-5)
    assert answer.headers["x-adapter"] == "sort"
    assert answer.headers["x-adapter-digest"] == first["digest"]


def test_a_bad_item_does_not_fail_the_others(live: Live) -> None:
    items = [{"task": "absent", "input": "x"}, {"task": "sort", "input": "x"}, {"task": "sort", "input": "the " * 300}]
    answer = predict(live, items=items)
    assert answer.status_code == 200
    absent, sort, long = answer.json()["results"]
    assert absent["error"]["code"] == "model_not_found"
    assert "label" in sort
    assert long["error"]["code"] == "context_length_exceeded"
    assert "256" in long["error"]["message"]


def test_when_all_items_are_bad_the_first_gives_the_status(live: Live) -> None:
    answer = predict(live, task="absent", inputs=["x", "y"])
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_parameters_are_refused_where_nothing_is_generated(live: Live) -> None:
    answer = predict(live, items=[{"task": "sort", "input": "x", "parameters": {"max_tokens": 3}}])
    assert answer.status_code == 400
    assert "SEQ_CLS" in answer.json()["error"]["message"]

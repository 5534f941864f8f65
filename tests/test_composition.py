"""Several adapters as one, for one request: peft's own sum of them, in a mixed batch, and nothing left afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM

from server.composition import names_in, parts_of, written
from server.keys import make_key
from tests.support import Live, Spec, live_server, make_adapter, random_ids, relative, service_for

SPECS = (
    Spec("a", "CAUSAL_LM", 4, ["q_proj", "up_proj"]),
    Spec("b", "CAUSAL_LM", 6, ["q_proj", "o_proj"], options={"use_rslora": True}),
    Spec("dora", "CAUSAL_LM", 4, ["q_proj"], options={"use_dora": True}),
    Spec("large", "CAUSAL_LM", 60, ["q_proj"]),
    Spec("sort", "SEQ_CLS", 4, ["q_proj"], labels=3),
    Spec("words", "CAUSAL_LM", 4, ["q_proj", "embed_tokens"]),
    Spec("logits", "CAUSAL_LM", 6, ["embed_tokens", "lm_head"]),
    Spec("own", "CAUSAL_LM", 4, ["q_proj"], options={"modules_to_save": ["lm_head"]}),
    Spec("e", "FEATURE_EXTRACTION", 4, ["q_proj"]),
    Spec("f", "FEATURE_EXTRACTION", 8, ["up_proj"]),
)
WEIGHTS = {"a": 0.7, "b": -0.4}
PROMPT = random_ids(12, 3)


@pytest.fixture(scope="module")
def adapters(base_location: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composed")
    for spec in SPECS:
        make_adapter(base_location["tiny-llama"], folder, spec)
    return folder


@pytest.fixture(scope="module")
def live(base_location: dict[str, str], adapters: Path) -> Iterator[Live]:
    with live_server(service_for(base_location["tiny-llama"], "tiny", adapter_dir=str(adapters))) as running:
        yield running


def complete(live: Live, **body: object) -> httpx.Response:
    given = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **body}
    return httpx.post(f"{live.url}/v1/completions", json=given, timeout=60)


def pefts(location: str, folder: Path, kind: Any, weights: dict[str, float]) -> Any:
    """peft's model of the base with its own composition."""
    (first, *rest) = weights
    model: Any = PeftModel.from_pretrained(
        kind.from_pretrained(location, dtype=torch.float32), folder / first, adapter_name=first
    )
    for name in rest:
        model.load_adapter(folder / name, adapter_name=name)
    model.add_weighted_adapter([*weights], [*weights.values()], "both", "cat")
    model.set_adapter("both")
    return model.eval()


@torch.no_grad()
def greedy(model: Any, count: int) -> list[int]:
    ids = [*PROMPT]
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_a_composition_is_pefts_in_a_mixed_batch(live: Live, base_location: dict[str, str], adapters: Path) -> None:
    expected = greedy(pefts(base_location["tiny-llama"], adapters, AutoModelForCausalLM, WEIGHTS), 6)
    tokenizer = live.service.loaded.tokenizer
    text = complete(live, adapters=WEIGHTS).json()["choices"][0]["text"]
    assert text == tokenizer.decode(expected)
    assert len({text, *(complete(live, model=name).json()["choices"][0]["text"] for name in ("a", "b", "tiny"))}) > 2
    answers = [complete(live, **({"adapters": WEIGHTS} if turn % 2 else {"model": "a"})) for turn in range(4)]
    assert answers[1].json()["choices"][0]["text"] == answers[3].json()["choices"][0]["text"] == text


def test_lora_on_embeddings_and_heads_is_composed_too(
    live: Live, base_location: dict[str, str], adapters: Path
) -> None:
    weights = {"words": 0.7, "logits": -0.4}
    expected = greedy(pefts(base_location["tiny-llama"], adapters, AutoModelForCausalLM, weights), 6)
    text = complete(live, adapters=weights).json()["choices"][0]["text"]
    assert text == live.service.loaded.tokenizer.decode(expected)
    assert text not in {complete(live, model=name).json()["choices"][0]["text"] for name in ("words", "logits", "tiny")}
    refused = complete(live, adapters={"words": 1, "own": 1})
    assert refused.status_code >= 400
    assert "tokens" in refused.json()["error"]["message"]


def test_vectors_are_composed_too(live: Live, base_location: dict[str, str], adapters: Path) -> None:
    weights = {"e": 1.5, "f": 0.5}
    model = pefts(base_location["tiny-llama"], adapters, AutoModel, weights)
    with torch.no_grad():
        last = model(input_ids=torch.tensor([PROMPT])).last_hidden_state[0, -1]
    body = {"model": "tiny", "adapters": weights, "input": PROMPT}
    answer = httpx.post(f"{live.url}/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    assert relative(answer.json()["data"][0]["embedding"], torch.nn.functional.normalize(last, dim=0)) < 1e-4


def test_the_digest_is_that_of_parts_and_weights(live: Live) -> None:
    digests = [
        complete(live, adapters=weights).headers["x-adapter-digest"]
        for weights in (WEIGHTS, dict(reversed(WEIGHTS.items())), {**WEIGHTS, "a": 0.8}, {"a": 1})
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_nothing_is_left(live: Live) -> None:
    assert complete(live, adapters=WEIGHTS).status_code == 200
    registry = live.service.registry
    registry.check_integrity()
    named = {entry.info.digest for _, entry in registry.list()}
    assert {digest for digest in registry._versions if digest not in named} == set()
    assert all(version.holders == 0 for version in registry._versions.values())


def test_many_at_once(live: Live) -> None:
    """Several compositions, their parts and the base, in one batch: each as alone."""
    bodies: list[dict[str, Any]] = [{"adapters": {"a": w, "b": 1 - w}} for w in np.linspace(-1, 1, 5)]
    bodies += [{"model": "a"}, {"model": "b"}, {"model": "tiny"}]
    alone = [complete(live, **body).json()["choices"][0]["text"] for body in bodies]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [*pool.map(lambda body: complete(live, **body), bodies * 4)]
    assert [answer.json()["choices"][0]["text"] for answer in answers] == alone * 4


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"adapters": {"a": 1, "absent": 1}}, 404, "absent"),
        ({"adapters": {"a": 1, "dora": 1}}, 400, "only plain LoRA is composed"),
        ({"adapters": {"a": 1, "sort": 1}}, 400, "different tasks: CAUSAL_LM, SEQ_CLS"),
        ({"adapters": {"a": 1, "large": 1, "b": 1}}, 400, "the ranks together are 70, over the limit 64"),
        ({"adapters": {"a": 1}, "model": "a"}, 400, "model must be 'tiny' then"),
        ({"adapters": {}}, 422, "adapters"),
        ({"adapters": {"a*1": 1}}, 422, "adapters"),
        ({"adapters": {f"a{i}": 1 for i in range(9)}}, 422, "adapters"),
        ({"model": "a*b"}, 404, "a*b"),
        ({"model": "a*1+*2"}, 404, ""),
    ],
)
def test_what_cannot_be_composed_is_told(body: dict[str, Any], status: int, reason: str, live: Live) -> None:
    answer = complete(live, **body)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"]["message"]
    live.service.registry.check_integrity()


def test_a_key_must_allow_every_part(base_location: dict[str, str], adapters: Path, tmp_path: Path) -> None:
    key = make_key(tmp_path / "keys.json", "team", adapters=["tiny", "a"])
    settings = {"adapter_dir": str(adapters), "api_key_file": str(tmp_path / "keys.json")}
    with live_server(service_for(base_location["tiny-llama"], "tiny", **settings)) as running:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1}
        for weights, status in (({"a": 1}, 200), ({"a": 1, "b": 1}, 403)):
            headers = {"authorization": f"Bearer {key}"}
            answer = httpx.post(f"{running.url}/v1/completions", json={**body, "adapters": weights}, headers=headers)
            assert answer.status_code == status, answer.text


def test_expressions() -> None:
    weights = {"b": 1e20, "a": -0.5, "c@12ab": 3}
    expression = written(weights)
    assert expression == "a*-0.5+b*1e20+c@12ab*3.0"
    assert dict(parts_of(expression)) == weights
    assert names_in(expression) == ("a", "b", "c@12ab")
    assert (parts_of("plain"), names_in("plain"), names_in("a*b")) == ((), ("plain",), ("a*b",))

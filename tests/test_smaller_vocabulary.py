"""Tokens that an adapter's embedding lacks: refused with the checkpoint, or with the prompt that has them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from transformers import AutoTokenizer

from server.config import ServerConfig
from server.inspection import inspect
from tests.support import Live, Spec, live_server, make_adapter, service_for

FEWER = 300
TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def fewer(base_location: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = Spec("fewer", "CAUSAL_LM", 4, ["q_proj"], vocabulary=FEWER)
    return make_adapter(base_location["tiny-llama"], tmp_path_factory.mktemp("fewer"), spec)


@pytest.mark.parametrize("files", ["none", "the base's", "a template"])
def test_the_bases_tokenizer_must_fit_the_adapters_embedding(
    base_location: dict[str, str], fewer: Path, tmp_path: Path, files: str
) -> None:
    location = base_location["tiny-llama"]
    copy = shutil.copytree(fewer, tmp_path / "fewer")
    if files == "the base's":
        AutoTokenizer.from_pretrained(location).save_pretrained(copy)
    elif files == "a template":
        (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    told = inspect(copy, ServerConfig(base=location, device="cpu"))
    assert told.reasons == ("the base's tokenizer, which it is served with, has token 319, its embedding 300 tokens",)


@pytest.fixture(scope="module")
def live(base_location: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A base whose tokenizer has more tokens than its embedding."""
    location = shutil.copytree(base_location["tiny-llama"], tmp_path_factory.mktemp("base") / "wide")
    tokenizer = AutoTokenizer.from_pretrained(location)
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save_pretrained(location)
    with live_server(service_for(location, "tiny")) as running:
        yield running


def test_a_text_with_a_token_beyond_the_embedding_is_refused(live: Live) -> None:
    body = {"model": "tiny", "max_tokens": 2}
    refused = [
        httpx.post(f"{live.url}/v1/completions", json={**body, "prompt": f"{TEXT}<beyond>"}, timeout=60),
        httpx.post(f"{live.url}/v1/completions", json={**body, "prompt": [5, 320]}, timeout=60),
        httpx.post(f"{live.url}/v1/embeddings", json={"model": "tiny", "input": "<beyond>"}, timeout=60),
    ]
    for answer in refused:
        assert answer.status_code == 400, answer.text
        assert "token id 320 is outside the vocabulary of 320" in answer.text
    assert httpx.post(f"{live.url}/v1/completions", json={**body, "prompt": TEXT}, timeout=60).status_code == 200

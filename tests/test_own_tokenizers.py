"""An adapter's own tokenizer: its tokens, its chat template, its end; and why one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from adapters.directory import signature_of, unfinished
from adapters.tokenizer_files import TOKENIZER_FILES
from server.config import ServerConfig
from server.inspection import inspect
from tests.support import Live, Spec, live_server, make_adapter, peft_model, service_for

SIZE = 328
NEW = [f"<new{i}>" for i in range(SIZE - 320)]
MORE = Spec("more", "CAUSAL_LM", 4, ["q_proj"], vocabulary=SIZE)
PLAIN = Spec("plain", "CAUSAL_LM", 4, ["q_proj"])
SAME = Spec("same", "CAUSAL_LM", 4, ["q_proj"])
TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


@pytest.fixture(scope="module")
def folder(base_location: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("languages")
    location = base_location["tiny-llama"]
    for spec in (MORE, PLAIN, SAME):
        make_adapter(location, folder, spec)
    tokenizer: Any = AutoTokenizer.from_pretrained(location)
    tokenizer.save_pretrained(folder / "same")
    templated = shutil.copytree(folder / "plain", folder / "templated")
    (templated / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer.add_tokens(NEW[:-1])
    tokenizer.add_special_tokens({"eos_token": NEW[-1]})
    tokenizer.chat_template = TEMPLATE + "<new0>"
    tokenizer.save_pretrained(folder / "more")
    return folder


@pytest.fixture(scope="module")
def live(base_location: dict[str, str], folder: Path) -> Iterator[Live]:
    with live_server(service_for(base_location["tiny-llama"], "tiny", adapter_dir=str(folder))) as running:
        yield running


def post(live: Live, path: str, **body: object) -> dict[str, Any]:
    answer = httpx.post(f"{live.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def tokens_of(live: Live, **body: object) -> list[int]:
    return list(post(live, "/tokenize", **body)["tokens"])


def test_new_tokens_are_read_and_written_by_their_adapter_alone(live: Live) -> None:
    assert tokens_of(live, model="more", prompt="<new0><new3>") == [320, 323]
    assert len(tokens_of(live, model="plain", prompt="<new0><new3>")) > 2
    assert len(tokens_of(live, prompt="<new0><new3>")) > 2
    assert post(live, "/detokenize", model="more", tokens=[323])["prompt"] == "<new3>"
    refused = httpx.post(f"{live.url}/detokenize", json={"model": "plain", "tokens": [323]})
    assert (refused.status_code, "vocabulary of 320" in refused.text) == (400, True)


def test_chat_has_the_adapters_template(live: Live) -> None:
    messages = [{"role": "user", "content": "fox"}]
    assert tokens_of(live, model="more", messages=messages)[-1] == 320
    plain, templated = (tokens_of(live, model=name, messages=messages) for name in ("plain", "templated"))
    assert post(live, "/detokenize", tokens=templated)["prompt"] == "[fox]"
    assert plain == tokens_of(live, messages=messages) == tokens_of(live, model="same", messages=messages) != templated


def test_completions_are_pefts_with_that_tokenizer(live: Live, base_location: dict[str, str], folder: Path) -> None:
    """Beside rows of the base and of a plain adapter."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "more")
    prompt = "the quick<new2> fox<new5>"
    model = peft_model(base_location["tiny-llama"], folder / "more", "CAUSAL_LM", vocabulary=SIZE)
    with torch.no_grad():
        output = model.generate(
            **tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False, pad_token_id=0,
            eos_token_id=[2, tokenizer.eos_token_id],
        )  # fmt: skip
    expected = output[0, len(tokenizer(prompt)["input_ids"]) :].tolist()
    options: dict[str, Any] = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 2}
    for name in ("tiny", "plain", "more"):
        answer = post(live, "/v1/completions", model=name, **options)
        if name == "more":
            choice = answer["choices"][0]
            assert answer["usage"]["prompt_tokens"] == len(tokenizer(prompt)["input_ids"])
            assert choice["text"] == tokenizer.decode(expected, skip_special_tokens=True)
            assert choice["logprobs"]["tokens"] == [tokenizer.decode([token]) for token in expected]
        else:
            assert answer["usage"]["prompt_tokens"] > len(tokenizer(prompt)["input_ids"])


def test_it_stops_at_the_adapters_end_token(live: Live) -> None:
    end = SIZE - 1
    options: dict[str, Any] = {"model": "more", "prompt": "fox", "max_tokens": 4, "temperature": 0}
    answer = post(live, "/v1/completions", **options, logit_bias={str(end): 100})
    assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["text"]) == ("stop", "")
    chosen = post(live, "/v1/completions", **options, logit_bias={"321": 100})
    assert chosen["choices"][0]["text"] == "<new1>" * 4
    refused = httpx.post(f"{live.url}/v1/completions", json={**options, "model": "plain", "logit_bias": {"321": 100}})
    assert (refused.status_code, "outside the vocabulary of 320" in refused.text) == (400, True)


def test_a_grammar_speaks_in_the_adapters_tokens(live: Live) -> None:
    options: dict[str, Any] = {"prompt": "fox", "max_tokens": 8, "temperature": 0}
    for name in ("more", "plain", "tiny"):
        answer = post(live, "/v1/completions", model=name, **options, structured_outputs={"choice": ["yes", "no"]})
        assert answer["choices"][0]["text"] in ("yes", "no")


def test_a_tokenizer_like_the_bases_changes_nothing(live: Live, folder: Path) -> None:
    """Trainers save it beside every adapter."""
    rows = {row["name"]: row for row in httpx.get(f"{live.url}/v1/adapters").json()["data"]}
    assert {"more", "plain", "same", "templated"} <= rows.keys()
    assert (folder / "same" / "tokenizer.json").is_file()
    info = {name: live.service.registry.get(name).info for name in rows}
    assert (info["same"].tokenizer, info["plain"].tokenizer) == ("", "")
    assert info["more"].tokenizer
    assert info["templated"].tokenizer
    assert info["templated"].digest != info["plain"].digest


def test_an_upload_brings_its_tokenizer(live: Live, folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in (folder / "more").iterdir() if path.suffix != ".md"}
    answer = httpx.put(f"{live.url}/v1/adapters/uploaded", files=files, timeout=60)
    assert answer.status_code == 201, answer.text
    assert tokens_of(live, model="uploaded", prompt="<new4>") == [324]
    composed = httpx.post(
        f"{live.url}/v1/completions",
        json={"model": "tiny", "adapters": {"templated": 1.0, "plain": 1.0}, "prompt": "fox", "max_tokens": 1},
    )
    assert composed.status_code == 400
    assert "has a tokenizer of its own" in composed.text


def rebuilt(checkpoint: Path, **parts: object) -> None:
    """Its tokenizer, with other parts."""
    file = checkpoint / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))


def test_a_text_on_which_a_tokenizer_fails_is_refused(live: Live, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "more", tmp_path / "more")
    rebuilt(
        copy, pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    )
    files = {path.name: path.read_bytes() for path in copy.iterdir() if path.suffix != ".md"}
    assert httpx.put(f"{live.url}/v1/adapters/failing", files=files, timeout=60).status_code == 201
    text = "a" * 60 + "!"
    bodies: dict[str, dict[str, Any]] = {
        "/tokenize": {"prompt": text},
        "/v1/completions": {"prompt": text, "max_tokens": 1},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}], "max_tokens": 1},
    }
    for path, body in bodies.items():
        answer = httpx.post(f"{live.url}{path}", json={"model": "failing", **body}, timeout=60)
        assert (answer.status_code, "the tokenizer fails on this text" in answer.text) == (400, True), answer.text


def cut(file: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / file).write_bytes((checkpoint / file).read_bytes()[:100])


UNKNOWN = {"SpecialToken": {"id": "z", "type_id": 0}}
NOT_FITTING: dict[str, dict[str, Any]] = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "post_processor": {"type": "TemplateProcessing", "single": [UNKNOWN], "pair": [], "special_tokens": {}},
}
BOTH = ("tokenizer.json", "tokenizer_config.json")
BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("more", cut("tokenizer.json"), "its tokenizer cannot be loaded"),
    *(("more", lambda c, part=part: rebuilt(c, **{part: NOT_FITTING[part]}), "do not fit") for part in NOT_FITTING),
    ("more", lambda c: (c / "tokenizer.json").unlink(), "tokenizer_config.json without tokenizer.json"),
    ("more", lambda checkpoint: (checkpoint / "chat_template.jinja").write_text("{% for %}"), "its chat template"),
    ("templated", lambda c: (c / "chat_template.jinja").write_text("{{ 9 ** (10 ** 9) > 1 }}"), "seconds"),
    ("templated", lambda checkpoint: (checkpoint / "chat_template.jinja").write_bytes(b"\xff"), "is not UTF-8"),
    ("templated", lambda c: (c / "chat_template.jinja").write_bytes(b" " * ((1 << 20) + 1)), "larger than the limit"),
    ("plain", lambda c: [shutil.copy(c.parent.parent / "more" / file, c) for file in BOTH],
     "its tokenizer has token 327, its embedding 320 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "reason"), BROKEN, ids=[each[-1] for each in BROKEN])
def test_a_broken_tokenizer_is_refused(
    base_location: dict[str, str],
    folder: Path,
    tmp_path: Path,
    name: str,
    change: Callable[[Path], object],
    reason: str,
) -> None:
    shutil.copytree(folder / "more", tmp_path / "more")
    copy = shutil.copytree(folder / name, tmp_path / "copies" / name)
    change(copy)
    told = inspect(copy, ServerConfig(base=base_location["tiny-llama"], device="cpu"))
    assert told.report is None
    assert any(reason in each for each in told.reasons), told.reasons


def test_no_code_that_a_tokenizer_names_is_run(base_location: dict[str, str], folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "more", tmp_path / "more")
    ran = tmp_path / "ran"
    (copy / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    file = copy / "tokenizer_config.json"
    config = {
        **json.loads(file.read_text()),
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]},
    }
    file.write_text(json.dumps(config))
    told = inspect(copy, ServerConfig(base=base_location["tiny-llama"], device="cpu"))
    assert told.report is None
    assert not ran.exists()


def test_a_tokenizer_that_is_being_copied_is_waited_for(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "more", tmp_path / "more")
    assert unfinished(copy) is None
    before = signature_of(copy)
    cut("tokenizer.json")(copy)
    assert unfinished(copy) == "tokenizer.json ends too early"
    assert signature_of(copy) != before


def test_the_limits_leave_room_for_known_tokenizers() -> None:
    assert TOKENIZER_FILES["tokenizer.json"] > 34 << 20  # Gemma's

"""Encoder-decoders over HTTP: completions and predict, languages, tokenizers in Python, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import sentencepiece
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    M2M100Config,
    MarianConfig,
    MarianTokenizer,
    NllbTokenizer,
)

from server.bases import load_tokenizer
from server.engine.base_outline import read_outline
from tests.bases import BART
from tests.support import Spec, live_server, make_adapter, peft_model, service_for, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses:UserWarning")
LANGUAGES = ["eng_Latn", "fra_Latn", "deu_Latn"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SENTENCES = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "how vexingly quick"]


def save_base(kind: str, directory: Path) -> None:
    """A tiny base with a tokenizer of its kind."""
    torch.manual_seed(3)
    sizes = {**BART, "max_position_embeddings": 128, "tie_word_embeddings": False}
    if kind == "BART":
        tokenizer: Any = tiny_tokenizer()
        config: Any = BartConfig(
            **{**sizes, "vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "forced_eos_token_id": None}
        )
    elif kind == "NLLB":
        vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS])}
        tokenizer = NllbTokenizer(vocab=vocab, merges=[], additional_special_tokens=LANGUAGES)
        config = M2M100Config(**{**sizes, "vocab_size": len(tokenizer)})
    else:
        tokenizer = marian_tokenizer(directory.parent / f"{directory.name}-spm")
        config = MarianConfig(**{**sizes, "vocab_size": len(tokenizer.encoder), "pad_token_id": 3, "eos_token_id": 0,
                                 "decoder_start_token_id": 3, "forced_eos_token_id": None})  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(config)
    if kind == "Marian":
        model.generation_config.bad_words_ids = [[3]]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def marian_tokenizer(folder: Path, **options: Any) -> MarianTokenizer:
    """One in Python. options: of sentencepiece's training."""
    folder.mkdir()
    (folder / "text").write_text("\n".join(SENTENCES * 20))
    spm = str(folder / "source.model")
    sentencepiece.SentencePieceTrainer.train(
        **{"input": str(folder / "text"), "model_prefix": spm.removesuffix(".model"), "vocab_size": 60,
           "hard_vocab_limit": False, "minloglevel": 2, **options},
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=spm)
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    names = ["</s>", "<unk>", *(p for p in pieces if p not in ("</s>", "<unk>", "<s>"))]
    names.insert(3, "<pad>")
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(names)}))
    return MarianTokenizer(source_spm=spm, target_spm=spm, vocab=str(folder / "vocab.json"))


@dataclass
class Served:
    kind: str
    url: str
    location: Path
    checkpoint: Path

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60)

    def expected(self, text: str, adapter: bool, max_tokens: int = 24, **languages: str) -> str:
        """By transformers' own `generate`, with peft."""
        tokenizer = AutoTokenizer.from_pretrained(self.location)
        model = peft_model(self.location, self.checkpoint if adapter else None, "SEQ_2_SEQ_LM")
        options = {}
        if "src_lang" in languages:
            tokenizer.src_lang = languages["src_lang"]
        if "tgt_lang" in languages:
            options["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(languages["tgt_lang"])
        ids = model.generate(
            **tokenizer(text, return_tensors="pt"), max_new_tokens=max_tokens + len(options), do_sample=False,
            num_beams=1, forced_eos_token_id=None, **options,
        )  # fmt: skip
        answer = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert isinstance(answer, str)
        return answer


@pytest.fixture(scope="module", params=["BART", "NLLB", "Marian"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    save_base(request.param, folder / "base")
    adapters = folder / "adapters"
    checkpoint = make_adapter(folder / "base", adapters, Spec("translate", "SEQ_2_SEQ_LM", 8, "all-linear"))
    service = service_for(folder / "base", "base", adapter_dir=str(adapters))
    with live_server(service) as live:
        yield Served(request.param, live.url, folder / "base", checkpoint)


def test_completions_and_predict_answer_as_transformers_does(served: Served) -> None:
    text = "the quick brown fox"
    answers = {}
    for model, adapter in (("base", False), ("translate", True)):
        expected = served.expected(text, adapter)
        completion = served.post("/v1/completions", model=model, prompt=text, max_tokens=24, temperature=0)
        assert completion.status_code == 200, completion.text
        assert completion.json()["choices"][0]["text"] == expected
        tokens = len(load_tokenizer(str(served.location))(text)["input_ids"])
        assert completion.json()["usage"]["prompt_tokens"] == tokens
        items = [{"task": model, "input": text, "parameters": {"max_tokens": 24}}]
        result = served.post("/v1/predict", items=items).json()["results"][0]
        assert (result["text"], result["type"]) == (expected, "SEQ_2_SEQ_LM")
        answers[model] = expected
    assert answers["base"] != answers["translate"]
    assert answers["translate"]


def test_streams_add_up(served: Served) -> None:
    text, pieces = "pack my box", []
    body = {"model": "translate", "prompt": text, "max_tokens": 24, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                pieces += [choice["text"] for choice in json.loads(line[6:])["choices"]]
    assert len(pieces) > 2
    assert "".join(pieces) == served.expected(text, True)


def test_languages(served: Served) -> None:
    text = "five dozen jugs"
    languages = {"src_lang": "deu_Latn", "tgt_lang": "fra_Latn"}
    answer = served.post("/v1/completions", model="translate", prompt=text, max_tokens=16, temperature=0, **languages)
    if served.kind != "NLLB":
        assert answer.status_code == 400
        assert "not told languages" in answer.json()["error"]["message"]
        of_ids = served.post("/v1/completions", model="translate", prompt=[5], tgt_lang="fra_Latn")
        assert "not told languages" in of_ids.json()["error"]["message"]
        return
    assert answer.json()["choices"][0]["text"] == served.expected(text, True, 16, **languages)
    assert served.expected(text, True, 16, **languages) != served.expected(text, True, 16, tgt_lang="fra_Latn")
    parameters = {"max_tokens": 16, **languages}
    result = served.post("/v1/predict", items=[{"task": "translate", "input": text, "parameters": parameters}])
    assert result.json()["results"][0]["text"] == answer.json()["choices"][0]["text"]
    tokenizer = load_tokenizer(str(served.location))
    tokenizer.src_lang = languages["src_lang"]
    ids = {"model": "translate", "prompt": tokenizer(text)["input_ids"], "max_tokens": 16, "temperature": 0}
    of_ids = served.post("/v1/completions", **ids, tgt_lang=languages["tgt_lang"])
    assert of_ids.json()["choices"][0]["text"] == answer.json()["choices"][0]["text"]
    told_twice = served.post("/v1/completions", **ids, **languages)
    assert told_twice.status_code == 400
    assert "src_lang is for a text" in told_twice.json()["error"]["message"]
    unknown = served.post("/v1/completions", model="translate", prompt=text, tgt_lang="xx")
    assert unknown.status_code == 400
    assert "tgt_lang 'xx' is none of this base's languages: eng_Latn, fra_Latn, deu_Latn" in unknown.text
    counted = served.post("/tokenize", prompt=text).json()["tokens"]
    assert counted == load_tokenizer(str(served.location))(text)["input_ids"]
    # one request's language stays out of the next's
    plain = served.post("/v1/completions", model="translate", prompt=text, max_tokens=16, temperature=0)
    assert plain.json()["choices"][0]["text"] == served.expected(text, True, 16)


def test_what_an_encoder_decoder_does_not_serve_is_refused(served: Served) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "SEQ_2_SEQ_LM, not CAUSAL_LM"),
        ("/v1/embeddings", {"input": "a"}, "serves SEQ_2_SEQ_LM, not FEATURE_EXTRACTION"),
        ("/v1/completions", {"prompt": "a", "echo": True}, "echo is for models that continue a prompt"),
        ("/v1/completions", {"prompt": "a " * 400}, "the context holds 128"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 200}, "the context holds 128"),
    ]
    for path, body, message in cases:
        for model in ("base", "translate"):
            answer = served.post(path, model=model, **body)
            assert answer.status_code == 400, answer.text
            assert message in answer.json()["error"]["message"], answer.text


def test_what_is_known_of_a_base_before_its_weights_are_loaded(served: Served) -> None:
    layout = read_outline(str(served.location)).layout
    assert layout.tasks == ("SEQ_2_SEQ_LM",)
    assert not any("lm_head" in name for name in layout.linears)

"""The real checkpoints, through HTTP: the accuracy and the chrF that their authors and `peft` reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from peft import PeftModel
from sacrebleu.metrics import CHRF
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import live_server, service_for

ROOT = Path(__file__).parent.parent.parent
SENTENCES = 24
NEW_TOKENS = 48


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def predict(url: str, task: str, texts: list[str], **parameters: Any) -> list[dict[str, Any]]:
    results = []
    for start in range(0, len(texts), 100):
        body: dict[str, Any] = {"task": task, "inputs": texts[start : start + 100]}
        if parameters:
            body["parameters"] = parameters
        answer = httpx.post(f"{url}/v1/predict", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        results += answer.json()["results"]
    return results


def test_classifiers_reach_their_stated_accuracy(base_location: dict[str, str], real_adapters: Path) -> None:
    service = service_for(base_location["minilm"], "minilm", adapter_dir=str(real_adapters))
    with live_server(service) as live:
        assert set(service.registry.refused()) == {"en-fr-docs-smollm2"}, "it is for another base"
        for name in ("sentiment-minilm", "question-type-minilm"):
            rows = lines(real_adapters / name / "eval.jsonl")
            stated = json.loads((real_adapters / name / "labels.json").read_text())
            assert len(rows) == stated["examples"] >= 200
            results = predict(live.url, name, [row["text"] for row in rows])
            right = sum(r["label"] == row["label"] for r, row in zip(results, rows, strict=True))
            assert right / len(rows) == pytest.approx(stated["accuracy"], abs=1e-9)
            for result, row in zip(results, rows, strict=True):
                if result["usage"]["prompt_tokens"] > 128:
                    continue  # the reference logits were made with 128 tokens at most
                logits = np.array(row["peft_logits"])
                expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
                np.testing.assert_allclose(list(result["scores"].values()), expected, atol=1e-4)


def test_translator_equals_peft(base_location: dict[str, str], real_adapters: Path) -> None:
    checkpoint = real_adapters / "en-fr-docs-smollm2"
    rows = lines(checkpoint / "eval.jsonl")[:SENTENCES]
    texts = [row["messages"][0]["content"] for row in rows]
    service = service_for(base_location["smollm2"], "smollm2", adapter_dir=str(real_adapters))
    with live_server(service) as live:
        results = predict(live.url, checkpoint.name, texts, temperature=0, max_tokens=NEW_TOKENS)
    ours = [result["text"] for result in results]
    theirs = translations_of_peft(base_location["smollm2"], checkpoint, texts)
    references = [[row["reference"] for row in rows]]
    assert abs(CHRF().corpus_score(ours, references).score - CHRF().corpus_score(theirs, references).score) < 1
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert same == len(texts), f"{same} of {len(texts)} translations are peft's"


def translations_of_peft(location: str, checkpoint: Path, texts: list[str]) -> list[str]:
    tokenizer: Any = AutoTokenizer.from_pretrained(location)
    base: Any = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, checkpoint).eval()
    answers = []
    for text in texts:
        message = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def test_example_classifier_reaches_its_stated_accuracy_on_committed_data(base_location: dict[str, str]) -> None:
    """The address tagger against the held-out addresses committed beside it."""
    examples = ROOT / "examples" / "smollm2"
    rows = lines(examples / "address-tags" / "held-out.jsonl")
    service = service_for(base_location["smollm2"], "smollm2", adapter_dir=str(examples))
    with live_server(service) as live:
        assert service.registry.refused() == {}
        results = predict(live.url, "address-tags", [row["text"] for row in rows])
    right = []
    for row, result in zip(rows, results, strict=True):
        for start, _, tag in row["expected"]:
            found = [entity["label"] for entity in result["entities"] if entity["start"] <= start < entity["end"]]
            right.append(found == [tag])
    assert sum(right) / len(right) > 0.8

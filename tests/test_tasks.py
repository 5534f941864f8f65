"""What text becomes token ids, and what values become results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import MBartTokenizer

from adapters.adapter import AdapterInfo
from server.engine.tasks import InvalidPrompt, Seq2SeqLM, Tasks, Word, join_words
from tests.support import tiny_tokenizer

TASKS = Tasks(tiny_tokenizer())


def info(labels: list[str], problem_type: str = "single_label_classification") -> AdapterInfo:
    return AdapterInfo("", "SEQ_CLS", 1, tuple(labels), problem_type, 0)


def words(text: str, labels: list[str]) -> list[Word]:
    """Words between single spaces, each with a label and the score 0.5."""
    made, start = [], 0
    for word, label in zip(text.split(" "), labels, strict=True):
        made.append(Word(start, start + len(word), label, 0.5))
        start += len(word) + 1
    return made


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["O", "O", "O", "O"], []),
        (["B-PER", "I-PER", "O", "B-LOC"], [("PER", "Ann Lee"), ("LOC", "Rome")]),
        (["B-PER", "B-PER", "O", "O"], [("PER", "Ann"), ("PER", "Lee")]),
        (["I-PER", "I-PER", "O", "O"], [("PER", "Ann Lee")]),
        (["B-PER", "I-LOC", "I-LOC", "O"], [("PER", "Ann"), ("LOC", "Lee in")]),
        (["B-PER", "O", "I-PER", "O"], [("PER", "Ann"), ("PER", "in")]),
        (["Name", "Name", "O", "City"], [("Name", "Ann Lee"), ("City", "Rome")]),
        (["Name", "City", "Name", "Name"], [("Name", "Ann"), ("City", "Lee"), ("Name", "in Rome")]),
    ],
)
def test_words_of_one_entity_are_joined(labels: list[str], expected: list[tuple[str, str]]) -> None:
    text = "Ann Lee in Rome"
    entities = join_words(words(text, labels), text)
    assert [(entity["label"], entity["text"]) for entity in entities] == expected
    assert all(text[entity["start"] : entity["end"]] == entity["text"] for entity in entities)
    assert all(entity["score"] == 0.5 for entity in entities)


def test_the_score_of_an_entity_is_the_mean_of_its_words() -> None:
    entity = join_words([Word(0, 1, "X", 0.2), Word(2, 3, "X", 0.6)], "a b")[0]
    assert entity["score"] == pytest.approx(0.4)


def test_a_word_has_the_label_of_its_first_token() -> None:
    task = TASKS.token_classification
    text = "the zebra café"
    prompt = task.prepare(text)
    assert len(prompt.token_ids) > 3, "words of several tokens"
    logits = np.full((len(prompt.token_ids), 2), -5.0, dtype=np.float32)
    starts = {text.index(word) for word in text.split()}
    for row, (start, _) in enumerate(prompt.offsets):
        logits[row, 1 if start in starts else 0] = 5.0
    result = task.finish(logits, prompt, info(["O", "WORD"]))
    assert [entity["text"] for entity in result["entities"]] == [text]
    assert "".join(token["text"] for token in result["tokens"]).replace("\ufffd", "") != ""


@pytest.mark.parametrize(
    ("problem_type", "scores"),
    [
        ("single_label_classification", [0.8438, 0.1142, 0.0420]),
        ("multi_label_classification", [0.8808, 0.5, 0.2689]),
        ("regression", [2.0, 0.0, -1.0]),
    ],
)
def test_scores_by_problem_type(problem_type: str, scores: list[float]) -> None:
    logits = np.array([2.0, 0.0, -1.0], dtype=np.float32)
    result = TASKS.sequence_classification.finish(logits, info(["a", "b", "c"], problem_type))
    assert result["label"] == "a"
    assert list(result["scores"].values()) == pytest.approx(scores, abs=1e-4)
    assert result["score"] == result["scores"]["a"]


def test_softmax_of_large_logits_is_finite() -> None:
    logits = np.array([5000.0, -5000.0], dtype=np.float32)
    result = TASKS.sequence_classification.finish(logits, info(["a", "b"]))
    assert result["scores"] == {"a": 1.0, "b": 0.0}


def test_chat_goes_through_the_template() -> None:
    prompt = TASKS.causal_lm.prepare_chat([{"role": "user", "content": "the fox"}])
    text = tiny_tokenizer().decode(prompt.token_ids)
    assert text == "<s>user: the fox</s><s>assistant: "
    assert TASKS.causal_lm.prepare_input("the fox").token_ids == prompt.token_ids


def test_without_a_template_there_is_no_chat() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    task = Tasks(tokenizer).causal_lm
    with pytest.raises(InvalidPrompt, match="no chat template"):
        task.prepare_chat([{"role": "user", "content": "x"}])
    assert task.prepare_input("the fox").token_ids == task.prepare("the fox").token_ids


def test_what_a_template_refuses_is_told() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only users may speak') }}"
    with pytest.raises(InvalidPrompt, match="only users may speak"):
        Tasks(tokenizer).causal_lm.prepare_chat([{"role": "system", "content": "x"}])


def test_a_template_that_makes_nothing_is_told() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InvalidPrompt, match="makes nothing of these messages"):
        Tasks(tokenizer).causal_lm.prepare_chat([{"role": "system", "content": "x"}])


@pytest.mark.parametrize("kind", ["causal_lm", "sequence_classification", "token_classification", "feature_extraction"])
def test_an_empty_text_is_refused(kind: str) -> None:
    task: Any = getattr(TASKS, kind)
    with pytest.raises(InvalidPrompt, match="no tokens"):
        task.prepare("")


@pytest.mark.parametrize("own", ["en_XX", None])
def test_a_target_begins_with_its_language(own: str | None) -> None:
    """Alone, where a target's first token is a language (mBART-25), else after the first token (mBART-50)."""
    tokenizer = MBartTokenizer()
    start: Any = tokenizer.eos_token_id if own is None else tokenizer.convert_tokens_to_ids(own)
    task = Seq2SeqLM(tokenizer, (start,))
    french, german = (tokenizer.convert_tokens_to_ids(code) for code in ("fr_XX", "de_DE"))
    prompt = task.prepare("a", src_lang="de_DE", tgt_lang="fr_XX")
    assert prompt.start_ids == ((french,) if own else (tokenizer.eos_token_id, french))
    assert prompt.token_ids[-1] == german
    assert task.prepare("a").start_ids is None

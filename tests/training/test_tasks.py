"""What each task makes of a row: token ids as the server makes them, and what is learnt of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers, processors

from server.bases import load_tokenizer
from server.engine.tasks import Tasks
from server.training.classification import TextClassification
from server.training.data import InvalidData
from server.training.embedding import TextEmbedding, _twins
from server.training.examples import IGNORED, Example, held_out, pad_rows, padded
from server.training.generation import TextGeneration
from server.training.prepare import choose_padding
from server.training.tagging import TextTagging, _prefixed
from tests.training.support import write_rows


@pytest.fixture
def tokenizer(base_location: dict[str, str]) -> Any:
    return load_tokenizer(base_location["tiny-llama"])


def read(task: Any, folder: Path, *rows: dict[str, Any]) -> list[Any]:
    examples: list[Any] = task.read(write_rows(folder / "rows.jsonl", rows))
    return examples


def test_single_labels(tokenizer: Any, tmp_path: Path) -> None:
    task = TextClassification(tokenizer)
    examples = read(task, tmp_path, {"text": "the fox", "label": "b"}, {"text": "a", "label": "a"})
    assert (task.labels, task.problem_type) == (("a", "b"), "single_label_classification")
    assert [example.target for example in examples] == [1, 0]
    assert list(examples[0].input_ids) == Tasks(tokenizer).sequence_classification.prepare("the fox").token_ids


def test_numbered_labels_are_sorted_as_numbers(tokenizer: Any, tmp_path: Path) -> None:
    task = TextClassification(tokenizer)
    read(task, tmp_path, *({"text": "a", "label": i} for i in (10, 9, 2)))
    assert task.labels == ("2", "9", "10")


def test_several_labels_and_numbers(tokenizer: Any, tmp_path: Path) -> None:
    several, number = TextClassification(tokenizer), TextClassification(tokenizer)
    rows = read(several, tmp_path, {"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []})
    assert (several.problem_type, [row.target for row in rows]) == ("multi_label_classification", [[1, 1], [0, 0]])
    assert several.metrics[0] == "f1_micro"
    rows = read(number, tmp_path, {"text": "a", "value": 1.5}, {"text": "b", "value": -2})
    assert (number.problem_type, [row.target for row in rows]) == ("regression", [1.5, -2.0])


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": "a"}], "needs one of the columns label"),
        ([{"text": "a", "label": "x", "value": 1}], "needs one of the columns label"),
        ([{"text": "a", "label": "x"}], "there are no two labels, only .'x',."),
        ([{"text": "a", "label": "x"}, {"text": "a", "value": 1}], r"rows\.jsonl:2: there is no 'label'"),
        ([{"text": " ", "label": "x"}, {"text": "b", "label": "y"}], r"rows\.jsonl:1: text must be"),
    ],
)
def test_rows_that_do_not_fit_classification(
    rows: list[dict[str, Any]], reason: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InvalidData, match=reason):
        read(TextClassification(tokenizer), tmp_path, *rows)


def test_held_out_examples_have_no_new_labels(tokenizer: Any, tmp_path: Path) -> None:
    task = TextClassification(tokenizer, ["x", "y"])
    with pytest.raises(InvalidData, match=r"rows\.jsonl:1: the label 'z' is none of x, y"):
        read(task, tmp_path, {"text": "a", "label": "z"})


def labels_of(task: TextTagging, example: Any) -> list[str]:
    return [task.labels[i] if i != IGNORED else "" for i in example.target.labels]


def test_every_token_of_a_word_has_its_tag(tokenizer: Any, tmp_path: Path) -> None:
    task = TextTagging(tokenizer)
    (example,) = read(task, tmp_path, {"tokens": ["quick", "xyz"], "tags": ["a", "b"]})
    tokens = tokenizer.convert_ids_to_tokens(list(example.input_ids))
    assert tokens == ["qu", "ick", "Ġ", "x", "y", "z"]
    assert labels_of(task, example) == ["a", "a", "", "b", "b", "b"]
    assert example.target.words == (0, 3)


def test_spans_begin_and_go_on(tokenizer: Any, tmp_path: Path) -> None:
    task = TextTagging(tokenizer)
    entities = [{"start": 8, "end": 11, "label": "X"}, {"start": 0, "end": 5, "label": "Q"}]
    (example,) = read(task, tmp_path, {"text": "quick & xyz", "entities": entities})
    assert task.labels == ("B-Q", "B-X", "I-Q", "I-X", "O")
    assert labels_of(task, example) == ["B-Q", "I-Q", "", "O", "", "B-X", "I-X", "I-X"]


def test_spans_of_one_label_side_by_side_are_two(tokenizer: Any, tmp_path: Path) -> None:
    task = TextTagging(tokenizer)
    entities = [{"start": 0, "end": 2, "label": "X"}, {"start": 2, "end": 4, "label": "X"}]
    (example,) = read(task, tmp_path, {"text": "xyzx", "entities": entities})
    assert labels_of(task, example) == ["B-X", "I-X", "B-X", "I-X"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tokens": ["a", "b"], "tags": ["x"]}, "2 tokens but 1 tags"),
        ({"tokens": ["a"], "tags": ["x"]}, "there is one label for everything"),
        ({"text": "abc", "entities": [{"start": 1, "end": 4, "label": "x"}]}, "does not lie in a text of 3"),
        ({"text": "abc", "entities": [{"start": 0, "end": 2}]}, "needs start, end and label"),
        ({"text": "abc", "entities": [{"start": 0, "end": 2, "label": ""}]}, "label must be a text"),
        (
            {"text": "abc", "entities": [{"start": 0, "end": 2, "label": "x"}, {"start": 1, "end": 3, "label": "x"}]},
            "two entities overlap",
        ),
    ],
)
def test_rows_that_do_not_fit_tagging(row: dict[str, Any], reason: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=reason):
        read(TextTagging(tokenizer), tmp_path, row)


def test_labels_without_prefixes_as_seqeval_reads_them() -> None:
    assert _prefixed(["x", "x", "y", "O", "x"]) == ["B-x", "I-x", "B-y", "O", "B-x"]
    assert _prefixed(["B-x", "I-x", "O"]) == ["B-x", "I-x", "O"]


def generation(tokenizer: Any, chat: bool = True) -> TextGeneration:
    return TextGeneration(tokenizer, chat, 10, 8)


def test_the_loss_is_on_the_completion_alone(tokenizer: Any, tmp_path: Path) -> None:
    (example,) = read(generation(tokenizer), tmp_path, {"prompt": "the fox", "completion": "a dog"})
    prompt = Tasks(tokenizer).causal_lm.prepare_input("the fox").token_ids
    answer = [*tokenizer("a dog")["input_ids"], tokenizer.eos_token_id]
    assert list(example.input_ids) == [*prompt, *answer]
    assert list(example.target) == [IGNORED] * len(prompt) + answer


def test_a_prompt_as_it_stands(tokenizer: Any, tmp_path: Path) -> None:
    (example,) = read(generation(tokenizer, chat=False), tmp_path, {"prompt": "the fox", "completion": " runs"})
    assert list(example.input_ids) == [*tokenizer("the fox runs")["input_ids"], tokenizer.eos_token_id]


def test_each_answer_of_a_conversation_is_an_example(tokenizer: Any, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    first, second = read(generation(tokenizer), tmp_path, {"messages": messages})
    task = Tasks(tokenizer).causal_lm
    for example, end in ((first, 2), (second, 4)):
        prompt = task.prepare_chat(messages[:end]).token_ids
        assert list(example.input_ids[: len(prompt)]) == prompt
        assert set(example.target[: len(prompt)]) == {IGNORED}
        assert tokenizer.decode(example.target[len(prompt) :]) == f"{messages[end]['content']}</s>"
    assert first.source == second.source, "held out together, or not"
    assert (first.text, second.text) == ("be kind\none", "be kind\none\ntwo\nthree")


def test_the_loss_is_transformers_own(base_location: dict[str, str], tokenizer: Any, tmp_path: Path) -> None:
    """Although logits are made for answers alone; rows of several lengths."""
    rows = [{"prompt": "the " * n, "completion": "a fox" * (5 - n)} for n in range(1, 5)]
    task = generation(tokenizer)
    examples = read(task, tmp_path, *rows)
    model = task.load(base_location["tiny-llama"], torch.float32)
    inputs = padded([example.input_ids for example in examples], 0, torch.device("cpu"))
    labels = pad_rows([example.target for example in examples], IGNORED)
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss
        torch.testing.assert_close(task.loss(model, examples), expected)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "there is no 'completion'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant follows another"),
        ({"messages": [{"content": "a"}]}, "a message needs a role"),
        ({"messages": [{"role": "user", "content": None}]}, "needs content that is a text"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "role and content are learnt, not"),
        ({"messages": [], "prompt": "a"}, "which of them"),
        ({"prompt": "a", "completion": "b", "tools": ["x"]}, "tools are not learnt"),
    ],
)
def test_rows_that_do_not_fit_generation(row: dict[str, Any], reason: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=rf"rows\.jsonl:1: .*{reason}"):
        read(generation(tokenizer), tmp_path, row)


def test_pairs_and_what_is_no_negative(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"anchor": "a", "positive": "b"}, {"anchor": "c", "positive": "b", "negative": "d"}]
    first, second = read(TextEmbedding(tokenizer, "mean"), tmp_path, *rows)
    assert (len(first.others), len(second.others)) == (1, 2)
    positives = [first.others[0], second.others[0]]
    assert _twins(positives, [*positives, second.others[1]]).tolist() == [[False, True, False], [True, False, False]]


def test_a_text_without_tokens_is_told(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    rows = [{"text": "a", "label": "x"}, {"text": "?", "label": "y"}]
    with pytest.raises(InvalidData, match=r"rows\.jsonl:2: the input has no tokens"):
        read(TextClassification(tokenizer), tmp_path, *rows)


def test_answers_are_the_likeliest_tokens_whatever_the_base_prefers(
    base_location: dict[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    location = tmp_path / "base"
    shutil.copytree(base_location["tiny-llama"], location)
    preferred = {"eos_token_id": 2, "repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0}
    (location / "generation_config.json").write_text(json.dumps(preferred))
    (example,) = read(generation(tokenizer), tmp_path, {"prompt": "the fox", "completion": "x"})
    said = []
    for place in (base_location["tiny-llama"], location):
        task = generation(tokenizer)
        said.append(task.answers(task.load(str(place), torch.float32).eval(), [example], 1))
    assert said[0] == said[1]


def test_values_have_no_labels(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="has values, which have no labels: a, b"):
        read(TextClassification(tokenizer, ["a", "b"]), tmp_path, {"text": "a", "value": 1})


def test_words_that_are_no_words_are_told(base_location: dict[str, str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base_location["minilm"])
    with pytest.raises(InvalidData, match=r"rows\.jsonl:1: the tokenizer finds no words"):
        read(TextTagging(tokenizer, ["x", "O"]), tmp_path, {"text": "\u200b", "entities": []})


def test_spans_within_a_word_are_told(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entities = [{"start": 2, "end": 4, "label": "X"}, {"start": 5, "end": 6, "label": "X"}]
    read(TextTagging(tokenizer), tmp_path, {"text": "xyzx a", "entities": entities})
    assert "1 spans begin within a word" in caplog.text


def test_of_equal_vectors_the_last_place_counts() -> None:
    class Same(TextEmbedding):
        def embed(self, model: Any, texts: Any) -> torch.Tensor:
            return torch.ones(len(texts), 4) / 2

    task = Same.__new__(Same)
    examples = [Example(str(i), (i,), None, "", "", ((i + 10,),)) for i in range(4)]
    assert task.evaluate(None, examples, 2, False).metrics == {"mrr": 0.25, "recall_at_1": 0.0}


@pytest.mark.parametrize(("of_config", "expected"), [(5, 5), (None, 0)])
def test_padding_is_the_bases_own_or_ends_no_text(of_config: int | None, expected: int, tokenizer: Any) -> None:
    choose_padding(tokenizer, of_config)
    assert tokenizer.pad_token_id == expected


def test_padding_is_not_the_end_of_a_text(tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    choose_padding(tokenizer, None)
    assert tokenizer.pad_token == "<s>"


def test_about_a_fraction_is_held_out_and_always_the_same() -> None:
    texts = [f"text {number}" for number in range(2000)]
    chosen = {text for text in texts if held_out(text, 0.2)}
    assert 320 < len(chosen) < 480
    assert chosen < {text for text in texts if held_out(text, 0.4)}
    assert not any(held_out(text, 0.0) for text in texts)

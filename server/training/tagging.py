"""TOKEN_CLS: a label for every word (`tokens` and `tags`), or labelled spans of a `text` (`entities`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from server.engine.tasks import TokenClassification
from server.training.data import InvalidData, InvalidRow, Row, convert_rows, read_rows
from server.training.examples import IGNORED, Evaluation, Example, by_length, pad_rows, padded, prepared

OUTSIDE = "O"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """Characters start … end − 1 have `label`."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Tagged:
    """A text and its spans, in order and apart."""

    text: str
    spans: tuple[Span, ...]
    by_words: bool
    """Whether each span is one word; else words are the tokenizer's."""


@dataclass(frozen=True)
class Target:
    """What is learnt: a label for every token, by index; and the tokens with which the words begin."""

    labels: tuple[int, ...]
    words: tuple[int, ...]


class TextTagging:
    """transformers' token classification. Every token is learnt, as every token may begin a word when it is served."""

    problem_type: str | None = None
    metrics: tuple[str, ...] = ("f1", "precision", "recall", "word_accuracy", "accuracy", "loss")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] = ()) -> None:
        """labels: in this order; none: those of the first file, sorted."""
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self._prepare = TokenClassification(tokenizer).prepare

    def read(self, path: Path) -> list[Example]:
        rows = read_rows(path)
        parse = _of_words if "tokens" in rows[0].values else _of_entities
        tagged = convert_rows(path, rows, parse)
        if not self.labels:
            self.labels = _all_labels(tagged)
        if len(self.labels) < 2:
            raise InvalidData(f"{path}: there is one label for everything, {self.labels[0]!r}: nothing to learn")
        pairs = dict(zip((row.line for row in rows), tagged, strict=True))
        examples = convert_rows(path, rows, lambda row: self._example(pairs[row.line]))
        self._tell_of_inner_beginnings(path, examples)
        return examples

    def _tell_of_inner_beginnings(self, path: Path, examples: Sequence[Example]) -> None:
        """Spans that begin within one of the tokenizer's words: served, a word has the label of its first token."""
        inner = 0
        for example in examples:
            starts = {start for start, _ in self._word_ranges(example.text)}
            inner += sum(span[0] not in starts for span in example.expected)
        if inner:
            logger.warning("%s: %d spans begin within a word, where no label is served", path, inner)

    def _word_ranges(self, text: str) -> list[tuple[int, int]]:
        """Characters of the first token of each of the tokenizer's words."""
        prompt, seen, ranges = self._prepare(text), set[int](), []
        for word, offsets in zip(prompt.word_ids, prompt.offsets, strict=True):
            if word is not None and word not in seen and offsets[0] < offsets[1]:
                seen.add(word)
                ranges.append(offsets)
        return ranges

    def _example(self, tagged: Tagged) -> Example:
        unknown = [span.label for span in tagged.spans if span.label not in self.labels]
        if unknown:
            raise InvalidRow(f"the label {unknown[0]!r} is none of {', '.join(self.labels)}")
        prompt = prepared(self._prepare, tagged.text)
        labels, words, spans = [], [], iter(tagged.spans)
        span, begun, word = next(spans, None), False, None
        for (start, end), word_id in zip(prompt.offsets, prompt.word_ids, strict=True):
            if word_id is None or start == end:
                labels.append(IGNORED)
                continue
            while span is not None and span.end <= start:
                span, begun = next(spans, None), False
            inside = span is not None and span.start < end
            if not begun and inside if tagged.by_words else word_id != word:
                words.append(len(labels))
            labels.append(self.labels.index(self._label(span if inside else None, begun)))
            begun, word = inside, word_id
        if not words:
            raise InvalidRow(f"the tokenizer finds no words in {tagged.text!r}")
        expected = [[span.start, span.end, span.label] for span in tagged.spans]
        target = Target(tuple(labels), tuple(words))
        return Example(tagged.text, tuple(prompt.token_ids), target, expected, tagged.text)

    def _label(self, span: Span | None, begun: bool) -> str:
        """Of a token in `span`, its first or a further one: what goes on has I- where the span has B-."""
        if span is None:
            return OUTSIDE
        inner = f"I-{span.label[2:]}" if span.label.startswith("B-") else span.label
        return inner if begun and inner in self.labels else span.label

    def load(self, location: str, dtype: torch.dtype) -> Any:
        return AutoModelForTokenClassification.from_pretrained(location, dtype=dtype, num_labels=len(self.labels))

    def count(self, batch: Sequence[Example]) -> int:
        return sum(label != IGNORED for example in batch for label in example.target.labels)

    def loss(self, model: Any, batch: Sequence[Example]) -> Tensor:
        return _loss(self._logits(model, batch), batch)

    def evaluate(self, model: Any, examples: Sequence[Example], size: int, generate: bool) -> Evaluation:
        """Predictions: the label of each token that is none of the tokenizer's own."""
        del generate
        guesses: list[list[int]] = [[] for _ in examples]
        total, count = 0.0, 0
        for indices in by_length(examples, size):
            batch = [examples[i] for i in indices]
            logits = self._logits(model, batch)
            total, count = total + float(_loss(logits, batch)) * self.count(batch), count + self.count(batch)
            for i, row in zip(indices, logits.argmax(-1).tolist(), strict=True):
                guesses[i] = row[: len(examples[i].input_ids)]
        metrics = {"loss": total / count, **self._metrics(examples, guesses)}
        predictions = [
            {"predicted": [self.labels[g] for g, place in zip(guess, _places(example), strict=False) if place]}
            for example, guess in zip(examples, guesses, strict=True)
        ]
        return Evaluation(metrics, predictions)

    def _logits(self, model: Any, batch: Sequence[Example]) -> Tensor:
        inputs = padded((example.input_ids for example in batch), self.tokenizer.pad_token_id, model.device)
        logits: Tensor = model(**inputs).logits
        return logits

    def _metrics(self, examples: Sequence[Example], guesses: Sequence[Sequence[int]]) -> dict[str, float]:
        """seqeval's, over words; the share of tokens that are right."""
        gold, guessed, right = [], [], []
        for example, guess in zip(examples, guesses, strict=True):
            labels, words = example.target.labels, example.target.words
            gold.append(_prefixed([self.labels[labels[place]] for place in words]))
            guessed.append(_prefixed([self.labels[guess[place]] for place in words]))
            right += [g == label for g, label in zip(guess, labels, strict=True) if label != IGNORED]
        return {
            "f1": float(f1_score(gold, guessed, zero_division=0)),
            "precision": float(precision_score(gold, guessed, zero_division=0)),
            "recall": float(recall_score(gold, guessed, zero_division=0)),
            "word_accuracy": float(accuracy_score(gold, guessed)),
            "accuracy": float(np.mean(right)),
        }


def _of_words(row: Row) -> Tagged:
    """Words with one space between."""
    words, tags = row.texts("tokens"), row.texts("tags")
    if not words or len(words) != len(tags):
        raise InvalidRow(f"{len(words)} tokens but {len(tags)} tags")
    spans, start = [], 0
    for word, tag in zip(words, tags, strict=True):
        spans.append(Span(start, start + len(word), tag))
        start += len(word) + 1
    return Tagged(" ".join(words), tuple(spans), by_words=True)


def _of_entities(row: Row) -> Tagged:
    """The spans of entities begin with B- and go on with I-."""
    text = row.text("text")
    spans = []
    for entity in row.listed("entities"):
        if not isinstance(entity, dict) or not {"start", "end", "label"} <= entity.keys():
            raise InvalidRow(f"an entity needs start, end and label, not {entity!r}")
        start, end, label = entity["start"], entity["end"], entity["label"]
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)):
            raise InvalidRow(f"an entity from {start!r} to {end!r} does not lie in a text of {len(text)} characters")
        if not isinstance(label, str) or not label:
            raise InvalidRow(f"an entity's label must be a text, not {label!r}")
        spans.append(Span(start, end, f"B-{label}"))
    spans.sort(key=lambda span: span.start)
    if any(a.end > b.start for a, b in pairwise(spans)):
        raise InvalidRow("two entities overlap")
    return Tagged(text, tuple(spans), by_words=False)


def _all_labels(tagged: Sequence[Tagged]) -> tuple[str, ...]:
    """All that occur, to each B- its I-, which a token that goes on needs, and O where text lies between."""
    found = {span.label for each in tagged for span in each.spans}
    further = {f"I-{label[2:]}" for label in found if label.startswith("B-")}
    between = set() if all(each.by_words for each in tagged) else {OUTSIDE}
    return tuple(sorted(found | further | between))


def _prefixed(labels: Sequence[str]) -> list[str]:
    """As seqeval reads them: neighbours of one label without a prefix are one span."""
    result, last = [], OUTSIDE
    for label in labels:
        if label == OUTSIDE or label[:2] in ("B-", "I-"):
            result.append(label)
        else:
            result.append(f"{'I' if label == last else 'B'}-{label}")
        last = label
    return result


def _loss(logits: Tensor, batch: Sequence[Example]) -> Tensor:
    targets = pad_rows([example.target.labels for example in batch], IGNORED).to(logits.device)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def _places(example: Example) -> list[bool]:
    """Which tokens are part of the text."""
    return [label != IGNORED for label in example.target.labels]

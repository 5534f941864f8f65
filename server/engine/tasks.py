"""The kinds of task: what text becomes token ids, and what the engine's values become a result.

One class a kind, each with `prepare` and `finish`. Runs outside the engine's thread, on numpy arrays and lists; knows
nothing of tensors, batches or HTTP.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from adapters.adapter import AdapterInfo
from server.engine.chat import ChatTemplate, InvalidMessages, Markup, Render
from server.engine.panics import panics_as

MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
LANGUAGE_CODE = r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}"
"""As tokenizers for translation have them: fra_Latn, fr_XX."""
SHOWN_LANGUAGES = 20
UNREADABLE = "the tokenizer fails on this text"


class InvalidPrompt(ValueError):
    """An input that cannot be turned into a prompt; the message may be shown to the caller."""


@dataclass(frozen=True)
class Prompt:
    """What `prepare` makes of a text, and `finish` needs of it."""

    token_ids: list[int]
    text: str = ""
    start_ids: tuple[int, ...] | None = None
    """What the target begins with, where the base's own is not what is wanted."""
    offsets: list[tuple[int, int]] = field(default_factory=list)
    word_ids: list[int | None] = field(default_factory=list)


class CausalLM:
    """Text generation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, render: Render | None = None) -> None:
        """render: as ChatTemplate has it."""
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, render)

    @property
    def chats(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def prepare(self, text: str) -> Prompt:
        """A prompt as it stands."""
        return Prompt(_encode(self.tokenizer, text)["input_ids"], text)

    def prepare_echo(self, text: str) -> Prompt:
        """The same, with the place of each token in the text."""
        encoded = _encode(self.tokenizer, text, return_offsets_mapping=True)
        return Prompt(encoded["input_ids"], text, offsets=encoded["offset_mapping"])

    @property
    def markup(self) -> Markup:
        """How the base writes calls of functions. Raises InvalidPrompt when its chat template has none."""
        try:
            self._need_template()
            return self._template.markup
        except InvalidMessages as error:
            raise InvalidPrompt(str(error)) from error

    def prepare_chat(
        self, messages: Sequence[dict[str, Any]], answer: bool = True, tools: Sequence[dict[str, Any]] = ()
    ) -> Prompt:
        """Messages through the base's chat template; answer: open for the assistant's. Raises InvalidPrompt."""
        self._need_template()
        try:
            with panics_as(InvalidPrompt(UNREADABLE)):
                ids = self._template.prompt(messages, answer, tools)
        except (InvalidMessages, InvalidPrompt) as error:
            raise InvalidPrompt(str(error)) from error
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            raise InvalidPrompt(f"the chat template refuses these messages: {error}") from error
        if not ids:
            raise InvalidPrompt("the chat template makes nothing of these messages")
        return Prompt(ids)

    def _need_template(self) -> None:
        if not self.chats:
            raise InvalidPrompt("this base model has no chat template: use /v1/completions")

    def prepare_input(self, text: str) -> Prompt:
        """An input of /v1/predict: a user's message where the base has a chat template, else the prompt itself."""
        return self.prepare_chat([{"role": "user", "content": text}]) if self.chats else self.prepare(text)


class Seq2SeqLM:
    """Text from text, by an encoder and a decoder: translation, summaries."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start_ids: tuple[int, ...]) -> None:
        """start_ids: what targets of the base begin with."""
        self.tokenizer = tokenizer
        self.languages = _languages(tokenizer)
        """By code, its token; none where the base does not ask for languages."""
        self._start_ids = start_ids
        self._source_language: str = getattr(tokenizer, "src_lang", "") or ""
        self._lock = threading.Lock()
        """The tokenizer writes the language that it was last told before or after a text."""

    def prepare(self, text: str, src_lang: str | None = None, tgt_lang: str | None = None) -> Prompt:
        """A source as it stands; languages by the tokenizer's codes. Raises InvalidPrompt. Any thread."""
        for field_, code in (("src_lang", src_lang), ("tgt_lang", tgt_lang)):
            self._check_language(field_, code)
        ids = self.encode(text, src_lang)
        if not ids:
            raise InvalidPrompt("the input has no tokens")
        return Prompt(ids, text, self._start_in(tgt_lang))

    def prepare_ids(self, ids: list[int], src_lang: str | None = None, tgt_lang: str | None = None) -> Prompt:
        """The same of a source's token ids. Raises InvalidPrompt. Any thread."""
        if src_lang is not None:
            raise InvalidPrompt("src_lang is for a text: token ids have their language's token among them")
        self._check_language("tgt_lang", tgt_lang)
        return Prompt(ids, start_ids=self._start_in(tgt_lang))

    def encode(self, text: str, src_lang: str | None = None, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a source; src_lang: one of `languages`. Raises InvalidPrompt. Any thread."""
        with self._lock:
            if self.languages:
                self.tokenizer.src_lang = src_lang or self._source_language
            return token_ids(self.tokenizer, text, add_special_tokens)

    def _check_language(self, field_: str, code: str | None) -> None:
        if code is None or code in self.languages:
            return
        if not self.languages:
            raise InvalidPrompt(f"{field_}: this base is not told languages")
        known = ", ".join(list(self.languages)[:SHOWN_LANGUAGES])
        more = ", …" if len(self.languages) > SHOWN_LANGUAGES else ""
        raise InvalidPrompt(f"{field_} {code!r} is none of this base's languages: {known}{more}")

    def _start_in(self, code: str | None) -> tuple[int, ...] | None:
        """A language is the first token of a target where the base's own targets begin with one."""
        if code is None:
            return None
        start, language = self._start_ids[0], self.languages[code]
        return (language,) if start in self.languages.values() else (start, language)


class SequenceClassification:
    """One label, several labels, or a value, for a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def prepare(self, text: str) -> Prompt:
        return Prompt(_encode(self.tokenizer, text)["input_ids"], text)

    def finish(self, logits: NDArray[np.float32], info: AdapterInfo) -> dict[str, Any]:
        """logits [num_labels]: softmax, sigmoid for multi-label, the values themselves for regression."""
        values: NDArray[Any] = logits
        if info.problem_type == MULTI_LABEL:
            values = 1 / (1 + np.exp(-logits))
        elif info.problem_type != REGRESSION:
            values = _softmax(logits)
        best = int(values.argmax())
        return {
            "label": info.labels[best],
            "score": float(values[best]),
            "scores": {label: float(value) for label, value in zip(info.labels, values, strict=True)},
        }


class TokenClassification:
    """Labelled spans of a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def prepare(self, text: str) -> Prompt:
        encoded = _encode(self.tokenizer, text, return_offsets_mapping=True)
        offsets = [_stripped(text, start, end) for start, end in encoded["offset_mapping"]]
        return Prompt(encoded["input_ids"], text, offsets=offsets, word_ids=encoded.word_ids())

    def finish(self, logits: NDArray[np.float32], prompt: Prompt, info: AdapterInfo) -> dict[str, Any]:
        """logits [tokens, num_labels] -> entities with character offsets, and the tokens with their labels.

        A word (as the tokenizer splits them) has the label of its first token, as PEFT's and transformers' token
        classification examples train it.
        """
        probs = _softmax(logits)
        words: list[Word] = []
        tokens = []
        word = None
        for i, (start, end) in enumerate(prompt.offsets):
            if prompt.word_ids[i] is None or start == end:
                continue
            best = int(probs[i].argmax())
            score = float(probs[i, best])
            tokens.append({"text": prompt.text[start:end], "label": info.labels[best], "score": score})
            if prompt.word_ids[i] == word and words:
                words[-1].end = end
            else:
                words.append(Word(start, end, info.labels[best], score))
            word = prompt.word_ids[i]
        return {"entities": join_words(words, prompt.text), "tokens": tokens}


class FeatureExtraction:
    """One vector for a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def prepare(self, text: str) -> Prompt:
        return Prompt(_encode(self.tokenizer, text)["input_ids"], text)

    def finish(self, embedding: NDArray[np.float32]) -> dict[str, Any]:
        return {"embedding": [float(x) for x in embedding]}


class Tasks:
    """One of each kind, for one tokenizer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, start_ids: tuple[int, ...] = (), render: Render | None = None
    ) -> None:
        """start_ids: what targets begin with, on an encoder-decoder. render: as ChatTemplate has it."""
        self.causal_lm = CausalLM(tokenizer, render)
        self.seq_2_seq_lm = Seq2SeqLM(tokenizer, start_ids)
        self.sequence_classification = SequenceClassification(tokenizer)
        self.token_classification = TokenClassification(tokenizer)
        self.feature_extraction = FeatureExtraction(tokenizer)


@dataclass
class Word:
    """A word with its label."""

    start: int
    end: int
    label: str
    score: float


def join_words(words: Sequence[Word], text: str) -> list[dict[str, Any]]:
    """Neighbouring words of one entity, joined.

    With B-/I- labels an entity is a B- (or a first I-) and the I- of its kind that follow; `O` is no entity. Where
    labels have no such prefix, neighbours of one label are one entity. Its score is the mean of its words'.
    """
    runs: list[tuple[str, list[Word]]] = []
    open_label = None
    for word in words:
        prefix, kind = _split_label(word.label)
        if kind is None:
            open_label = None
            continue
        if kind == open_label and prefix != "B":
            runs[-1][1].append(word)
        else:
            runs.append((kind, [word]))
        open_label = kind
    return [
        {
            "label": label,
            "score": sum(word.score for word in run) / len(run),
            "start": run[0].start,
            "end": run[-1].end,
            "text": text[run[0].start : run[-1].end],
        }
        for label, run in runs
    ]


def _split_label(label: str) -> tuple[str, str | None]:
    if label == "O":
        return "", None
    match = re.fullmatch(r"([BI])-(.+)", label)
    return (match[1], match[2]) if match else ("", label)


def _languages(tokenizer: Any) -> dict[str, int]:
    """What a translating tokenizer calls its languages, and the token of each."""
    if not hasattr(tokenizer, "src_lang"):
        return {}
    if hasattr(tokenizer, "lang_code_to_id"):
        return dict(tokenizer.lang_code_to_id)
    added = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    return {code: token_id for code, token_id in added.items() if re.fullmatch(LANGUAGE_CODE, code)}


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    """Of a text, none of an empty one. Raises InvalidPrompt. Any thread."""
    with panics_as(InvalidPrompt(UNREADABLE)):
        return list(tokenizer.encode(text, verbose=False, add_special_tokens=add_special_tokens))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> Any:
    with panics_as(InvalidPrompt(UNREADABLE)):
        encoded = tokenizer(text, verbose=False, **options)
    if not encoded["input_ids"]:
        raise InvalidPrompt("the input has no tokens")
    return encoded


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """Offsets without the spaces that byte-level tokens carry in front."""
    while start < end and text[start].isspace():
        start += 1
    return start, end


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    result: NDArray[np.float32] = shifted / shifted.sum(-1, keepdims=True)
    return result

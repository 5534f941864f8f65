"""Text as it grows: multi-byte characters whole, stop strings never leaking, whatever the tokens are cut into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from server.engine.detokenizer import TextStream
from tests.support import tiny_tokenizer
from tests.test_seq2seq import marian_tokenizer

TOKENIZER = tiny_tokenizer()
ALPHABET = "abé日🙂 "
TEXT = "the quick naïve café 日本語 🙂 fox"


def stream(text: str, stop: list[str]) -> tuple[list[str], TextStream, int]:
    """The pieces of `text`, token by token, and how many tokens were taken."""
    growing = TextStream(TOKENIZER, stop)
    pieces = []
    taken = 0
    for token in TOKENIZER(text)["input_ids"]:
        pieces.append(growing.push(token))
        taken += 1
        if growing.stopped:
            break
    pieces.append(growing.finish())
    return pieces, growing, taken


def test_pieces_make_the_text_and_split_no_character() -> None:
    pieces, growing, _ = stream(TEXT, [])
    assert "".join(pieces) == growing.text == TEXT
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["naïve"], "the quick "),
        (["日本"], "the quick naïve café "),
        (["🙂"], "the quick naïve café 日本語 "),
        (["café 日", "zzz"], "the quick naïve "),
        (["quick naïve", "uick"], "the q"),
        (["t"], ""),
        (["absent"], TEXT),
        (["fox "], TEXT),
    ],
)
def test_stop_strings_across_tokens(stop: list[str], expected: str) -> None:
    pieces, growing, taken = stream(TEXT, stop)
    assert "".join(pieces) == growing.text == expected
    assert growing.stopped == (expected != TEXT)
    assert taken == len(TOKENIZER(TEXT)["input_ids"]) or growing.stopped


def test_special_tokens_are_no_text() -> None:
    growing = TextStream(TOKENIZER)
    assert TOKENIZER.eos_token_id is not None
    assert growing.push(TOKENIZER.eos_token_id) + growing.finish() == ""


def test_an_unfinished_character_shows_at_the_end_only() -> None:
    growing = TextStream(TOKENIZER)
    first_byte = TOKENIZER("日")["input_ids"][:1]
    assert len(TOKENIZER("日")["input_ids"]) > 1
    assert growing.push(first_byte[0]) == ""
    assert growing.finish() == TOKENIZER.decode(first_byte)


@settings(max_examples=200, deadline=None)
@given(text=st.text(ALPHABET, max_size=30), stop=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3))
def test_any_text_with_any_stops(text: str, stop: list[str]) -> None:
    pieces, growing, _ = stream(text, stop)
    places = [place for place in (text.find(s) for s in stop) if place >= 0]
    got = "".join(pieces)
    assert got == growing.text
    if not places:
        assert got == text
    else:
        assert text.startswith(got)
        assert len(got) >= min(places)
        assert not any(s in got for s in stop)


@pytest.mark.parametrize("stop", [[], ["qu"]])
def test_special_tokens_are_left_out_but_for_those_that_are_shown(stop: list[str]) -> None:
    ids = [0, *TOKENIZER("né🙂")["input_ids"], 1, 2, 1, *TOKENIZER("x")["input_ids"], 0]
    for shown, expected in ((frozenset[int](), "né🙂x"), (frozenset({1}), "né🙂<s><s>x")):
        growing = TextStream(TOKENIZER, stop, shown)
        assert "".join([*map(growing.push, ids), growing.finish()]) == expected


@pytest.mark.parametrize("text", ["the €uro 🙂 fox", "🙂🙂"])
@pytest.mark.parametrize("kind", ["Marian", "ByT5"])
@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses:UserWarning")
def test_characters_of_several_tokens_by_tokenizers_in_python(kind: str, text: str, tmp_path: Path) -> None:
    tokenizer: Any = ByT5Tokenizer()
    if kind == "Marian":
        tokenizer = marian_tokenizer(tmp_path / "spm", vocab_size=330, byte_fallback=True)
    assert not tokenizer.is_fast
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids]
    assert len(list(filter(None, pieces))) > 1
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids, skip_special_tokens=True) == text

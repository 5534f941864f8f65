"""CallParser: calls in a text, however it is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.calls import CallParser, read_calls

NAMES = ["get", "get_more"]
GET = '<tool_call>\n{"name": "get", "arguments": {"city": "Paris"}}\n</tool_call>'
MORE = '<tool_call>{"arguments":{},"name":"get_more"}</tool_call>'
Result = tuple[str, list[tuple[int, str, str]]]
PARIS, NOTHING = ("get", '{"city": "Paris"}'), ("get_more", "{}")


def parse(pieces: Iterable[str], ended: bool = True) -> Result:
    parser = CallParser(NAMES)
    parsed = [*map(parser.push, pieces), parser.finish(ended)]
    calls = [call for part in parsed for call in part.calls]
    return "".join(part.text for part in parsed), [(c.index, c.name, c.arguments) for c in calls]


TEXTS: list[tuple[str, str, list[tuple[str, str]]]] = [  # text, what is said in it, what is called
    ("", "", []),
    ("just text \n", "just text \n", []),
    (GET, "", [PARIS]),
    (f" \n{GET}\n", "", [PARIS]),
    (f"I look. \n{GET}", "I look.", [PARIS]),
    (f"{GET}\n{MORE}", "", [PARIS, NOTHING]),
    (f"{GET}\nand {MORE} so\n", "\nand so\n", [PARIS, NOTHING]),
    ('<tool_call>[{"name": "get", "arguments": {"city": "Paris"}}, {"name": "get_more", "arguments": {}}]</tool_call>',
     "", [PARIS, NOTHING]),
    ('<tool_call>{"name": "get", "arguments": {"a": "</tool_call> \\" }] <tool_call>"}}</tool_call>',
     "", [("get", '{"a": "</tool_call> \\" }] <tool_call>"}')]),
    ('<tool_call>{"name": "get", "arguments": {"a": "\\ud83d\\ude00é"}}</tool_call>', "", [("get", '{"a": "😀é"}')]),
    ('<tool_call>{"name": "get", "arguments": {"a": "\\ud83d"}}</tool_call>', "", [("get", '{"a": "\\ud83d"}')]),
    ('<tool_call> {"name": "get", "arguments": {"a": [1, {"b": [[]]}]}} ', "", [("get", '{"a": [1, {"b": [[]]}]}')]),
    (f"<tool_call><tool_call>no {GET}", "<tool_call><tool_call>no", [PARIS]),
    (f'<tool_call>{{"name": " {MORE}', '<tool_call>{"name": "', [NOTHING]),
]  # fmt: skip
NO_CALLS = [
    "<tool_call>",
    "<tool_call>\n",
    "a <tool_cal",
    '<tool_call>{"name": "get", "arguments": {"city": "Par',
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "get", "arguments": "{}"}</tool_call>',
    '<tool_call>{"name": "get"}</tool_call>',
    '<tool_call>{"name": "get", "arguments": {"a": 1e999}}</tool_call>',
    '<tool_call>{"name": "get", "arguments": {"a": NaN}}</tool_call>',
    '<tool_call>{"name": "get", "arguments": {"a": "\n"}}</tool_call>',
    '<tool_call>{"name": "get", "arguments": {},}</tool_call>',
    '<tool_call>{"name": "get", "arguments": {}} or</tool_call>',
    '<tool_call>[{"name": "get", "arguments": {}}, 3]</tool_call>',
    "<tool_call>[]</tool_call>",
    "<tool_call>}</tool_call>",
    "<tool_call>get(1)</tool_call>",
    "<tool_call>" + "[" * 3000 + "]" * 3000 + "</tool_call>",
]
TEXTS += [(text, text, []) for text in NO_CALLS]


@pytest.mark.parametrize(("text", "said", "called"), TEXTS)
def test_calls_are_found_in_every_pair_of_pieces(text: str, said: str, called: list[tuple[str, str]]) -> None:
    expected = said, [(i, *call) for i, call in enumerate(called)]
    assert parse([text]) == expected
    if len(text) < 300:
        assert parse(text) == expected
        for a, b in combinations(range(len(text) + 1), 2):
            assert parse([text[:a], text[a:b], text[b:]]) == expected


FRAGMENTS = ["<tool_call>", "</tool_call>", "<tool", "_call>", '{"name": "get", "arguments": ', "{}", "}", "[", "]",
             ", ", '"', "\\", "\n", " ", "é🦊", "x", GET, MORE]  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12), st.data())
def test_pieces_make_no_difference_and_nothing_is_lost(fragments: list[str], data: st.DataObject) -> None:
    text = "".join(fragments)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    ended = data.draw(st.booleans())
    cuts = [0, *places, len(text)]
    whole = parse([text], ended)
    assert parse((text[a:b] for a, b in pairwise(cuts)), ended) == whole
    assert parse(text, ended) == whole
    if not whole[1]:
        assert whole[0] == text


def test_text_is_not_held_back() -> None:
    parser = CallParser(NAMES)
    assert [parser.push(piece).text for piece in ("a", " b", " <", "i>", " <tool", "s>")] == [
        "a", " b", "", " <i>", "", " <tools>"]  # fmt: skip
    assert parser.push("<tool_call> no").text == "<tool_call> no", "it begins no JSON"


def test_a_call_that_was_cut_off_is_text_and_one_without_its_end_tag_a_call() -> None:
    cut = GET.removesuffix("</tool_call>")
    assert parse([cut], ended=False) == (cut, [])
    for rest in ("", "<", "</tool_call"):
        assert parse([cut + rest]) == ("", [(0, *PARIS)])


@pytest.mark.parametrize("unit", ['<tool_call>{"', "<tool_call>[", " ", "<tool_call", '<tool_call>{"\\"'])
def test_a_long_text_without_calls_comes_back(unit: str) -> None:
    text = unit * 3000
    assert parse(text, ended=False) == (text, [])


def test_calls_are_read() -> None:
    assert read_calls(json.dumps({"name": "get", "arguments": {}}), {"get"}) == [("get", "{}")]
    assert read_calls("{", {"get"}) is None

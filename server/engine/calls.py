"""CallParser: a generated text, piece by piece -> what was said, and the calls of functions in it.

A call is `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Hermes and its followers write it; a list of such
objects between the tags is several calls, as SmolLM2 writes them. Knows nothing of templates, tokens or HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field

OPEN, CLOSE = "<tool_call>", "</tool_call>"
OUTSIDE = frozenset(' \n\r\t{}[],:"-+.0123456789eEtrufalsn')
"""All that JSON has outside of strings."""


@dataclass(frozen=True)
class Call:
    """One call of a function."""

    index: int
    """Its place among the calls of this answer."""
    name: str
    arguments: str
    """A JSON object, as text."""


@dataclass
class Parsed:
    """What became certain."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)


class CallParser:
    """One answer's text and calls, the same however the text is cut into pieces.

    Space before a call's tag, and at the end after a call, belongs to the markup. What looks like a call and is none
    (no JSON, a function that is not offered, cut off) is text.
    """

    def __init__(self, names: Collection[str]) -> None:
        """names: of the functions that may be called."""
        self._names = names
        self._text = ""
        """Not given out yet. Where a call may have begun: the space before its tag."""
        self._body: str | None = None
        """What follows the tag of a call that may have begun."""
        self._value = _JsonValue()
        self._after_call = False
        self.num_calls = 0

    def push(self, piece: str) -> Parsed:
        """Take more text; return what is certain now."""
        if self._body is None:
            self._text += piece
        else:
            self._body += piece
        parsed = Parsed()
        self._advance(parsed)
        return parsed

    def finish(self, ended: bool) -> Parsed:
        """No more text. ended: by the model itself, so that a whole call whose end tag is missing counts (as vLLM)."""
        parsed = Parsed()
        while self._body is not None:
            calls = read_calls(self._body[: self._value.end], self._names) if ended and self._value.end else None
            if calls:
                self._accept(parsed, calls, "")
            else:
                self._reject(parsed)
            self._advance(parsed)
        if not (self._after_call and self._text.isspace()):
            self._give(parsed, self._text)
        self._text = ""
        return parsed

    def _advance(self, parsed: Parsed) -> None:
        """As far as the text that is there allows."""
        while (self._find_tag if self._body is None else self._read_body)(parsed):
            pass

    def _find_tag(self, parsed: Parsed) -> bool:
        """Whether there was one. What is certainly text is given out."""
        before, tag, after = self._text.partition(OPEN)
        kept = len(before.rstrip()) if tag else _certain(before)
        self._give(parsed, before[:kept])
        self._text = before[kept:]
        if tag:
            self._body, self._value = after, _JsonValue()
        return bool(tag)

    def _read_body(self, parsed: Parsed) -> bool:
        """Whether it became clear if it is a call's."""
        assert self._body is not None
        self._value.read(self._body)
        if not self._value.end:
            if self._value.broken:
                self._reject(parsed)
            return self._value.broken
        rest = self._body[self._value.end :].lstrip()
        if not rest.startswith(CLOSE) and CLOSE.startswith(rest):
            return False
        calls = read_calls(self._body[: self._value.end], self._names)
        if calls and rest.startswith(CLOSE):
            self._accept(parsed, calls, rest[len(CLOSE) :])
        else:
            self._reject(parsed)
        return True

    def _accept(self, parsed: Parsed, calls: list[tuple[str, str]], rest: str) -> None:
        for name, arguments in calls:
            parsed.calls.append(Call(self.num_calls, name, arguments))
            self.num_calls += 1
        self._text, self._body, self._after_call = rest, None, True

    def _reject(self, parsed: Parsed) -> None:
        """The tag is text; another may follow in what was taken for a call."""
        assert self._body is not None
        self._give(parsed, self._text + OPEN)
        self._text, self._body = self._body, None

    def _give(self, parsed: Parsed, text: str) -> None:
        if text:
            parsed.text += text
            self._after_call = False


class _JsonValue:
    """Where a JSON object or list at a text's beginning ends, found as the text grows; each character is read once."""

    def __init__(self) -> None:
        self.end = 0
        """Where it ends; 0: not known yet."""
        self.broken = False
        """It is no object or list."""
        self._at = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def read(self, text: str) -> None:
        """text: all that there is so far."""
        while self._at < len(text) and not self.end and not self.broken:
            self._take(text[self._at])
            self._at += 1
            if self._depth == 0 and text[self._at - 1] in "}]":
                self.end = self._at

    def _take(self, char: str) -> None:
        if self._in_string:
            self.broken = char < " "
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
            return
        self.broken = char not in OUTSIDE or (self._depth == 0 and char not in " \n\r\t{[")
        self._in_string = char == '"'
        self._depth += (char in "{[") - (char in "}]")


def read_calls(text: str, names: Collection[str]) -> list[tuple[str, str]] | None:
    """(name, arguments as JSON) of each call in a JSON object or list. None: they are not calls of `names`."""
    calls = []
    try:
        value = json.loads(text)
        for item in value if isinstance(value, list) else [value]:
            match item:
                case {"name": str(name), "arguments": dict(arguments)} if name in names:
                    calls.append((name, _json(arguments)))
                case _:
                    return None
    except (ValueError, RecursionError):
        return None
    return calls or None


def _json(arguments: dict[str, object]) -> str:
    """Raises ValueError for a number that is too large."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character, which JSON can write and Unicode has not
        return json.dumps(arguments)
    return text


def _certain(text: str) -> int:
    """How much of it is text whatever follows: not the space before, or the beginning of, a tag."""
    begun = next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)
    return len(text[: len(text) - begun].rstrip())

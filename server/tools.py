"""ToolUse: the functions that one request offers, what the output is held to for them, and who reads its calls.

Knows nothing of HTTP or of templates; the way in which the base writes calls is a `Markup`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.engine.calls import CLOSE, OPEN, CallParser
from server.engine.chat import Markup

ANSWER = "answer"
ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Function:
    """One that may be called."""

    name: str
    parameters: Mapping[str, Any]
    """JSON schema of an object: its arguments."""
    strict: bool
    """Whether arguments are held to the schema also where the model is free to call or not."""


@dataclass(frozen=True)
class ToolUse:
    """How one request's functions may be called."""

    markup: Markup
    functions: Sequence[Function]
    required: bool
    """There must be a call; else the model may answer in text."""
    parallel: bool
    """There may be several calls."""

    def parser(self) -> CallParser:
        """For one answer."""
        return CallParser({function.name for function in self.functions})

    def grammar(self, answer: Any = None) -> tuple[str, dict[str, Any]] | None:
        """A grammar in Lark and the schemas that it names, for `Grammars.of_lark`; None: the text is free.

        answer: the schema of an answer that is no call, if it has one.
        """
        held = self.required or answer is not None or not self.parallel or any(f.strict for f in self.functions)
        if not held:
            return None
        schemas = {}
        for number, function in enumerate(self.functions):
            exact = self.required or function.strict
            schemas[f"arguments{number}"] = {**ANY_OBJECT, **function.parameters} if exact else ANY_OBJECT
        rules = [*self._calls(), *self._bodies()]
        if self.required:
            return "\n".join(["start: calls", *rules]), schemas
        if answer is not None:
            return "\n".join([f"start: calls | @{ANSWER}", *rules]), {**schemas, ANSWER: answer}
        return "\n".join([*self._free(), *rules]), schemas

    def _calls(self) -> list[str]:
        """Rules: calls; and opened, which is what follows the first tag."""
        first, last = _tag(OPEN, self.markup.open_id), _tag(CLOSE, self.markup.close_id)
        if self.markup.listed:
            more = '(", " call)*' if self.parallel else ""
            return [f"calls: {first} opened", f'opened: "[" call {more} "]" {last}']
        more = f'("\\n" {first} "\\n" call "\\n" {last})*' if self.parallel else ""
        return [f"calls: {first} opened", f'opened: "\\n" call "\\n" {last} {more}']

    def _bodies(self) -> list[str]:
        """Rules: call, which is the object between tags."""
        rules = ["call: " + " | ".join(f"call{number}" for number in range(len(self.functions)))]
        for number, function in enumerate(self.functions):
            begin = json.dumps(f'{{"name": "{function.name}", "arguments": ')
            rules.append(f'call{number}: {begin} @arguments{number} "}}"')
        return rules

    def _free(self) -> list[str]:
        """Rules: start. Text without the tag, then calls or none; tokens that the tokenizer added count as text."""
        inline = ",".join(map(str, self.markup.inline))
        run = f"(PIECE? <[{inline}]>)*" if inline else '""'
        text = [f"run: {run}", f"PIECE: /(?s:.+)/ & ~/(?s:.*){OPEN}(?s:.*)/"]
        if self.markup.open_id is not None:
            return [f"start: run PIECE? | run PIECE? <[{self.markup.open_id}]> opened", *text]
        return ["start: run PIECE? | run first opened", f'first[lazy]: /(?s:.*)/ "{OPEN}"', *text]


def _tag(text: str, token_id: int | None) -> str:
    """A token of its own is none of the texts that the grammar's library knows."""
    return f'"{text}"' if token_id is None else f"<[{token_id}]>"

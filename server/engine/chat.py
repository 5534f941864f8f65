"""ChatTemplate: messages and tools -> a prompt's token ids, by the base's own template, and what that knows of tools.

What a template knows is seen by giving it a conversation with a tool and reading what it makes of it; nothing follows
from a model's name. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from server.engine.calls import CLOSE, OPEN, CallParser

PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probed_function",
        "description": "probed description",
        "parameters": {
            "type": "object",
            "properties": {"probed": {"type": "string", "description": "an argument"}},
            "required": ["probed"],
        },
    },
}
PROBE_CALL: dict[str, Any] = {
    "id": "probed123",  # nine letters or digits, as some templates want them
    "type": "function",
    "function": {"name": "probed_function", "arguments": {"probed": "probed value"}},
}
PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "probed question"},
    {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]},
    {"role": "tool", "tool_call_id": "probed123", "name": "probed_function", "content": "probed result"},
]
INSTRUCTION = re.compile(OPEN + r"\s*(\[?)\s*\{\s*[\"']name[\"'].*[\"']arguments[\"'].*" + CLOSE, re.DOTALL)


Render = Callable[[str, Sequence[dict[str, Any]], Sequence[dict[str, Any]], dict[str, Any]], str]
"""Of template, messages, tools, and what else the template finds: the text. Raises TemplateError. Any thread."""


class InvalidMessages(ValueError):
    """Messages or tools that the template does not know; the message may be shown to the caller."""


@dataclass(frozen=True)
class Markup:
    """How a base writes calls."""

    listed: bool
    """All of one answer as a list between one pair of tags; else each as an object between tags of its own."""
    open_id: int | None
    close_id: int | None
    """The tags' tokens, where the vocabulary has them whole."""
    skipped: frozenset[int]
    """Those of them that are special, so that decoding would leave them out."""
    inline: tuple[int, ...]
    """Other added tokens that are plain text to the tokenizer (`<think>`)."""

    def written(self, calls: Sequence[Any]) -> str:
        """A message's `tool_calls`, with objects as arguments, as the base writes them."""
        bodies = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
        if self.listed:
            return f"{OPEN}[{', '.join(bodies)}]{CLOSE}"
        return "\n".join(f"{OPEN}\n{body}\n{CLOSE}" for body in bodies)


@dataclass(frozen=True)
class Knowledge:
    """What of a conversation with a tool the template shows."""

    tools: bool
    calls: bool
    results: bool
    text: str


class ChatTemplate:
    """One tokenizer's. Any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, render: Render | None = None) -> None:
        """render: what renders a template that is not trusted; None: transformers does, here."""
        self._tokenizer = tokenizer
        self._render = render

    def prompt(
        self, messages: Sequence[dict[str, Any]], answer: bool, tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Token ids. answer: open for the assistant's. Arguments of calls in the messages are JSON text.

        Raises InvalidMessages, and what the template raises: TemplateError, TypeError.
        """
        if tools:
            _ = self.markup  # calls that nobody could read are not asked for
        knowledge = self._with_tools if tools else self._without_tools
        known = [self._known(i, message, knowledge) for i, message in enumerate(messages)]
        return [int(i) for i in self._apply(known, tools, True, add_generation_prompt=answer)]

    @cached_property
    def markup(self) -> Markup:
        """How the base writes calls. Raises InvalidMessages when it has no tools, or writes in another way."""
        if not self._with_tools.tools:
            raise InvalidMessages("this base model's chat template has no tools: send none, or tool_choice: none")
        listed = _listed(self._with_tools)
        if listed is None:
            raise InvalidMessages(
                "this base model's chat template has tools, but not the form of calls that is understood here: "
                f'{OPEN}{{"name": …, "arguments": {{…}}}}{CLOSE}'
            )
        added = self._tokenizer.added_tokens_decoder
        ids = {token.content: i for i, token in added.items()}
        tags = {i for i in (ids.get(OPEN), ids.get(CLOSE)) if i is not None}
        return Markup(
            listed,
            ids.get(OPEN),
            ids.get(CLOSE),
            frozenset(i for i in tags if added[i].special),
            tuple(sorted(i for i, token in added.items() if not token.special and i not in tags)),
        )

    def _known(self, index: int, message: dict[str, Any], knowledge: Knowledge) -> dict[str, Any]:
        """The message as the template takes it: its calls' arguments as objects. Raises InvalidMessages."""
        if message["role"] == "tool" and not knowledge.results:
            raise InvalidMessages(f"messages.{index}: this base model's chat template does not know the role tool")
        if "tool_calls" not in message:
            return message
        calls = []
        for number, call in enumerate(message["tool_calls"]):
            function, place = call["function"], f"messages.{index}.tool_calls.{number}.function.arguments"
            calls.append({**call, "function": {**function, "arguments": _object(function["arguments"], place)}})
        if knowledge.calls:
            return {**message, "tool_calls": calls}
        try:
            written = self.markup.written(calls)
        except InvalidMessages:
            raise InvalidMessages(
                f"messages.{index}: this base model's chat template does not know tool_calls"
            ) from None
        content = f"{message['content']}\n{written}" if message["content"] else written
        return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}

    @cached_property
    def _with_tools(self) -> Knowledge:
        return self._probed([PROBE_TOOL])

    @cached_property
    def _without_tools(self) -> Knowledge:
        return self._probed([])

    def _probed(self, tools: list[dict[str, Any]]) -> Knowledge:
        asked, told = self._text(PROBE[:1], tools), self._text(PROBE, tools)
        shown = "probed description" in asked
        return Knowledge(shown, "probed value" in told, "probed result" in told, told or asked)

    def _text(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        """Empty when the template refuses."""
        try:
            return str(self._apply(messages, tools, False, add_generation_prompt=False))
        except (TemplateError, TypeError, ValueError):
            return ""

    def _apply(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], tokenize: bool, **options: Any
    ) -> Any:
        """Token ids, or the text."""
        templates = self._tokenizer.chat_template
        if isinstance(templates, dict) and "tool_use" in templates and _have_tools(messages):
            options["chat_template"] = "tool_use"
        if tools:
            options["xml_tools"] = list(tools)  # another name for them
        if self._render is None:
            options |= {"tokenize": tokenize, "return_dict": False}
            return self._tokenizer.apply_chat_template(list(messages), tools=list(tools) or None, **options)
        template = self._tokenizer.get_chat_template(options.pop("chat_template", None), list(tools) or None)
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        text = self._render(template, given, tools, {**self._tokenizer.special_tokens_map, **options})
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if tokenize else text


def _have_tools(messages: Sequence[dict[str, Any]]) -> bool:
    return any(message["role"] == "tool" or "tool_calls" in message for message in messages)


def _listed(knowledge: Knowledge) -> bool | None:
    """Whether calls are written as a list; None: in no way that CallParser reads.

    As the template writes a call; where it writes none, as it tells the model to.
    """
    if not knowledge.calls:
        told = INSTRUCTION.search(knowledge.text)
        return None if told is None else bool(told[1])
    parser = CallParser(["probed_function"])
    calls = parser.push(knowledge.text).calls + parser.finish(ended=False).calls
    if [json.loads(call.arguments) for call in calls] != [{"probed": "probed value"}]:
        return None
    return re.search(OPEN + r"\s*\[\s*\{\s*\"name\": *\"probed_function\"", knowledge.text) is not None


def _object(text: str, place: str) -> dict[str, Any]:
    """Raises InvalidMessages."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # what the prompt can hold
    except (ValueError, RecursionError) as error:
        raise InvalidMessages(f"{place} is not a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise InvalidMessages(f"{place} is JSON, but not an object")
    return value

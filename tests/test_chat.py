"""ChatTemplate: what a chat template knows of tools, by what it makes of them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from server.engine.chat import ChatTemplate, InvalidMessages
from server.engine.tasks import CausalLM, InvalidPrompt
from tests import tools_support
from tests.support import tiny_tokenizer
from tests.tools_support import LLAMA3, PLAIN, QWEN, QWEN_CODER, SMOLLM2, SMOLLM3, STRICT

TOOL = {"type": "function", "function": {"name": "get_é", "parameters": {"type": "object", "properties": {}}}}
ASK = {"role": "user", "content": "where?"}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "a", "arguments": '{"x": "é"}'}},
        {"id": "2", "type": "function", "function": {"name": "b", "arguments": "{}"}},
    ],
}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "there"}
AS_OBJECTS = '<tool_call>\n{"name": "a", "arguments": {"x": "é"}}\n</tool_call>\n<tool_call>\n{"name": "b", '
AS_LIST = '<tool_call>[{"name": "a", "arguments": {"x": "é"}}, {"name": "b", "arguments": {}}]</tool_call>'


def tokenizer_with(template: Any) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def prompt(template: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    tokenizer = tokenizer_with(template)
    text = tokenizer.decode(CausalLM(tokenizer).prepare_chat(messages, True, tools or []).token_ids)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(("name", "listed"), [("QWEN", False), ("SMOLLM2", True), ("SMOLLM3", False)])
def test_the_form_of_calls_is_the_templates(name: str, listed: bool) -> None:
    template = getattr(tools_support, name)
    markup = ChatTemplate(tokenizer_with(template)).markup
    assert markup.listed == listed
    assert (markup.open_id, markup.close_id, markup.skipped) == (None, None, frozenset())
    assert '"name": "get_é"' in prompt(template, [ASK], [TOOL]).replace("'", '"')


@pytest.mark.parametrize("template", [QWEN_CODER, LLAMA3])
def test_other_forms_are_refused(template: str) -> None:
    with pytest.raises(InvalidMessages, match="not the form of calls"):
        ChatTemplate(tokenizer_with(template)).markup  # noqa: B018


@pytest.mark.parametrize("template", [PLAIN, STRICT])
def test_a_template_without_tools_refuses_them(template: str) -> None:
    with pytest.raises(InvalidPrompt, match="has no tools"):
        prompt(template, [ASK], [TOOL])
    with pytest.raises(InvalidPrompt, match=r"messages\.1: .* does not know tool_calls"):
        prompt(template, [ASK, CALLED])


def test_results_are_never_dropped() -> None:
    assert "there" in prompt(PLAIN, [ASK, RESULT])
    with pytest.raises(InvalidPrompt, match=r"messages\.1: .* the role tool"):
        prompt(STRICT, [ASK, RESULT])


@pytest.mark.parametrize("tools", [[], [TOOL]])
@pytest.mark.parametrize(
    ("template", "written"), [(QWEN, AS_OBJECTS), (SMOLLM2, AS_LIST), (SMOLLM3, AS_OBJECTS)]
)  # fmt: skip
def test_calls_and_results_are_shown(template: str, written: str, tools: list[dict[str, Any]]) -> None:
    text = prompt(template, [ASK, {**CALLED, "content": "I look"}, RESULT], tools)
    assert f"I look\n{written}" in text
    assert "there" in text
    assert ("get_é" in text) == bool(tools)


def test_tags_that_are_tokens_are_known() -> None:
    for special in (False, True):
        tokenizer = tokenizer_with(QWEN)
        names = ["<tool_call>", "</tool_call>", "<think>"]
        tokenizer.add_tokens([AddedToken(name, special=special) for name in names])
        first, last, think = (tokenizer.get_vocab()[name] for name in names)
        markup = ChatTemplate(tokenizer).markup
        assert (markup.open_id, markup.close_id) == (first, last)
        assert markup.skipped == ({first, last} if special else set())
        assert markup.inline == (() if special else (think,))


def test_a_template_of_several_names() -> None:
    named = {"default": STRICT, "tool_use": QWEN}
    assert "get_é" in prompt(named, [ASK], [TOOL])
    assert AS_OBJECTS in prompt(named, [ASK, CALLED, RESULT])
    assert prompt(named, [ASK]) == "where?"


@pytest.mark.parametrize("arguments", ["", "[]", "{", "3", '{"a": NaN}', '{"a": "\\ud800"}', "[" * 2000])
def test_arguments_that_are_no_object(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "a", "arguments": arguments}}
    with pytest.raises(InvalidPrompt, match=r"^messages\.1\.tool_calls\.0\.function\.arguments is "):
        prompt(QWEN, [ASK, {**CALLED, "tool_calls": [call]}])


def test_no_template_at_all() -> None:
    with pytest.raises(InvalidPrompt, match="no chat template"):
        CausalLM(tokenizer_with(None)).markup  # noqa: B018

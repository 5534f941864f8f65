"""Tools: what the output is held to, and the chat route on bases whose templates have tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from server.engine.chat import ChatTemplate
from server.engine.grammar import Grammar, Grammars
from server.tools import Function, ToolUse
from tests.support import Live, live_server, service_for
from tests.tools_support import QWEN, SMOLLM2, save_tool_base

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Rome", "Oslo"]}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": CITY}}
STRICT_WEATHER = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
TIME = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
ASK = [{"role": "user", "content": "what is it like?"}]
CALL_ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ROME = ("weather", {"city": "Rome"})
NAMED = {"type": "function", "function": {"name": "weather"}}
END = {"2": 100}
"""A bias: end as soon as one may."""
SPELLED = pytest.mark.parametrize("live_tools", ["text", "list"], indirect=True)
"""Where a structured output can write the tags: it never writes special tokens."""


@pytest.fixture(scope="module", params=["text", "tokens", "list"])
def live_tools(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Servers of bases with tools; their tags are plain text, special tokens, or plain text around a list."""
    template = SMOLLM2 if request.param == "list" else QWEN
    directory = save_tool_base(tmp_path_factory.mktemp(request.param) / "base", template, request.param == "tokens")
    with live_server(service_for(directory, "tiny", kv_cache_bytes=256 << 20)) as running:
        yield running


@pytest.fixture
def tool_client(live_tools: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live_tools.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, **options: Any) -> Any:
    body = {"model": "tiny", "messages": ASK, "tools": TOOLS, "max_tokens": 300, "temperature": 1, **options}
    return client.chat.completions.create(**body)


def calls(message: Any) -> list[tuple[str, Any]]:
    ids = [call.id for call in message.tool_calls or []]
    assert len(set(ids)) == len(ids)
    assert all(each.startswith("call_") for each in ids)
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def forced(text: str) -> dict[str, Any]:
    """The whole output."""
    return {"extra_body": {"structured_outputs": {"choice": [text]}}}


def test_a_required_call_is_valid(tool_client: openai.OpenAI, live_tools: Live) -> None:
    [bracket] = httpx.post(f"{live_tools.url}/tokenize", json={"prompt": "]"}).json()["tokens"]
    bias = {**END, str(bracket): 100}  # else a list may go on until the limit
    for choice in chat(tool_client, tool_choice="required", n=6, seed=1, logit_bias=bias).choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        [call] = calls(choice.message)
        assert call in [ROME, ("weather", {"city": "Oslo"}), ("time", {})]


def test_several_calls_may_be_made_unless_told_otherwise(tool_client: openai.OpenAI) -> None:
    """A bias against the end keeps the model calling, where it may."""
    options = {"tool_choice": "required", "logit_bias": {"2": -100}, "tools": [TIME], "seed": 2, "n": 6}
    assert max(len(calls(choice.message)) for choice in chat(tool_client, **options).choices) > 1
    for choice in chat(tool_client, parallel_tool_calls=False, **options).choices:
        assert (calls(choice.message), choice.finish_reason) == ([("time", {})], "tool_calls")


def test_a_named_function_is_called_once(tool_client: openai.OpenAI) -> None:
    for seed in range(3):
        choice = chat(tool_client, tool_choice=NAMED, seed=seed, logit_bias={"2": -50}).choices[0]
        [(name, arguments)] = calls(choice.message)
        assert (name, choice.finish_reason) == ("weather", "tool_calls")
        assert arguments["city"] in ("Rome", "Oslo")


@SPELLED
def test_auto_reads_calls_and_text(tool_client: openai.OpenAI) -> None:
    choice = chat(tool_client, **forced(f"I look.\n{CALL_ROME}")).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    assert calls(choice.message) == [ROME]
    both = f'<tool_call>[{{"name": "time", "arguments": {{}}}}]</tool_call>\n{CALL_ROME}'
    choice = chat(tool_client, tool_choice="auto", **forced(both)).choices[0]
    assert calls(choice.message) == [("time", {}), ROME]


@SPELLED
@pytest.mark.parametrize(
    "text", ["no call", CALL_ROME.replace("weather", "absent"), CALL_ROME.replace("}}", "}"), "<tool_call>"]
)
def test_what_is_no_call_is_text(tool_client: openai.OpenAI, text: str) -> None:
    choice = chat(tool_client, **forced(text)).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text, "stop")
    assert choice.message.tool_calls is None


@SPELLED
def test_a_call_that_is_cut_off_is_text(tool_client: openai.OpenAI) -> None:
    choice = chat(tool_client, max_tokens=20, **forced(CALL_ROME)).choices[0]
    assert choice.finish_reason == "length"
    assert CALL_ROME.startswith(choice.message.content)
    tokens = chat(tool_client, **forced(CALL_ROME)).usage.completion_tokens
    nearly = chat(tool_client, max_tokens=tokens - 3, **forced(CALL_ROME)).choices[0]
    assert nearly.message.content.startswith(CALL_ROME.removesuffix("</tool_call>"))
    assert (nearly.message.tool_calls, nearly.finish_reason) == (None, "length")
    stopped = chat(tool_client, stop=["Rome"], **forced(CALL_ROME)).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (CALL_ROME.partition("Rome")[0], "stop")
    whole = chat(tool_client, stop=["</tool_call>"], tool_choice=NAMED).choices[0]
    assert whole.finish_reason == "tool_calls"


def test_none_is_as_if_there_were_no_tools(tool_client: openai.OpenAI) -> None:
    none = chat(tool_client, tool_choice="none", seed=3, max_tokens=9)
    bare = chat(tool_client, tools=openai.NOT_GIVEN, seed=3, max_tokens=9, tool_choice="none")
    assert none.choices == bare.choices
    assert none.usage == bare.usage
    told = chat(tool_client, seed=3, max_tokens=9)
    assert told.usage.prompt_tokens > none.usage.prompt_tokens


@SPELLED
def test_none_reads_no_calls(tool_client: openai.OpenAI) -> None:
    unread = chat(tool_client, tool_choice="none", **forced(CALL_ROME)).choices[0]
    assert (unread.message.content, unread.message.tool_calls) == (CALL_ROME, None)


@pytest.mark.parametrize(
    "options",
    [
        {"tool_choice": "required", "logit_bias": END},
        {"tool_choice": NAMED, "logprobs": True, "top_logprobs": 1},
        {"max_tokens": 60},
        {"tools": [STRICT_WEATHER, TIME], "max_tokens": 60},
    ],
)
def test_streamed_is_whole(tool_client: openai.OpenAI, options: dict[str, Any]) -> None:
    assert_streamed_is_whole(tool_client, options)


@SPELLED
def test_text_and_calls_are_streamed_as_they_are_whole(tool_client: openai.OpenAI) -> None:
    assert_streamed_is_whole(tool_client, forced(f"a <tool_call> 🦊 \n {CALL_ROME}\n{CALL_ROME} and\n"))


def assert_streamed_is_whole(tool_client: openai.OpenAI, options: dict[str, Any]) -> None:
    whole = chat(tool_client, n=3, seed=4, **options)
    texts, reasons, logprobs = ["", "", ""], ["", "", ""], [0, 0, 0]
    called: list[list[tuple[str, Any]]] = [[], [], []]
    for chunk in chat(tool_client, n=3, seed=4, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += choice.finish_reason or ""
            logprobs[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
            for call in choice.delta.tool_calls or []:
                assert call.index == len(called[choice.index])
                assert (call.type, call.id[:5]) == ("function", "call_")
                called[choice.index].append((call.function.name, json.loads(call.function.arguments)))
    assert texts == [choice.message.content or "" for choice in whole.choices]
    assert called == [calls(choice.message) for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert logprobs == [len(choice.logprobs.content) if choice.logprobs else 0 for choice in whole.choices]


def test_a_conversation_with_results(tool_client: openai.OpenAI) -> None:
    first = chat(tool_client, tool_choice=NAMED).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": [{"type": "text", "text": "dry"}]}
    messages = [*ASK, first, result, {"role": "user", "content": "and then?"}]
    answer = chat(tool_client, messages=messages, max_tokens=9)
    counted = httpx.post(
        f"{str(tool_client.base_url).removesuffix('/v1/')}/tokenize",
        json={"messages": [m if isinstance(m, dict) else m.model_dump() for m in messages]},
    )
    bare = chat(tool_client, messages=messages, max_tokens=9, tool_choice="none")
    assert counted.json()["count"] == bare.usage.prompt_tokens < answer.usage.prompt_tokens


def test_strict_arguments_are_held_to_also_where_the_model_is_free(tool_client: openai.OpenAI) -> None:
    choice = chat(tool_client, tools=[STRICT_WEATHER], logit_bias={"2": -100}, max_tokens=30).choices[0]
    assert choice.message.content, "free text goes on as long as it likes"
    at_once = chat(tool_client, tools=[STRICT_WEATHER], logit_bias=END).choices[0]
    assert (at_once.message.content, at_once.finish_reason) == ("", "stop")


@pytest.mark.parametrize("live_tools", ["tokens"], indirect=True)
def test_tags_that_are_special_tokens_are_read_and_not_lost(tool_client: openai.OpenAI) -> None:
    tags = {"320": 100}
    called = chat(tool_client, tools=[STRICT_WEATHER], logit_bias=tags, parallel_tool_calls=False).choices[0]
    assert [name for name, _ in calls(called.message)] == ["weather"]
    assert (called.message.content, called.finish_reason) == (None, "tool_calls")
    text = chat(tool_client, logit_bias={**tags, "2": -100}, max_tokens=5).choices[0].message.content
    assert text == "<tool_call>" * 5
    assert chat(tool_client, tool_choice="none", logit_bias=tags, max_tokens=5).choices[0].message.content == ""


def test_an_answer_of_a_schema_beside_tools(tool_client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["no"]}}}
    seen = set()
    options = {"response_format": form, "tools": [STRICT_WEATHER], "logit_bias": END, "parallel_tool_calls": False}
    for choice in chat(tool_client, n=16, seed=5, **options).choices:
        assert (choice.message.content == '"no"') != bool(calls(choice.message))
        seen.add(choice.finish_reason)
    assert seen == {"stop", "tool_calls"}


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"tools": []}, 422, "tools"),
    ({"tools": [TIME] * 129}, 422, "tools"),
    ({"tools": [TIME, TIME]}, 422, "one name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 422, "name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]}, 422, "object"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"x": "\ud800"}}}]}, 422, "parameters"),
    ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, 422, "type"),
    ({"tools": None, "tool_choice": "auto"}, 422, "only for requests with tools"),
    ({"tools": None, "parallel_tool_calls": True}, 422, "only for requests with tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "absent"}}}, 422, "'absent'"),
    ({"tool_choice": "sometimes"}, 422, "tool_choice"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, 422, "wants a call"),
    ({"tool_choice": "required", "structured_outputs": {"regex": "a"}}, 422, "wants a call"),
    ({"parallel_tool_calls": False, "structured_outputs": {"regex": "a"}}, 422, "not with strict"),
    ({"tools": [STRICT_WEATHER], "structured_outputs": {"regex": "a"}}, 422, "not with strict"),
    ({"tool_choice": "required", "min_tokens": 3}, 400, "min_tokens"),
    ({"tool_choice": "required", "tools": [{"type": "function", "function": {
        "name": "a", "parameters": {"properties": {"a": {"type": "strin"}}}}}]}, 400, "Invalid type: strin"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 422, "tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, 422, "tool_call_id"),
    ({"messages": [{"role": "assistant"}]}, 422, "content"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, 422, "tool_calls"),
    ({"messages": [{"role": "user", "tool_calls": [{"id": "1", **NAMED}]}]}, 422, "arguments"),
    ({"messages": [*ASK, {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "[]"}}]}]}, 400,
     "messages.1.tool_calls.0.function.arguments is JSON, but not an object"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "said"), BAD)
def test_bad_requests(live_tools: Live, fields: dict[str, Any], status: int, said: str) -> None:
    body = json.dumps({"model": "tiny", "messages": ASK, "tools": TOOLS, "max_tokens": 9, **fields})
    answer = httpx.post(
        f"{live_tools.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"}, timeout=60
    )
    assert (answer.status_code, said in answer.json()["error"]["message"]) == (status, True), answer.text


def test_a_base_without_tools_says_so(client: openai.OpenAI) -> None:
    for options in ({}, {"tool_choice": "required"}):
        with pytest.raises(openai.BadRequestError, match="chat template has no tools") as refused:
            chat(client, max_tokens=9, **options)
        assert refused.value.code == "invalid_prompt"
    assert chat(client, max_tokens=9, tool_choice="none").choices
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    with pytest.raises(openai.BadRequestError, match="does not know tool_calls"):
        chat(client, messages=[*ASK, {"role": "assistant", "tool_calls": [call]}], tools=openai.NOT_GIVEN)


# What the output is held to


def follows(grammar: Grammar, ids: list[int], end: int) -> bool:
    """Whether the grammar takes these tokens and may end then."""
    state = grammar.copy()
    for token in ids:
        if state.forbidden()[token]:
            return False
        state.take(token)
    return not state.forbidden()[end]


TWO = f"{CALL_ROME}\n{CALL_ROME}"
BAD_CALL = CALL_ROME.replace("Rome", "Paris")
HELD = [
    # (text, whether it is taken where a call: is required, is strict, must be one, has any arguments)
    (CALL_ROME, (True, True, True, True)),
    (TWO, (True, True, False, True)),
    (BAD_CALL, (False, False, True, True)),
    ("hello <tool <b>é\n", (False, True, True, True)),
    (f"hello\n{CALL_ROME}", (False, True, True, True)),
    (f"<think>\n</think> \n{CALL_ROME}", (False, True, True, True)),
    ("", (False, True, True, True)),
    ("<tool_call>\n", (False, False, False, False)),
    ("a <tool_call> b", (False, False, False, False)),
    (f"{CALL_ROME} x", (False, False, False, False)),
    (CALL_ROME.replace("weather", "absent"), (False, False, False, False)),
]


@pytest.mark.parametrize("tags", ["text", "added", "special"])
def test_what_the_output_is_held_to(base_location: dict[str, str], tags: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_location["smollm2"])
    tokenizer.chat_template = QWEN
    if tags != "text":
        for name, special in (("<tool_call>", True), ("</tool_call>", True), ("<think>", False), ("</think>", False)):
            tokenizer.add_tokens([AddedToken(name, special=special and tags == "special", normalized=False)])
    grammars = Grammars(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
    markup = ChatTemplate(tokenizer).markup
    weather, strict = Function("weather", CITY, False), Function("weather", CITY, True)
    time = Function("time", {}, False)
    uses = [
        ToolUse(markup, [weather, time], required=True, parallel=True),
        ToolUse(markup, [strict, time], required=False, parallel=True),
        ToolUse(markup, [weather, time], required=False, parallel=False),
        ToolUse(markup, [Function("weather", {}, True)], required=False, parallel=True),
    ]
    assert ToolUse(markup, [weather, time], required=False, parallel=True).grammar() is None
    for number, use in enumerate(uses):
        held = use.grammar()
        assert held is not None
        grammar = grammars.of_lark(*held)
        for text, taken in HELD:
            ids = tokenizer.encode(text)
            assert follows(grammar, ids, tokenizer.eos_token_id) == taken[number], (number, text)
        spelled = [token for letter in "a <tool_call> b" for token in tokenizer.encode(letter)]
        assert not follows(grammar, spelled, tokenizer.eos_token_id), "the tag's letters, not its token"

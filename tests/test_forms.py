"""What /openapi.json says of a body is what its validators take."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from server.api.body import Body
from server.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Pin,
    PredictRequest,
    StructuredOutputs,
    TokenizeRequest,
)

HELLO = {"role": "user", "content": "hello"}
CHAT = {"model": "chat-a", "messages": [HELLO]}
COMPLETE = {"model": "chat-a", "prompt": "fox"}
TOOL = {"type": "function", "function": {"name": "a"}}
CALLING = {
    "role": "assistant",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "a", "arguments": "{}"}}],
}
JSON = {"type": "json_schema", "json_schema": {"name": "any", "schema": {}}}
ITEM = {"task": "sort", "input": "fox"}
BODIES: list[tuple[type[Body], dict[str, Any], bool]] = [
    (ChatRequest, CHAT, True),
    (ChatRequest, {**CHAT, "model": None}, False),
    (ChatRequest, {**CHAT, "stream": None, "temperature": None}, True),
    (ChatRequest, {**CHAT, "tools": None}, True),
    (ChatRequest, {**CHAT, "tools": []}, False),
    (ChatRequest, {**CHAT, "stream": "true"}, False),
    (ChatRequest, {**CHAT, "stream": 1}, False),
    (ChatRequest, {**CHAT, "n": "2"}, False),
    (ChatRequest, {**CHAT, "n": True}, False),
    (ChatRequest, {**CHAT, "n": 2.0}, True),
    (ChatRequest, {**CHAT, "n": 2.5}, False),
    (ChatRequest, {**CHAT, "temperature": 1}, True),
    (ChatRequest, {**CHAT, "temperature": "1"}, False),
    (ChatRequest, {**CHAT, "temperature": False}, False),
    (ChatRequest, {**CHAT, "seed": 2**70}, True),
    (ChatRequest, {**CHAT, "logit_bias": {"7": -1}}, True),
    (ChatRequest, {**CHAT, "logit_bias": {"fox": -1}}, False),
    (ChatRequest, {**CHAT, "logit_bias": {"7": "-1"}}, False),
    (ChatRequest, {**CHAT, "stream": True, "stream_options": {"include_usage": True}}, True),
    (ChatRequest, {**CHAT, "stream_options": {"include_usage": True}}, False),
    (ChatRequest, {**CHAT, "stream": False, "stream_options": {}}, False),
    (ChatRequest, {**CHAT, "stream_options": None}, True),
    (ChatRequest, {**CHAT, "logprobs": True, "top_logprobs": 2}, True),
    (ChatRequest, {**CHAT, "top_logprobs": 2}, False),
    (ChatRequest, {**CHAT, "response_format": JSON}, True),
    (ChatRequest, {**CHAT, "response_format": {"type": "json_schema"}}, False),
    (ChatRequest, {**CHAT, "response_format": {**JSON, "type": "text"}}, False),
    (ChatRequest, {**CHAT, "structured_outputs": {"regex": "a"}, "response_format": None}, True),
    (ChatRequest, {**CHAT, "structured_outputs": {"regex": "a"}, "response_format": JSON}, False),
    (ChatRequest, {**CHAT, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}, True),
    (ChatRequest, {**CHAT, "tool_choice": "auto"}, False),
    (ChatRequest, {**CHAT, "tool_choice": "none"}, True),
    (ChatRequest, {**CHAT, "parallel_tool_calls": True}, False),
    (ChatRequest, {**CHAT, "tools": [{**TOOL, "function": {"name": "a", "parameters": {"type": "array"}}}]}, False),
    (ChatRequest, {**CHAT, "messages": [HELLO, CALLING, {"role": "tool", "tool_call_id": "1", "content": "2"}]}, True),
    (ChatRequest, {**CHAT, "messages": [{"role": "assistant"}]}, False),
    (ChatRequest, {**CHAT, "messages": [{**CALLING, "role": "user"}]}, False),
    (ChatRequest, {**CHAT, "messages": [{"role": "tool", "content": "2"}]}, False),
    (ChatRequest, {**CHAT, "messages": [{**HELLO, "tool_call_id": "1"}]}, False),
    (CompletionRequest, {**COMPLETE, "max_tokens": 0}, False),
    (CompletionRequest, {**COMPLETE, "max_tokens": 0, "echo": True}, True),
    (CompletionRequest, {**COMPLETE, "max_tokens": None, "echo": False}, True),
    (StructuredOutputs, {"regex": "a"}, True),
    (StructuredOutputs, {"json": {}, "choice": None}, True),
    (StructuredOutputs, {"json": {}, "choice": ["a"]}, False),
    (StructuredOutputs, {}, False),
    (TokenizeRequest, {"prompt": "fox"}, True),
    (TokenizeRequest, {"messages": [HELLO], "add_generation_prompt": False}, True),
    (TokenizeRequest, {"prompt": "fox", "messages": [HELLO]}, False),
    (TokenizeRequest, {"prompt": "fox", "add_generation_prompt": False}, False),
    (TokenizeRequest, {"messages": [HELLO], "add_special_tokens": False}, False),
    (TokenizeRequest, {"prompt": None}, False),
    (DetokenizeRequest, {"tokens": [1, 2.0]}, True),
    (DetokenizeRequest, {"tokens": [1, 2.5]}, False),
    (DetokenizeRequest, {"tokens": [1, "2"]}, False),
    (DetokenizeRequest, {"tokens": [1, True]}, False),
    (PredictRequest, {"task": "sort", "inputs": ["fox"]}, True),
    (PredictRequest, {"task": "sort"}, False),
    (PredictRequest, {"task": None, "inputs": "fox"}, False),
    (PredictRequest, {"items": [ITEM], "task": None}, True),
    (PredictRequest, {"items": [ITEM], "task": "sort"}, False),
    (PredictRequest, {"items": [ITEM], "parameters": {}}, False),
    (Pin, {"pinned": True, "": None}, True),
    (Pin, {"pinned": "yes"}, False),
]


@pytest.mark.parametrize(("model", "body", "taken"), BODIES, ids=str)
def test_the_description_takes_what_the_server_takes(model: type[Body], body: dict[str, Any], taken: bool) -> None:
    described = jsonschema.Draft202012Validator(model.model_json_schema())
    assert described.is_valid(body) == taken
    if taken:
        model.model_validate(body)
    else:
        with pytest.raises(ValidationError):
            model.model_validate(body)

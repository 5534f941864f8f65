"""Calls of functions in OpenAI's forms: what a request asks for, what a message and a chunk say."""

from __future__ import annotations

import uuid
from typing import Any

from server.api.generation import Choice
from server.api.schemas import ChatRequest
from server.engine.calls import Call
from server.engine.tasks import CausalLM, Prompt
from server.generation import Delta
from server.tools import ToolUse


def prepare_chat(task: CausalLM, body: ChatRequest) -> tuple[Prompt, ToolUse | None]:
    """The prompt, and the tools that the model is offered, if any. Any thread. Raises InvalidPrompt."""
    messages = [message.plain() for message in body.messages]
    prompt = task.prepare_chat(messages, tools=[tool.plain() for tool in body.offered])
    if not body.offered:
        return prompt, None
    return prompt, ToolUse(task.markup, body.callable, body.must_call, body.several_calls)


def chat_message(choice: Choice) -> dict[str, Any]:
    """The assistant's, whole."""
    if not choice.calls:
        return {"role": "assistant", "content": choice.text, "refusal": None}
    calls = [_call(call) for call in choice.calls]
    return {"role": "assistant", "content": choice.text or None, "refusal": None, "tool_calls": calls}


def chat_delta(delta: Delta) -> dict[str, Any]:
    """What a chunk adds to it."""
    text = {"content": delta.text} if delta.text else {}
    calls = [{"index": call.index, **_call(call)} for call in delta.calls]
    return {**text, "tool_calls": calls} if calls else text


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}

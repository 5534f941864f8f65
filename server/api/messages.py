"""Messages of a conversation and the tools that it may use, as OpenAI's chat route takes them. pydantic only."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from server.api.body import Body, Text
from server.api.forms import MESSAGE, described
from server.tools import Function

MAX_TOOLS = 128
OF_AN_OBJECT: dict[str, Any] = {"properties": {"type": {"const": "object"}}}
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}

FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
CallId = Annotated[Text, StringConstraints(min_length=1, max_length=256)]


class TextPart(Body):
    type: Literal["text"]
    text: Text


class CalledFunction(Body):
    name: FunctionName
    arguments: Text = Field(description="a JSON object, as text")


class ToolCall(Body):
    id: CallId
    type: Literal["function"]
    function: CalledFunction


class Message(Body):
    model_config = ConfigDict(json_schema_extra=described(*MESSAGE))

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = None
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: CallId | None = None

    @model_validator(mode="after")
    def _what_the_role_has(self) -> Message:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("tool_calls are the assistant's")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id goes with the role tool")
        if self.content is None and self.tool_calls is None:
            raise ValueError("content is missing")
        return self

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it, but for the arguments of calls, which are still text."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        rest = self.model_dump(include={"name", "tool_calls", "tool_call_id"}, exclude_none=True)
        return {"role": self.role, "content": content, **rest}


class OfferedFunction(Body):
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] = Field(
        NO_PARAMETERS, description="JSON schema of an object", json_schema_extra=OF_AN_OBJECT
    )
    strict: bool = False

    @model_validator(mode="after")
    def _object(self) -> OfferedFunction:
        if self.parameters.get("type", "object") != "object":
            raise ValueError("parameters: the schema is not of an object")
        try:
            json.dumps(self.parameters, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise ValueError(f"parameters: cannot be shown to the model: {error}") from None
        return self


class Tool(Body):
    type: Literal["function"]
    function: OfferedFunction

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it."""
        function = self.function
        described = {} if function.description is None else {"description": function.description}
        return {
            "type": self.type,
            "function": {"name": function.name, **described, "parameters": function.parameters},
        }

    def offered(self) -> Function:
        return Function(self.function.name, self.function.parameters, self.function.strict)


class ChosenName(Body):
    name: FunctionName


class ChosenFunction(Body):
    type: Literal["function"]
    function: ChosenName


class Tools(Body):
    """The fields of a request that are about tools."""

    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")

    @model_validator(mode="after")
    def _tools_to_choose_from(self) -> Tools:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have one name")
        if self.tools is None and self.parallel_tool_calls is not None:
            raise ValueError("parallel_tool_calls is only for requests with tools")
        if self.tools is None and self.tool_choice not in (None, "none"):
            raise ValueError("tool_choice is only for requests with tools")
        if isinstance(self.tool_choice, ChosenFunction) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: no tool has the name {self.tool_choice.function.name!r}")
        return self

    @property
    def offered(self) -> list[Tool]:
        """Those that the model gets to know of."""
        return [] if self.tools is None or self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, ChosenFunction)

    @property
    def several_calls(self) -> bool:
        return self.parallel_tool_calls is not False and not isinstance(self.tool_choice, ChosenFunction)

    @property
    def callable(self) -> list[Function]:
        """Those that may be called."""
        functions = [tool.offered() for tool in self.offered]
        if isinstance(self.tool_choice, ChosenFunction):
            return [f for f in functions if f.name == self.tool_choice.function.name]
        return functions

"""Rules between a body's fields, as JSON Schema, so that /openapi.json says what the validators of schemas.py check.

A field that is null counts as not given, there and here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rule = dict[str, Any]
NULL: Rule = {"type": "null"}


def described(*rules: Rule) -> Callable[[Rule], None]:
    """For `json_schema_extra` of a model: `rules` hold too, and every field that need not be given may be null, also
    one that nobody knows.
    """

    def describe(schema: Rule) -> None:
        for name, field in schema["properties"].items():
            if name not in schema.get("required", ()) and NULL not in field.get("anyOf", ()):
                said = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
                schema["properties"][name] = {"anyOf": [field, NULL], **said}
        schema["additionalProperties"] = NULL
        if rules:
            schema["allOf"] = list(rules)

    return describe


def given(*names: str, without: tuple[str, ...] = (), **values: Any) -> Rule:
    """These fields are given, those of `values` with one of the values, and none of `without` is."""
    properties: Rule = {name: {"not": NULL} for name in names}
    properties |= {name: {"enum": allowed} for name, allowed in values.items()}
    properties |= {name: NULL for name in without}
    return {"properties": properties, "required": [*names, *values]}


def any_of(*rules: Rule) -> Rule:
    """One of them holds, at least."""
    return {"anyOf": list(rules)}


TOKEN_ID_KEYS = {"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}}
RESPONSE_FORMAT = (
    any_of(given("json_schema", type=["json_schema"]), given(type=["text", "json_object"], without=("json_schema",))),
)
STRUCTURED_OUTPUTS = (
    any_of(
        given("json", without=("regex", "choice")),
        given("regex", without=("json", "choice")),
        given("choice", without=("json", "regex")),
    ),
)
GENERATING = (
    any_of(given(without=("response_format",)), given(without=("structured_outputs",))),
    any_of(given(without=("stream_options",)), given(stream=[True])),
)
CHAT = (
    *GENERATING,
    any_of(given(without=("top_logprobs",)), given(logprobs=[True])),
    any_of(
        given("tools"),
        {"properties": {"parallel_tool_calls": {"type": "null"}, "tool_choice": {"enum": ["none", None]}}},
    ),
)
COMPLETION = (
    *GENERATING,
    any_of({"properties": {"max_tokens": {"not": {"enum": [0]}}}}, given(echo=[True])),
)
MESSAGE = (
    any_of(given("content"), given("tool_calls")),
    any_of(given(without=("tool_calls",)), given(role=["assistant"])),
    any_of(
        given("tool_call_id", role=["tool"]),
        {"properties": {"role": {"not": {"enum": ["tool"]}}, "tool_call_id": {"type": "null"}}},
    ),
)
TOKENIZE = (
    any_of(
        given("prompt", without=("messages", "add_generation_prompt")),
        given("messages", without=("prompt", "add_special_tokens")),
    ),
)
PREDICT = (
    any_of(given("task", "inputs", without=("items",)), given("items", without=("task", "inputs", "parameters"))),
)

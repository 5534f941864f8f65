"""Structured output over HTTP: JSON of a schema, a pattern, a choice; and its rows beside free ones."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from transformers import AutoTokenizer

from server.engine.grammar import Grammars, InvalidGrammar

SCHEMAS = 100
LONGEST = 240
"""Tokens: the tiny base's context holds 256."""


def complete(client: openai.OpenAI, model: str = "chat-a", **options: Any) -> openai.types.CompletionChoice:
    body = {"model": model, "prompt": [5, 6], "max_tokens": LONGEST, "temperature": 1, **options}
    return client.completions.create(**body).choices[0]


def structured(**options: Any) -> dict[str, Any]:
    return {"extra_body": {"structured_outputs": options}}


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """What is written in at most some 100 tokens."""
    leaves: list[dict[str, Any]] = [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -rng.randrange(100), "maximum": rng.randrange(1000)},
        {"type": "string", "maxLength": rng.randrange(8)},
        {"type": "string", "pattern": "^[a-c]{2,4}$"},
        {"enum": rng.sample(["x", "yes", 3, None, True, "é", [1]], 3)},
        {"const": {"k": rng.randrange(10)}},
        {"anyOf": [{"type": "boolean"}, {"type": "string", "enum": ["p", "q"]}]},
    ]
    if depth == 2 or (depth == 1 and rng.random() < 0.6):
        return rng.choice(leaves)
    if rng.random() < 0.3:
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": 1, "maxItems": 2}
    names = rng.sample(["name", "size", "a b", "ü"], rng.randrange(1, 3))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": names[: rng.randrange(len(names) + 1)],
        "additionalProperties": False,
    }


def test_random_schemas_are_held_to(client: openai.OpenAI) -> None:
    rng = random.Random(3)
    schemas = [random_schema(rng) for _ in range(SCHEMAS)]
    # The tiny base has seen no text: it would write as much space as it may.
    bias = {str(token): -100 for token in space_tokens(client)}
    with ThreadPoolExecutor(16) as clients:
        free = clients.submit(complete, client, seed=1)
        answers = list(
            clients.map(lambda pair: complete(client, seed=pair[0], logit_bias=bias, **structured(json=pair[1])),
                        enumerate(schemas))
        )  # fmt: skip
    for schema, answer in zip(schemas, answers, strict=True):
        assert answer.finish_reason == "stop", (schema, answer.text)
        jsonschema.validate(json.loads(answer.text), schema)
    assert free.result().text == complete(client, seed=1).text


def space_tokens(client: openai.OpenAI) -> list[int]:
    url = str(client.base_url).removesuffix("/v1/")
    texts = [httpx.post(f"{url}/detokenize", json={"tokens": [i]}).json()["prompt"] for i in range(320)]
    return [i for i, text in enumerate(texts) if text and text.isspace()]


def test_a_chat_answers_with_the_json_that_was_asked_for(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
              "required": ["n"], "additionalProperties": False}  # fmt: skip
    chat = {"model": "chat-b", "messages": [{"role": "user", "content": "how many?"}], "max_tokens": 100, "n": 3}
    whole = client.chat.completions.create(
        **chat, seed=2, response_format={"type": "json_schema", "json_schema": {"name": "count", "schema": schema}}
    )  # type: ignore[call-overload]
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), schema)
    stream = client.chat.completions.create(
        **chat, seed=2, stream=True,
        response_format={"type": "json_schema", "json_schema": {"name": "count", "schema": schema, "strict": True}},
    )  # type: ignore[call-overload]  # fmt: skip
    texts = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_json_object_begins_an_object(client: openai.OpenAI) -> None:
    answer = complete(client, extra_body={"response_format": {"type": "json_object"}}, max_tokens=20)
    assert answer.text.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.text), dict)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_pattern_and_a_choice(client: openai.OpenAI, temperature: float) -> None:
    for seed in range(5):
        code = complete(client, seed=seed, temperature=temperature, **structured(regex="[A-F]{2}-[0-9]{1,3}(é|🦊)"))
        assert code.finish_reason == "stop"
        assert re.fullmatch("[A-F]{2}-[0-9]{1,3}(é|🦊)", code.text)
        texts = ['say "yes"', "back\\slash", "né 🦊\nn"]
        chosen = complete(client, "tiny", seed=seed, temperature=temperature, **structured(choice=texts))
        assert (chosen.text in texts, chosen.finish_reason) == (True, "stop")


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ({"structured_outputs": {"json": {"not": {"type": "string"}}}}, 400, "Unimplemented keys"),
        ({"structured_outputs": {"json": {"type": "strin"}}}, 400, "Invalid type: strin"),
        ({"structured_outputs": {"json": {"type": "integer", "minimum": 3, "maximum": 2}}}, 400, "minimum"),
        ({"structured_outputs": {"regex": "(["}}, 400, "unclosed"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, 422, "one of json, regex and choice"),
        ({"structured_outputs": {}}, 422, "one of json, regex and choice"),
        ({"structured_outputs": {"choice": []}}, 422, "choice"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, 422, "either"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, 400, "ignore_eos"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, 400, "min_tokens"),
        ({"response_format": {"type": "json_schema"}}, 422, "json_schema goes with"),
        ({"response_format": {"type": "xml"}}, 422, "response_format"),
    ],
)
def test_what_cannot_be_held_to_is_refused(
    client: openai.OpenAI, options: dict[str, Any], status: int, said: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=said) as refused:
        complete(client, extra_body=options)
    assert refused.value.status_code == status


@pytest.mark.parametrize("pattern", ["(a{1000}){1000}", ".*" * 500])
def test_a_pattern_that_costs_too_much_is_refused(client: openai.OpenAI, pattern: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, **structured(regex=pattern))
    assert refused.value.code == "invalid_grammar"
    assert complete(client, **structured(regex="ab")).text == "ab"


def test_a_large_schema_is_held_to(client: openai.OpenAI) -> None:
    names = [f"property-{number}" for number in range(200)]
    properties = {name: {"enum": names[:20]} for name in names}
    schema = {"type": "object", "properties": properties, "required": names[:1], "additionalProperties": False}
    answer = complete(client, temperature=0, max_tokens=200, **structured(json=schema))
    assert answer.text.startswith("{")
    if answer.finish_reason == "stop":
        jsonschema.validate(json.loads(answer.text), schema)


def test_a_base_without_an_end_token_cannot_be_held_to_anything(base_location: dict[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_location["tiny-llama"])
    with pytest.raises(InvalidGrammar, match="no end token"):
        Grammars(tokenizer, 320, frozenset()).of_pattern("a")


def test_a_schema_of_any_depth_leaves_the_server_alive(client: openai.OpenAI) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(150):
        schema = {"type": "array", "items": schema}
    with pytest.raises(openai.BadRequestError):
        complete(client, **structured(json=schema))
    assert complete(client, **structured(regex="ab")).text == "ab"

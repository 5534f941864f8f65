"""schemathesis loads this in its own process: what its requests need to get far, and what is (no) finding.

The server is the one that tests/fuzz.py starts; schemathesis.toml has the settings.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
from schemathesis import Case, CheckContext, HookContext, Response, check, hook
from schemathesis.core.failures import Failure
from schemathesis.openapi.checks import RejectedPositiveData
from schemathesis.transport.serialization import Binary

from adapters.directory import CHECKPOINT_FILES

ROOT = Path(os.environ["FUZZ_ADAPTER_ROOT"])
VOCABULARY = 320
TOKENS = ("prompt", "input", "tokens")
"""Fields that hold token ids."""
SOURCES = ("chat-a", "chat-b", "sort", "tag", "embed")
"""Checkpoints below ROOT. Adapters have these names too."""
KEPT = (*SOURCES, "versioned")
"""Names that no request may replace or remove, since others need them."""
PASSING = "passing"
"""A name that comes and goes: it is there before a request to remove it, and not before one to load it."""
LOAD = ("POST", "/v1/load_lora_adapter")
CREATES = {("PUT", "/v1/adapters/{name}"), LOAD}
REMOVES = {("DELETE", "/v1/adapters/{name}"), ("POST", "/v1/unload_lora_adapter")}
REFUSED = ("invalid_adapter", "invalid_upload", "forbidden_path", "invalid_composition")
"""Codes of a well-formed request for a checkpoint that is not one, or not there, or not to be one with others."""
UNSAID = (
    "max_tokens and max_completion_tokens differ",
    "two functions have one name",
    "no tool has the name",
    "tool_choice wants a call",
    "structured_outputs hold the calls too",
    "adapters are composed on the base",
)
"""In the messages of rules that JSON Schema has no words for."""
EXAMPLES: dict[str, dict[str, Any]] = {
    "ChatRequest": {"model": "chat-a"},
    "CompletionRequest": {"model": "chat-b", "prompt": "the fox"},
    "EmbeddingRequest": {"model": "embed", "input": "the fox"},
    "ClassifyRequest": {"model": "sort", "input": "the fox"},
    "PredictItem": {"task": "chat-a", "input": "the fox"},
    "PredictRequest": {"task": "chat-a", "inputs": "the fox"},
    "Parameters": {"max_tokens": 4},
    "LoadLoraAdapter": {"lora_name": PASSING, "lora_path": "sort"},
    "UnloadLoraAdapter": {"lora_name": PASSING},
}


@hook
def before_load_schema(context: HookContext, raw_schema: Any) -> None:
    """Bodies of the coverage phase are made around examples."""
    for name, values in EXAMPLES.items():
        for field, value in values.items():
            raw_schema["components"]["schemas"][name]["properties"][field]["examples"] = [value]


@hook
def filter_case(context: HookContext, case: Case[Any]) -> bool:
    return (case.method, case.path) not in CREATES | REMOVES or _name(case) not in KEPT


@hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
    route = (case.method, case.path)
    if route not in {*REMOVES, LOAD} or _name(case) != PASSING:
        return
    url = f"{str(case.operation.base_url).rstrip('/')}/v1/adapters/{PASSING}"
    httpx.put(url, json={"source": "sort"}, timeout=60).raise_for_status()
    if route == LOAD:
        httpx.delete(url, timeout=60).raise_for_status()


@hook
def map_body(context: HookContext, body: Any) -> Any:
    """What is made up names nothing that exists."""
    assert context.operation is not None
    match context.operation.path, body:
        case "/v1/predict", {"task": str(task)} if _is_name(task):  # a dictionary would add it to items as well
            return {**body, "task": _one_of(("tiny", *SOURCES), task)}
        case "/v1/completions" | "/v1/embeddings" | "/detokenize", dict():
            return {name: _known(value) if name in TOKENS else value for name, value in body.items()}
        case "/v1/adapters/{name}", {"source": str(source), **others} if not others and _is_name(source):
            return {"source": _one_of((*SOURCES, source), source)}
        case "/v1/adapters/{name}", dict():
            return _with_checkpoint(body)
    return body


@hook
def filter_failure(context: HookContext, failure: Failure, case: Case[Any], response: Response) -> bool:
    if not isinstance(failure, RejectedPositiveData):
        return True
    error = json.loads(response.content)["error"]
    return error["code"] not in REFUSED and not any(rule in error["message"] for rule in UNSAID)


@check
def nothing_fails_inside(context: CheckContext, response: Response, case: Case[Any]) -> None:
    """A stream, and an item of several, tell of a fault of the server under the status 200."""
    assert b'"server_error"' not in response.content, "an error of the server"


def _name(case: Case[Any]) -> Any:
    return case.path_parameters.get("name") or (isinstance(case.body, dict) and case.body.get("lora_name"))


def _known(ids: Any) -> Any:
    """Token ids that the vocabulary has."""
    are_ids = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
    return [i % VOCABULARY for i in ids] if are_ids else ids


def _with_checkpoint(form: dict[str, Any]) -> dict[str, Any]:
    """Most valid forms hold one."""
    files = [file.data for file in form.values() if isinstance(file, Binary)]
    if len(files) < len(form) or not set(CHECKPOINT_FILES[:2]) <= form.keys():
        return form
    given = f"{sorted(form)} {files}"
    if sum(map(ord, given)) % 6 == 0:
        return form
    checkpoint = ROOT / _one_of(SOURCES, given)
    return {file.name: Binary(file.read_bytes()) for file in checkpoint.iterdir() if file.name in CHECKPOINT_FILES}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 256


def _one_of(values: tuple[str, ...], given: str) -> str:
    return values[sum(map(ord, given)) % len(values)]

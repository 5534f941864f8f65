"""Domain error -> status and body, in one place. Bodies are OpenAI's: {"error": {message, type, param, code}}."""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from adapters.errors import (
    AdapterExists,
    AdapterNotFound,
    InvalidAdapter,
    InvalidName,
    RegistryFull,
    TooManyPins,
    VersionNotFound,
)
from server.api.common import ClientGone, TooManyInputs
from server.api.uploads import InvalidUpload, TooLarge
from server.caller import Forbidden
from server.composition import InvalidComposition
from server.context import current
from server.engine.async_engine import EngineNotReady, QueueFull, RequestTimeout, SlowReader
from server.engine.grammar import InvalidGrammar
from server.engine.tasks import InvalidPrompt
from server.generation import AdapterLost, EngineFailed
from server.keys import InvalidKey, RateExceeded
from server.lifecycle import ForbiddenPath
from server.metrics import METHODS
from server.service import InvalidParameters, PromptTooLong, WrongTask

logger = logging.getLogger(__name__)

RETRY_AFTER_S = "1"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Answer:
    """How one kind of error is told."""

    status: int
    type: str
    code: str
    retry: bool = False
    close: bool = False
    """The connection, because a rest of the body is not read."""


ANSWERS: dict[type[Exception], Answer] = {
    AdapterNotFound: Answer(404, "invalid_request_error", "model_not_found"),
    VersionNotFound: Answer(404, "invalid_request_error", "version_not_found"),
    WrongTask: Answer(400, "invalid_request_error", "wrong_task"),
    PromptTooLong: Answer(400, "invalid_request_error", "context_length_exceeded"),
    InvalidPrompt: Answer(400, "invalid_request_error", "invalid_prompt"),
    InvalidGrammar: Answer(400, "invalid_request_error", "invalid_grammar"),
    InvalidParameters: Answer(400, "invalid_request_error", "invalid_parameters"),
    InvalidComposition: Answer(400, "invalid_request_error", "invalid_composition"),
    AdapterExists: Answer(409, "invalid_request_error", "adapter_exists"),
    TooManyPins: Answer(409, "invalid_request_error", "too_many_pins"),
    InvalidAdapter: Answer(422, "invalid_request_error", "invalid_adapter"),
    InvalidName: Answer(422, "invalid_request_error", "invalid_name"),
    ForbiddenPath: Answer(422, "invalid_request_error", "forbidden_path"),
    RegistryFull: Answer(503, "overloaded_error", "no_memory_for_adapter", retry=True),
    InvalidUpload: Answer(422, "invalid_request_error", "invalid_upload"),
    TooLarge: Answer(413, "invalid_request_error", "too_large", close=True),
    TooManyInputs: Answer(422, "invalid_request_error", "too_many_inputs"),
    ClientGone: Answer(499, "client_closed_request", "client_closed_request"),
    ClientDisconnect: Answer(499, "client_closed_request", "client_closed_request"),
    InvalidKey: Answer(401, "invalid_request_error", "invalid_api_key"),
    Forbidden: Answer(403, "invalid_request_error", "forbidden"),
    RateExceeded: Answer(429, "rate_limit_error", "rate_limit_exceeded", retry=True),
    QueueFull: Answer(429, "overloaded_error", "queue_full", retry=True),
    EngineNotReady: Answer(503, "overloaded_error", "not_ready", retry=True),
    RequestTimeout: Answer(503, "overloaded_error", "request_timeout", retry=True),
    SlowReader: Answer(499, "client_closed_request", "slow_reader"),
    AdapterLost: Answer(503, "overloaded_error", "adapter_lost", retry=True),
    EngineFailed: Answer(500, "server_error", "engine_failed"),
}
REASONS = {404: "not_found", 405: "method_not_allowed", 408: "body_timeout", 413: "too_large", 422: "invalid_request"}


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[Answer, str]:
    """Status and message for `error`; one that is not ours to tell becomes a plain 500."""
    for kind in type(error).__mro__:
        if kind in ANSWERS:
            return ANSWERS[kind], _message(error)
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        logger.error("the disk is full: %s", error)
        return Answer(503, "overloaded_error", "no_space", retry=True), "there is no room on the server's disk"
    logger.error("unexpected error in request %s", current().id, exc_info=error)
    return Answer(500, "server_error", "internal_error"), "internal error; the log has it under this request's id"


def _message(error: Exception) -> str:
    if isinstance(error, AdapterNotFound):
        return f"the model {error.name[:256]!r} does not exist"
    return str(error)


def error_response(error: Exception) -> Response:
    answer, message = describe(error)
    headers = {}
    if answer.retry:
        headers["Retry-After"] = str(getattr(error, "retry_after_s", RETRY_AFTER_S))
    if answer.close:
        headers["connection"] = "close"
    if answer.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(message, answer.type, answer.code), answer.status, headers)


def add_handlers(app: FastAPI) -> None:
    """Every error of `app` leaves in the one form."""

    async def domain(_request: Request, error: Exception) -> Response:
        return error_response(error)

    async def invalid(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        faults = error.errors()
        first = faults[0]
        if first["type"] == "json_invalid":
            return _not_json(first["ctx"]["error"])
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        message = "; ".join(_fault(e) for e in faults[:8])
        return JSONResponse(error_body(message, "invalid_request_error", "invalid_request", place or None), 422)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:  # FastAPI's own: a body that is not text, or nested too deep
            return _not_json("it cannot be parsed")
        code = REASONS.get(error.status_code, "error")
        body = error_body(str(error.detail), "invalid_request_error", code)
        headers = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers
        return JSONResponse(body, error.status_code, headers)

    for kind in (*ANSWERS, OSError):
        app.add_exception_handler(kind, domain)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _allowed(request: Request) -> str:
    """Every method that the path of `request` has: more than one route may be there."""

    def answered(method: str) -> bool:
        return any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)

    return ", ".join(filter(answered, METHODS))


def _not_json(fault: str) -> Response:
    return JSONResponse(error_body(f"the body is not JSON: {fault}", "invalid_request_error", "invalid_json"), 422)


def _fault(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"] if part != "body")
    return f"{place}: {error['msg']}" if place else str(error["msg"])

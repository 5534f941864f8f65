"""How the process logs: a line of text an event, or an object of JSON; and the line that each request leaves."""

from __future__ import annotations

import json
import logging
import os
import time
from datetime import UTC, datetime
from typing import Any

from server.caller import ANYONE
from server.context import RequestContext, current

TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
QUIET_PATHS = ("/health", "/ready", "/metrics")
"""Asked so often that their lines are for `debug` only."""

logger = logging.getLogger("server.requests")


class JsonFormatter(logging.Formatter):
    """{time, level, logger, message, request_id, …}: what a record carries in `fields` among it."""

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        context = current()
        known = {"request_id": context.id, "trace_id": context.trace_id}
        content |= {name: value for name, value in known.items() if value}
        content |= getattr(record, "fields", {})
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)


def set_up_logging(level: str, form: str = "text") -> None:
    """Events on stderr; the libraries' progress bars and notices stay out of it. form: text or json."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for noisy in ("httpx", "transformers", "watchfiles"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415  -- `--help` shall not wait for it

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def log_request(context: RequestContext, method: str, path: str, status: int) -> None:
    """One request's line. path: percent-encoded, so that nobody writes lines of his own; status 0: nobody was told."""
    level = logging.DEBUG if path in QUIET_PATHS else logging.INFO
    if not logger.isEnabledFor(level):
        return
    duration_s = time.monotonic() - context.started
    fields = {
        **({} if context.caller is ANYONE else {"key": context.caller.name}),
        "method": method,
        "path": path,
        "status": status,
        "duration_s": round(duration_s, 6),
        "queue_s": _rounded(context.queue_s),
        "first_token_s": _rounded(context.first_token_s),
        "sequences": context.sequences,
        "prompt_tokens": context.prompt_tokens,
        "completion_tokens": context.completion_tokens,
        "adapters": context.models,
        **({"prompts": context.prompts} if context.prompts else {}),
    }
    logger.log(
        level, "%s %s %d in %.0f ms%s%s [%s]",
        method, path, status, duration_s * 1e3, _inference(context), _asked_by(context), context.id,
        extra={"fields": fields},
    )  # fmt: skip


def _inference(context: RequestContext) -> str:
    """Its part of the line of text."""
    if not context.sequences:
        return ""
    names = ", ".join(f"{name}@{digest[:8]}" if digest else name for name, digest in context.models.items())
    text = f", {context.prompt_tokens} + {context.completion_tokens} tokens by {names}"
    return text + (f", prompts {context.prompts}" if context.prompts else "")


def _asked_by(context: RequestContext) -> str:
    return "" if context.caller is ANYONE else f" for {context.caller.name}"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)

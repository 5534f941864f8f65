"""What every request passes: its account, and a bound on its body. Plain ASGI; of routes it knows where uploads go."""

from __future__ import annotations

import asyncio
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response
from server.api.uploads import TooLarge
from server.context import RequestContext, enter
from server.logs import log_request
from server.metrics import OTHER, Metrics

UPLOAD_PATH = r"/v1/adapters/[^/]+"


class Account:
    """Opens the request's context, and closes its account: the id on the answer, a line in the log, a count.

    Every response carries `x-request-id`: the caller's, when it is a plain one, else a new one. An error that nobody
    expected is answered here too, so that it carries the id as well.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, log: bool) -> None:
        """log: a line for each request."""
        self.app = app
        self.metrics = metrics
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        context = RequestContext(given if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", given) else uuid.uuid4().hex)
        enter(context)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = context.id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            response = error_response(error)
            if not status:
                await response(scope, receive, send_with_id)
        finally:
            self.metrics.count_http(scope["method"], getattr(scope.get("route"), "path", OTHER), status)
            if self.log:
                log_request(context, scope["method"], scope["raw_path"].decode("ascii", "replace"), status)


class BodyLimit:
    """A body over its limit is answered with 413, before or while it is read; one that stops coming, with 408.

    The limit is `max_upload_bytes` for a checkpoint's files, sent as a form to PUT /v1/adapters/{name}, and `max_bytes`
    for everything else.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_upload_bytes: int, timeout_s: float) -> None:
        """timeout_s: between two pieces."""
        self.app = app
        self.max_bytes = max_bytes
        self.max_upload_bytes = max_upload_bytes
        self.timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.max_upload_bytes if _is_upload(scope) else self.max_bytes
        fault = f"the body is larger than {limit} bytes"
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            await error_response(TooLarge(fault))(scope, receive, send)
            return
        taken, more = 0, True

        async def receive_bounded() -> Message:
            nonlocal taken, more
            try:
                async with asyncio.timeout(self.timeout_s if more else None):
                    message = await receive()
            except TimeoutError:
                late = f"nothing of the body came for {self.timeout_s:g} s"
                raise HTTPException(408, late, {"connection": "close"}) from None
            more = message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > limit:
                raise HTTPException(413, fault, {"connection": "close"})
            return message

        await self.app(scope, receive_bounded, send)


def _is_upload(scope: Scope) -> bool:
    if scope["method"] != "PUT" or re.fullmatch(UPLOAD_PATH, scope["path"]) is None:
        return False
    return Headers(scope=scope).get("content-type", "").lower().startswith("multipart/")

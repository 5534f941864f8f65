"""The door: where the queue is full, a request for sequences is refused before its body is read."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import error_response
from server.context import current
from server.engine.async_engine import QueueFull
from server.service import Service

DROPPED_BYTES = 64 << 10
"""Of a body that is refused unread: a longer one, or one of unknown length, costs its client the connection."""


class Door:
    """Refuses at once what cannot wait, so that an overloaded server spends its time on what it has accepted.

    A request for sequences asks for one at least, so that where no more may wait, for all or for who asks, what stands
    in its body makes no difference: it is 429, with the Retry-After of one sequence. Nothing of it is read, checked or
    looked up, so that this comes before 404 and 422 (401, 403 of the route and 503 of a draining server come earlier).
    Where one may wait, the exact check of its count is the route's, as before. The connection is kept: the body, when
    it is short, is dropped as it comes (`Connection.on_body`). Event loop only.
    """

    def __init__(self, app: ASGIApp, service: Service, routes: Iterable[BaseRoute]) -> None:
        """routes: those that are POSTed to are for sequences, all of them; the others are not looked at."""
        self.app = app
        self.service = service
        api = [route for route in routes if isinstance(route, APIRoute)]
        self.routes = {route.path: route for route in api if "POST" in (route.methods or ())}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self.routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is not None and current().caller.may("infer"):
            try:
                self.service.check_room(1)
            except QueueFull as error:
                scope["route"] = route  # under which it is counted
                await _refusal(error, Headers(scope=scope))(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _refusal(error: QueueFull, headers: Headers) -> Response:
    response = error_response(error)
    length = headers.get("content-length", "")
    if not length.isdigit() or int(length) > DROPPED_BYTES:
        response.headers["connection"] = "close"
    return response

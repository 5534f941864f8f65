"""Who asks: the key that a request presents, and the rights that routes need."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Depends
from fastapi.requests import Request
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import error_response
from server.caller import Forbidden, Right
from server.context import current
from server.keys import InvalidKey, KeyRing, RateExceeded

OPEN = ("/health", "/ready")
"""What anybody may ask."""
SCHEME = HTTPBearer(auto_error=False, description="A key of --api-key-file")
"""For the description of the API alone; `Authentication` does the work, for unknown routes too."""


class Authentication:
    """Every request but those of OPEN presents a key, `Authorization: Bearer …`, and stays within its rate."""

    def __init__(self, app: ASGIApp, ring: KeyRing) -> None:
        self.app = app
        self.ring = ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        try:
            self._admit(Headers(scope=scope).get("authorization", ""))
        except (InvalidKey, RateExceeded) as error:
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _admit(self, header: str) -> None:
        """Raises InvalidKey, RateExceeded."""
        scheme, _, key = header.partition(" ")
        caller = self.ring.find(key.strip()) if scheme.lower() == "bearer" else None
        if caller is None:
            raise InvalidKey("send a valid API key: `Authorization: Bearer KEY`")
        current().caller = caller
        self.ring.take(caller)


def needs(*rights: Right) -> Callable[[], Awaitable[None]]:
    """A dependency of routes: one of these rights. Raises Forbidden."""

    async def check() -> None:
        caller = current().caller
        if not any(caller.may(right) for right in rights):
            raise Forbidden(f"this key has not the right that this route needs: {' or '.join(rights)}")

    return check


async def _usable(request: Request) -> None:
    """The adapter in the path is one that the caller may use. Raises Forbidden."""
    if name := request.path_params.get("name"):
        current().caller.check_use(name)


INFER = Depends(needs("infer"))
ADMIN = Depends(needs("admin"))
NAMED = Depends(_usable)
METRICS = Depends(needs("metrics", "admin"))

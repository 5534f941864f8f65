"""What the routers share: the service, adapter headers, and giving up when the client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Request

from adapters.registry import NAME_PATTERN
from server.service import Held, Service

T = TypeVar("T")


class TooManyInputs(ValueError):
    """More inputs in one request than `max_items`."""


class ClientGone(Exception):
    """The connection was closed before the answer was ready; nobody reads what follows."""


async def service_of(request: Request) -> Service:
    """A coroutine, since FastAPI calls a plain function in another thread, for each request."""
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(service_of)]

# What names in a path look like is told, not checked here: nothing has another name, so that the answer is 404.
AdapterName = Annotated[str, Path(json_schema_extra={"pattern": NAME_PATTERN})]
ModelPath = Annotated[str, Path(json_schema_extra={"minLength": 1, "maxLength": 256})]


def check_count(service: Service, count: int) -> None:
    """Raises TooManyInputs, QueueFull."""
    if count > service.config.max_items:
        raise TooManyInputs(f"{count} inputs in one request, at most {service.config.max_items} are served")
    service.check_room(count)


def adapter_headers(held: Held) -> dict[str, str]:
    """`x-adapter` and `x-adapter-digest`, where an adapter answered."""
    return {} if held.version is None else {"x-adapter": held.name, "x-adapter-digest": held.version.digest}


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, cancelling it when the client disconnects. Raises ClientGone then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""create_app: the routers, the error handlers and the middleware around one service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import server
from server.api import adapters, openai, operations, predict, tokenize
from server.api.drain import Admission, Traffic
from server.api.errors import add_handlers
from server.api.middleware import Account, BodyLimit
from server.api.uploads import FORM_BYTES
from server.service import Service


def create_app(service: Service) -> FastAPI:
    """The HTTP application; it starts the service's engine when it starts, and stops it when it stops."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(title="multilora", version=server.__version__, lifespan=lifespan)
    app.state.service = service
    app.state.traffic = Traffic()
    for module in (openai, predict, tokenize, adapters, operations):
        app.include_router(module.router)
    add_handlers(app)
    config = service.config
    app.add_middleware(
        BodyLimit, max_bytes=config.max_body_bytes, max_upload_bytes=config.max_adapter_bytes + FORM_BYTES
    )
    app.add_middleware(Admission, traffic=app.state.traffic)
    app.add_middleware(Account, metrics=service.metrics, log=config.log_requests)
    return app

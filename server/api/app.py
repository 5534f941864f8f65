"""create_app: the routers, the error handlers and the middleware around one service."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Security

import server
from server.api import adapters, openai, operations, predict, tokenize
from server.api.authentication import ADMIN, INFER, NAMED, SCHEME, Authentication
from server.api.door import Door
from server.api.drain import Admission, Traffic
from server.api.errors import add_handlers
from server.api.middleware import Account, BodyLimit
from server.api.tracing import Tracing, make_provider
from server.api.uploads import FORM_BYTES, TOKENIZER_BYTES
from server.keys import KeyRing
from server.service import Service


def create_app(service: Service) -> FastAPI:
    """The HTTP application; it starts the service's engine when it starts, and stops it when it stops.

    Raises InvalidKeyFile.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()
            if provider is not None:
                await asyncio.to_thread(provider.shutdown)

    config = service.config
    provider = make_provider(os.environ)
    keys = Path(config.api_key_file).expanduser() if config.api_key_file else None
    scheme = [Security(SCHEME)] if keys else []
    app = FastAPI(title="multilora", version=server.__version__, lifespan=lifespan, dependencies=scheme)
    app.state.service = service
    app.state.traffic = Traffic()
    for module in (openai, predict, tokenize):
        app.include_router(module.router, dependencies=[INFER])
    app.include_router(adapters.router, dependencies=[ADMIN, NAMED])
    app.include_router(operations.router)
    add_handlers(app)
    uploads = config.max_adapter_bytes + FORM_BYTES + TOKENIZER_BYTES
    app.add_middleware(
        BodyLimit, max_bytes=config.max_body_bytes, max_upload_bytes=uploads,
        timeout_s=config.client_timeout,
    )  # fmt: skip
    app.add_middleware(Door, service=service, routes=(*openai.router.routes, *predict.router.routes))
    app.add_middleware(Admission, traffic=app.state.traffic)
    if keys:
        app.add_middleware(Authentication, ring=KeyRing(keys))
    if provider is not None:
        app.add_middleware(Tracing, provider=provider)
    app.add_middleware(Account, metrics=service.metrics, log=config.log_requests)
    return app

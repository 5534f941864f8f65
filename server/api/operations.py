"""What an operator asks: does it live, is it ready, what does it count, which version is it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

import server
from server.api.answers import TEXT, Status, Version, answer, errors, probe
from server.api.authentication import METRICS
from server.api.common import ServiceDep
from server.api.drain import DRAINING
from server.api.errors import RETRY_AFTER_S, error_response
from server.engine.async_engine import EngineNotReady, EngineState
from server.generation import EngineFailed

router = APIRouter()


@router.get("/health", responses=answer(Status) | probe(500))
async def health(service: ServiceDep) -> Response:
    """200 while the process can work or may come to; 500 when the engine has failed."""
    engine = service.async_engine
    if engine.state is EngineState.FAILED:
        return error_response(EngineFailed(engine.reason))
    return JSONResponse({"status": "ok"})


@router.get("/ready", responses=answer(Status) | probe(503))
async def ready(request: Request, service: ServiceDep) -> Response:
    """200 once the base has passed its self-test and the adapters are loaded; 503 with the reason before and while the
    server drains."""
    if request.app.state.traffic.draining:
        return JSONResponse(DRAINING, 503, {"Retry-After": RETRY_AFTER_S})
    engine = service.async_engine
    if engine.state is not EngineState.READY:
        return error_response(EngineNotReady(engine.reason))
    return JSONResponse({"status": "ready"})


@router.get("/metrics", response_class=Response, responses=TEXT | errors(), dependencies=[METRICS])
async def metrics(service: ServiceDep) -> Response:
    """Prometheus' exposition format."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", responses=answer(Version) | errors())
async def version() -> dict[str, Any]:
    return {"version": server.__version__}

"""Adapters: list, load by path, remove; and vLLM's routes for the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.responses import JSONResponse, PlainTextResponse, Response

from adapters.checkpoint import CONFIG_FILE
from adapters.errors import AdapterExists, InvalidAdapter, InvalidName
from adapters.registry import AdapterVersion
from server.api.common import ServiceDep
from server.api.errors import error_body
from server.api.schemas import LoadLoraAdapter, PutAdapter, UnloadLoraAdapter
from server.service import ForbiddenPath, Service

router = APIRouter()


@router.get("/v1/adapters")
async def list_adapters(
    service: ServiceDep,
    state: Literal["ready", "refused"] | None = None,
    tier: Literal["disk", "host", "device"] | None = None,
    after: str = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """Every adapter by name, the refused ones with their reasons; `after` the last name of the page before."""
    rows = [_row(service, name, version) for name, version in service.registry.list()]
    rows += [_refused_row(name, reasons) for name, reasons in service.registry.refused().items()]
    rows = [r for r in rows if state in (None, r["state"]) and tier in (None, r.get("tier")) and r["name"] > after]
    rows.sort(key=lambda row: row["name"])
    return {"object": "list", "data": rows[:limit], "has_more": len(rows) > limit}


@router.get("/v1/adapters/{name}")
async def get_adapter(name: str, service: ServiceDep) -> dict[str, Any]:
    """One adapter, with where each of its tensors went; or why it is refused."""
    refused = service.registry.refused()
    if name in refused:
        return _refused_row(name, refused[name])
    version = service.registry.get(name)
    return {**_row(service, name, version), "coverage": dict(version.adapter.coverage)}


@router.put("/v1/adapters/{name}")
async def put_adapter(name: str, body: PutAdapter, service: ServiceDep) -> Response:
    """Serve a checkpoint under a name: 201 when its content is new there, 200 when it was served already."""
    version, created = await service.load_adapter(name, body.source)
    headers = {"x-adapter": name, "x-adapter-digest": version.digest}
    return JSONResponse(_row(service, name, version), 201 if created else 200, headers)


@router.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, service: ServiceDep) -> dict[str, Any]:
    """No new requests from now on; answers when the running ones have ended, with what was freed."""
    version, drained = service.remove_adapter(name)
    freed = await asyncio.wrap_future(drained)
    return {"name": name, "digest": version.digest, "freed_bytes": freed}


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadLoraAdapter, service: ServiceDep) -> Response:
    """vLLM's contract: a plain line on success; 404 where the path holds nothing; 400 for what cannot be loaded,
    and when the name is taken and `load_inplace` is not set.
    """
    name = body.lora_name
    created = False
    try:
        if not (service.path_below_root(body.lora_path) / CONFIG_FILE).is_file():
            return _refusal(404, f"No adapter found for '{body.lora_path}'", "adapter_not_found")
        _, created = await service.load_adapter(name, body.lora_path, replace=body.load_inplace)
    except (ForbiddenPath, InvalidAdapter, InvalidName) as error:
        return _refusal(400, str(error), "invalid_adapter")
    except AdapterExists:
        pass
    if not created and not body.load_inplace:
        message = f"The lora adapter '{name}' has already been loaded. Set load_inplace to true to replace it."
        return _refusal(400, message, "adapter_exists")
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadLoraAdapter, service: ServiceDep) -> Response:
    """vLLM's contract: a plain line on success, 404 for an unknown name."""
    service.remove_adapter(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _refusal(status: int, message: str, code: str) -> Response:
    return JSONResponse(error_body(message, "invalid_request_error", code), status)


def _refused_row(name: str, reasons: Sequence[str]) -> dict[str, Any]:
    return {"name": name, "state": "refused", "reasons": list(reasons)}


def _row(service: Service, name: str, version: AdapterVersion) -> dict[str, Any]:
    adapter = version.adapter
    return {
        "name": name,
        "task_type": adapter.task_type,
        "digest": version.digest,
        "state": "ready",
        "tier": version.tier,
        "rank": adapter.rank,
        "bytes": adapter.num_bytes,
        "base": service.loaded.name,
        "labels": list(adapter.labels),
        "pinned": False,
        "requests": version.requests,
        "last_used": version.last_used,
        "loaded_in_s": adapter.loaded_in_s,
    }

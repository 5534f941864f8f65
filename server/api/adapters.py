"""Adapters: list, load by path, remove; and vLLM's routes for the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import JSONResponse, PlainTextResponse, Response

from adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from adapters.directory import CHECKPOINT_FILES
from adapters.errors import AdapterExists, AdapterRefused, InvalidAdapter, InvalidName
from adapters.registry import Entry
from adapters.version import AdapterVersion
from server.api.answers import TEXT, AdapterDetail, AdapterRow, AdapterRows, RefusedRow, Removed, answer, errors
from server.api.common import AdapterName, ServiceDep
from server.api.errors import error_body
from server.api.schemas import LoadLoraAdapter, Pin, PutAdapter, Rollback, UnloadLoraAdapter
from server.api.uploads import FORM_BYTES, receive_checkpoint
from server.context import current
from server.lifecycle import ForbiddenPath
from server.service import Service

FILE = {"type": "string", "format": "binary"}
UPLOAD_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": PutAdapter.model_json_schema()},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": dict.fromkeys(CHECKPOINT_FILES, FILE),
                "required": [CONFIG_FILE, WEIGHTS_FILE],
                "additionalProperties": False,
            }
        },
    },
}

router = APIRouter()


@router.get("/v1/adapters", responses=answer(AdapterRows) | errors(422))
async def list_adapters(
    service: ServiceDep,
    state: Literal["ready", "refused"] | None = None,
    tier: Literal["disk", "host", "device"] | None = None,
    after: str = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """Every adapter by name, the refused ones with their reasons; `after` the last name of the page before."""
    may_use = current().caller.may_use
    refused = {name: reasons for name, reasons in service.registry.refused().items() if may_use(name)}
    rows = [_row(service, name, entry) for name, entry in service.registry.list() if may_use(name)]
    rows += [_refused_row(name, refused[name]) for name in refused.keys() - {row["name"] for row in rows}]
    rows = [r for r in rows if state in (None, r["state"]) and tier in (None, r.get("tier")) and r["name"] > after]
    rows.sort(key=lambda row: row["name"])
    return {"object": "list", "data": rows[:limit], "has_more": len(rows) > limit}


@router.get("/v1/adapters/{name}", responses=answer(AdapterDetail | RefusedRow) | errors(404, 422))
async def get_adapter(name: AdapterName, service: ServiceDep) -> dict[str, Any]:
    """One adapter, with the versions that are kept, and what `multilora inspect` tells; or why it is refused."""
    try:
        version, report = await service.lifecycle.describe(name)
    except AdapterRefused as error:
        return _refused_row(name, error.reasons)
    versions = [
        {"digest": stored.info.digest, "put_at": stored.put_at, "bytes": stored.info.num_bytes}
        for stored in await service.lifecycle.versions(name)
    ]
    return {**_row(service, name, version), "versions": versions, **asdict(report)}


@router.put(
    "/v1/adapters/{name}",
    openapi_extra={"requestBody": UPLOAD_BODY},
    responses=answer(AdapterRow) | answer(AdapterRow, status=201) | errors(415, 422),
)
async def put_adapter(name: AdapterName, request: Request, service: ServiceDep) -> Response:
    """Serve a checkpoint under a name: 201 when its content is new there, 200 when it was served already."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":

        async def receive(directory: Path) -> None:
            limit = service.config.max_adapter_bytes + FORM_BYTES
            await receive_checkpoint(request, directory, limit, service.lifecycle.upload_threads)

        version, created = await service.lifecycle.upload(name, receive)
    elif kind in ("application/json", ""):
        body = await _json_body(request)
        _check_source(service, body.source)
        version, created = await service.lifecycle.load(name, body.source)
    else:
        message = f"send multipart/form-data or application/json, not {kind[:100]!r}"
        return _refusal(415, message, "unsupported_media_type")
    headers = {"x-adapter": name, "x-adapter-digest": version.digest}
    return JSONResponse(_row(service, name, version), 201 if created else 200, headers)


@router.delete("/v1/adapters/{name}", responses=answer(Removed) | errors(404, 422))
async def delete_adapter(name: AdapterName, service: ServiceDep) -> dict[str, Any]:
    """No new requests from now on; answers when the running ones have ended, with what was freed."""
    digest, freed = await service.lifecycle.remove(name)
    return {"name": name, "digest": digest, "freed_bytes": freed}


@router.post("/v1/adapters/{name}/rollback", responses=answer(AdapterRow) | errors(404, 422))
async def roll_back(name: AdapterName, body: Rollback, service: ServiceDep) -> Response:
    """An earlier version becomes current; requests in flight end on the version that they started with."""
    version = await service.lifecycle.rollback(name, body.digest)
    headers = {"x-adapter": name, "x-adapter-digest": version.digest}
    return JSONResponse(_row(service, name, version), headers=headers)


@router.post("/v1/adapters/{name}/pin", responses=answer(AdapterRow) | errors(404, 409, 422))
async def pin(name: AdapterName, body: Pin, service: ServiceDep) -> dict[str, Any]:
    """Keep it on the device, or no more; at most max_loras − 1 adapters are pinned."""
    await service.lifecycle.pin(name, body.pinned)
    return _row(service, name, service.registry.get(name))


@router.post("/v1/load_lora_adapter", response_class=Response, responses=TEXT | errors(400, 404, 422))
async def load_lora_adapter(body: LoadLoraAdapter, service: ServiceDep) -> Response:
    """vLLM's contract: a plain line on success; 404 where the path holds nothing; 400 for what cannot be loaded,
    and when the name is taken and `load_inplace` is not set.
    """
    name = body.lora_name
    created = False
    current().caller.check_use(name)
    try:
        _check_source(service, body.lora_path)
        if not (service.lifecycle.path_below_root(body.lora_path) / CONFIG_FILE).is_file():
            return _refusal(404, f"No adapter found for '{body.lora_path}'", "adapter_not_found")
        _, created = await service.lifecycle.load(name, body.lora_path, replace=body.load_inplace)
    except (ForbiddenPath, InvalidAdapter, InvalidName) as error:
        return _refusal(400, str(error), "invalid_adapter")
    except AdapterExists:
        pass
    if not created and not body.load_inplace:
        message = f"The lora adapter '{name}' has already been loaded. Set load_inplace to true to replace it."
        return _refusal(400, message, "adapter_exists")
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=Response, responses=TEXT | errors(404, 422))
async def unload_lora_adapter(body: UnloadLoraAdapter, service: ServiceDep) -> Response:
    """vLLM's contract: a plain line on success, 404 for an unknown name."""
    current().caller.check_use(body.lora_name)
    await service.lifecycle.begin_to_remove(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _check_source(service: Service, source: str) -> None:
    """A path below the root begins with a name that the caller may use, as if it were served under that.

    Raises Forbidden, ForbiddenPath.
    """
    path, root = service.lifecycle.path_below_root(source), service.config.root
    assert root is not None
    parts = path.relative_to(root).parts
    current().caller.check_use(parts[0] if parts else "")


def _refusal(status: int, message: str, code: str) -> Response:
    return JSONResponse(error_body(message, "invalid_request_error", code), status)


def _refused_row(name: str, reasons: Sequence[str]) -> dict[str, Any]:
    shown = name.encode("utf-8", "replace").decode()  # a directory's name need not be Unicode
    return {"name": shown, "state": "refused", "reasons": list(reasons)}


def _row(service: Service, name: str, entry: Entry) -> dict[str, Any]:
    info, read = entry.info, entry if isinstance(entry, AdapterVersion) else None
    reasons = service.registry.refused().get(name)
    return {
        "name": name,
        "task_type": info.task_type or None,
        "digest": info.digest or None,
        "state": "ready",
        "tier": entry.tier,
        "rank": info.rank,
        "bytes": info.num_bytes,
        "base": service.loaded.name,
        "labels": list(info.labels),
        "pinned": service.registry.pinned(name),
        "requests": read.requests if read else 0,
        "last_used": read.last_used if read else None,
        "loaded_in_s": read.loaded_in_s if read else None,
        **({"update_refused": list(reasons)} if reasons else {}),
    }


async def _json_body(request: Request) -> PutAdapter:
    try:
        return PutAdapter.model_validate_json(await request.body())
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from error

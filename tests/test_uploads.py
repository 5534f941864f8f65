"""A checkpoint's files come in as a form, block by block; whatever else comes is refused with a reason."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Message

from adapters.checkpoint import CONFIG_FILE, LABELS_FILE, MAX_JSON_BYTES, MODEL_CONFIG_FILE, WEIGHTS_FILE
from server.api import uploads
from server.api.errors import add_handlers
from server.api.middleware import BodyLimit
from server.api.uploads import BLOCK_BYTES, receive_checkpoint

BOUNDARY = b"--=_0123456789abcdef"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}
PUT = "/v1/adapters/support"
MAX_BYTES = 8 << 20
CONFIG = b'{"r": 8}'


def part(content: bytes, disposition: str, *headers: str) -> bytes:
    lines = [f"Content-Disposition: form-data; {disposition}", *headers, "", ""]
    return b"--" + BOUNDARY + b"\r\n" + "\r\n".join(lines).encode() + content + b"\r\n"


def named(file: str, content: bytes = CONFIG) -> bytes:
    return part(content, f'name="{file}"')


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--" + BOUNDARY + b"--\r\n"


WHOLE = form(named(CONFIG_FILE), named(WEIGHTS_FILE, b"\r\n--weights\r\n"))


def uploaded(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def send(directory: Path, max_bytes: int = MAX_BYTES, **request: Any) -> httpx.Response:
    """PUT to an application that has this one route, and the middleware around it."""
    app = FastAPI()

    @app.put("/v1/adapters/{name}")
    async def put(name: str, request: Request) -> Response:
        with ThreadPoolExecutor(1) as threads:
            await receive_checkpoint(request, directory, max_bytes, threads)
        return Response(status_code=201)

    @app.put("/v1/other/{name}")
    @app.post("/v1/adapters/{name}")
    async def read(name: str, request: Request) -> Response:
        return Response(str(len(await request.body())))

    add_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=2000, max_upload_bytes=MAX_BYTES, timeout_s=60)

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(**{"method": "PUT", "url": PUT, **request})

    return asyncio.run(main())


def receive(directory: Path, chunks: Iterable[bytes], max_bytes: int = MAX_BYTES) -> None:
    """As the server would, when the body comes in these chunks and then the client goes."""
    messages = iter([*({"type": "http.request", "body": each, "more_body": True} for each in chunks)])

    async def next_message() -> Message:
        return next(messages, {"type": "http.disconnect"})

    scope = {"type": "http", "headers": [(b"content-type", FORM["content-type"].encode())]}
    asyncio.run(receive_checkpoint(Request(scope, next_message), directory, max_bytes))


def refusal(answer: httpx.Response, status: int = 422, code: str = "invalid_upload") -> str:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
    return str(error["message"])


def test_files_are_written_as_they_were_sent(tmp_path: Path) -> None:
    contents = {
        CONFIG_FILE: CONFIG,
        WEIGHTS_FILE: random.Random(1).randbytes(1 << 20),
        LABELS_FILE: b'["a"]',
        MODEL_CONFIG_FILE: b"",
    }
    answer = send(tmp_path, files=[("files", (name, content)) for name, content in contents.items()])
    assert answer.status_code == 201, answer.text
    assert uploaded(tmp_path) == contents


def test_a_field_name_does_without_a_filename(tmp_path: Path) -> None:
    body = form(part(b"weights", f"name={WEIGHTS_FILE}"), part(CONFIG, f'name="{CONFIG_FILE}"; filename=""'))
    assert send(tmp_path, content=body, headers=FORM).status_code == 201
    assert uploaded(tmp_path) == {CONFIG_FILE: CONFIG, WEIGHTS_FILE: b"weights"}


def test_a_path_counts_by_its_last_component_and_leads_nowhere(tmp_path: Path) -> None:
    directory = tmp_path / "in" / "here"
    directory.mkdir(parents=True)
    files = [("x", (f"../../x/{CONFIG_FILE}", CONFIG)), ("x", (f"C:\\models\\{WEIGHTS_FILE}", b"weights"))]
    assert send(directory, files=files).status_code == 201
    assert uploaded(directory) == {CONFIG_FILE: CONFIG, WEIGHTS_FILE: b"weights"}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [path.name for path in directory.iterdir()]


def test_five_megabytes_in_small_chunks(tmp_path: Path) -> None:
    """Each of the sizes cuts a boundary at another place."""
    weights = (b"\r\n--" + BOUNDARY[:-1] + b"\r" + random.Random(2).randbytes(979)) * 5000
    body = form(named(WEIGHTS_FILE, weights), named(CONFIG_FILE))

    async def chunks() -> AsyncIterator[bytes]:
        sizes, start = random.Random(3), 0
        while start < len(body):
            size = sizes.randrange(1, 2000)
            yield body[start : start + size]
            start += size

    answer = send(tmp_path, content=chunks(), headers=FORM)
    assert answer.status_code == 201, answer.text
    assert uploaded(tmp_path) == {CONFIG_FILE: CONFIG, WEIGHTS_FILE: weights}


def test_a_boundary_cut_at_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "BLOCK_BYTES", 1)
    for cut in range(len(WHOLE)):
        directory = tmp_path / str(cut)
        directory.mkdir()
        with pytest.raises(ClientDisconnect):  # the body never says that it has ended
            receive(directory, [WHOLE[:cut], WHOLE[cut:]])
        assert uploaded(directory) == {CONFIG_FILE: CONFIG, WEIGHTS_FILE: b"\r\n--weights\r\n"}


@pytest.mark.parametrize("limit", ["of the upload", "of the middleware"])
def test_over_the_limit_nothing_more_is_read(tmp_path: Path, limit: str) -> None:
    sent = 0
    max_bytes = 1 << 20 if limit == "of the upload" else 1 << 40

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        yield named(CONFIG_FILE) + named(WEIGHTS_FILE, b"")[:-2]
        while True:
            sent += 10_000
            yield bytes(10_000)

    answer = send(tmp_path, max_bytes, content=chunks(), headers=FORM)
    allowed = min(max_bytes, MAX_BYTES)
    assert f"larger than {'the limit of ' if allowed < MAX_BYTES else ''}{allowed} bytes" in refusal(
        answer, 413, "too_large"
    )
    assert answer.headers["connection"] == "close"
    assert allowed - 10_000 < sent < allowed + 20_000
    assert (tmp_path / WEIGHTS_FILE).stat().st_size > allowed - BLOCK_BYTES - 20_000


def test_the_limit_itself_is_allowed(tmp_path: Path) -> None:
    assert send(tmp_path, len(WHOLE), content=WHOLE, headers=FORM).status_code == 201


@pytest.mark.parametrize("file", [CONFIG_FILE, LABELS_FILE, MODEL_CONFIG_FILE])
def test_json_has_a_limit_of_its_own(tmp_path: Path, file: str) -> None:
    weights = named(WEIGHTS_FILE, bytes(MAX_JSON_BYTES + 1))
    for extra, name in ((0, "fits"), (1, "larger")):
        (tmp_path / name).mkdir()
        files = dict.fromkeys((CONFIG_FILE, file), CONFIG) | {file: bytes(MAX_JSON_BYTES + extra)}
        body = form(weights, *(named(*item) for item in files.items()))
        answer = send(tmp_path / name, content=body, headers=FORM)
        if extra:
            assert refusal(answer, 413, "too_large") == f"{file} is larger than the limit of {MAX_JSON_BYTES} bytes"
        else:
            assert answer.status_code == 201


@pytest.mark.parametrize(
    "name",
    ["adapter_model.bin", "README.md", f"{CONFIG_FILE}/", f"{CONFIG_FILE}.", "..", CONFIG_FILE.upper(), "x" * 1000],
)
def test_other_names_are_refused_with_those_that_are_taken(tmp_path: Path, name: str) -> None:
    answer = send(tmp_path, content=form(named(CONFIG_FILE), named(WEIGHTS_FILE), named(name)), headers=FORM)
    message = refusal(answer)
    assert message.startswith(repr(name.rpartition("/")[2][:100]))
    assert all(file in message for file in (CONFIG_FILE, WEIGHTS_FILE, LABELS_FILE, MODEL_CONFIG_FILE))
    assert len(message) < 400
    assert uploaded(tmp_path).keys() <= {CONFIG_FILE, WEIGHTS_FILE}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (form(named(CONFIG_FILE), named(WEIGHTS_FILE), named(CONFIG_FILE)), f"{CONFIG_FILE} is sent twice"),
        (form(named(WEIGHTS_FILE), named(LABELS_FILE)), f"{CONFIG_FILE} must be sent too"),
        (form(named(CONFIG_FILE)), f"{WEIGHTS_FILE} must be sent too"),
        (form(), f"{CONFIG_FILE} and {WEIGHTS_FILE} must be sent too"),
        (b"", "the body ends before the form does"),
        (WHOLE[: -len("--\r\n")], "the body ends before the form does"),
        (WHOLE[: len(WHOLE) // 2], "the body ends before the form does"),
        (b"{}", "the body is not a well-formed multipart form: "),
        (b"--" + BOUNDARY + b"\r\nno header\r\n\r\n", "the body is not a well-formed multipart form: "),
        (form(b"--" + BOUNDARY + b"\r\nX: y\r\n\r\n\r\n"), "'' is not a file of a checkpoint"),
        (
            form(part(b"e30=", f'name="{CONFIG_FILE}"', "Content-Transfer-Encoding: BASE64")),
            f"{CONFIG_FILE} must be sent as it is",
        ),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(tmp_path: Path, body: bytes, message: str) -> None:
    assert refusal(send(tmp_path, content=body, headers=FORM)).startswith(message)


@pytest.mark.parametrize(
    ("content_type", "message"),
    [
        ("application/octet-stream", "a checkpoint is sent as multipart/form-data"),
        ("multipart/mixed; boundary=x", "a checkpoint is sent as multipart/form-data"),
        ("", "a checkpoint is sent as multipart/form-data"),
        ("multipart/form-data", "the content-type names no boundary"),
        ("multipart/form-data; boundary=", "the content-type names no boundary"),
        (f"multipart/form-data; boundary={'x' * 1000}", "the boundary is not usable: "),
    ],
)
def test_other_content_types_are_refused(tmp_path: Path, content_type: str, message: str) -> None:
    assert refusal(send(tmp_path, content=b"x", headers={"content-type": content_type})).startswith(message)
    assert uploaded(tmp_path) == {}


def test_a_client_that_goes_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(ClientDisconnect):
        receive(tmp_path, [WHOLE[:-20]])


def test_a_disk_error_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        receive(tmp_path / "nothing", [bytes(0), WHOLE + bytes(BLOCK_BYTES)])


def test_damaged_bodies_are_refused_or_taken_but_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(4)
    for number in range(300):
        body = bytearray(WHOLE)
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(body))
            body[start : start + rng.randrange(3)] = rng.choice([b"", b"\r\n", b"-", b'"', b"\x00", BOUNDARY])
        directory = tmp_path / str(number)
        directory.mkdir()
        answer = send(directory, content=bytes(body), headers=FORM)
        assert answer.status_code in (201, 422), body
        assert uploaded(directory).keys() <= {CONFIG_FILE, WEIGHTS_FILE}


def test_who_is_cancelled_leaves_when_the_thread_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop, begun, ended = asyncio.get_running_loop(), asyncio.Event(), False
        go_on: asyncio.Event = asyncio.Event()

        def feed(_form: Any, _block: bytes) -> None:
            nonlocal ended
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)
            ended = True

        monkeypatch.setattr(uploads._Form, "feed", feed)
        scope = {"type": "http", "headers": [(b"content-type", FORM["content-type"].encode())]}

        async def message() -> Message:
            return {"type": "http.request", "body": bytes(BLOCK_BYTES), "more_body": True}

        task = asyncio.create_task(receive_checkpoint(Request(scope, message), tmp_path, MAX_BYTES))
        await begun.wait()
        task.cancel()
        loop.call_soon(go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended

    asyncio.run(main())


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"files": [("f", (CONFIG_FILE, CONFIG)), ("f", (WEIGHTS_FILE, bytes(3000)))]}, 201),
        ({"headers": {"content-type": "Multipart/Form-Data; boundary=x"}}, 422),
        ({"headers": {"content-type": "application/json"}}, 413),
        ({"headers": {}}, 413),
        ({"method": "POST", "headers": FORM}, 413),
        ({"url": "/v1/other/support", "headers": FORM}, 413),
        ({"url": "/v1/adapters/a/b", "headers": FORM}, 413),
        ({"headers": {**FORM, "content-length": str(MAX_BYTES + 1)}}, 413),
    ],
)
def test_only_uploads_have_their_limit(tmp_path: Path, request_: dict[str, Any], status: int) -> None:
    body: dict[str, Any] = {} if "files" in request_ else {"content": bytes(3000)}
    answer = send(tmp_path, **{**body, **request_})
    assert answer.status_code == status
    if status == 413:
        limit = MAX_BYTES if "content-length" in request_.get("headers", {}) else 2000
        assert refusal(answer, 413, "too_large") == f"the body is larger than {limit} bytes"

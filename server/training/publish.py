"""Put a finished adapter into a running server."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import httpx

from adapters.checkpoint import CONFIG_FILE, LABELS_FILE, WEIGHTS_FILE

KEY_VARIABLE = "MULTILORA_API_KEY"
TIMEOUT_S = 120


class PublishError(Exception):
    """The server did not take the adapter; the message has its answer."""


def publish(directory: Path, url: str, name: str) -> str:
    """PUT /v1/adapters/`name`, with the key in $MULTILORA_API_KEY. The version's digest. Raises PublishError."""
    key = os.environ.get(KEY_VARIABLE)
    with ExitStack() as stack:
        files = {
            file: stack.enter_context((directory / file).open("rb"))
            for file in (CONFIG_FILE, WEIGHTS_FILE, LABELS_FILE)
            if (directory / file).is_file()
        }
        try:
            answer = httpx.put(
                f"{url.rstrip('/')}/v1/adapters/{quote(name, safe='')}",
                files=files,
                headers={"authorization": f"Bearer {key}"} if key else {},
                timeout=TIMEOUT_S,
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PublishError(f"{url}: {error}") from error
    if not answer.is_success:
        raise PublishError(f"{url} answered {answer.status_code}: {answer.text[:1000]}")
    digest: str = answer.json()["digest"]
    return digest

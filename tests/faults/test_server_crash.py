"""The server under SIGKILL while it takes uploads and deletions: what it acknowledged is there at the next start."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from adapters.store import AdapterStore
from benchmarks.common import Served, served
from tests.support import Spec, make_adapter, save_tiny_base

KILLS = 6
CHANGES = 60
NAMES = [f"name-{number}" for number in range(5)]
KEEP = 2
Files = dict[str, bytes]


class Victim:
    """A client of one server process."""

    def __init__(self, server: Served, client: httpx.Client) -> None:
        self.process = server.process
        self.client = client

    def served(self) -> dict[str, str]:
        rows = self.client.get("/v1/adapters").json()["data"]
        return {row["name"]: row["digest"] for row in rows}

    def put(self, name: str, files: Files) -> str:
        answer = self.client.put(f"/v1/adapters/{name}", files=files)
        assert answer.status_code in (200, 201), answer.text
        return str(answer.json()["digest"])

    def delete(self, name: str) -> None:
        assert self.client.delete(f"/v1/adapters/{name}").status_code in (200, 404)


class Client:
    """Changes names at random; what was acknowledged, and the one change that was not."""

    def __init__(self, contents: Mapping[str, Files], rng: random.Random) -> None:
        self.contents = contents
        self.rng = rng
        self.acknowledged: dict[str, str] = {}
        self.changes = 0
        self.in_flight: tuple[str, str | None] | None = None
        """A name, and the digest that it is to have."""

    def change_until_it_ends(self, victim: Victim) -> None:
        try:
            while True:
                self._change(victim)
        except httpx.TransportError:
            return

    def check(self, served: Mapping[str, str]) -> None:
        """What is served is what was acknowledged, with or without the change in flight; it is what holds from here."""
        may_be = [self.acknowledged]
        if self.in_flight is not None:
            may_be.append(_changed(self.acknowledged, *self.in_flight))
        assert served in may_be
        self.acknowledged, self.in_flight = dict(served), None

    def _change(self, victim: Victim) -> None:
        name = self.rng.choice(NAMES)
        digest = self.rng.choice(list(self.contents)) if self.rng.random() < 0.65 else None
        self.in_flight = (name, digest)
        if digest is None:
            victim.delete(name)
        else:
            assert victim.put(name, self.contents[digest]) == digest
        self.acknowledged, self.in_flight = _changed(self.acknowledged, name, digest), None
        self.changes += 1


def _changed(state: Mapping[str, str], name: str, digest: str | None) -> dict[str, str]:
    rest = {other: value for other, value in state.items() if other != name}
    return rest if digest is None else {**rest, name: digest}


@contextmanager
def running(base: Path, store: Path) -> Iterator[Victim]:
    flags = ("--base", str(base), "--keep-versions", str(KEEP))
    with (
        served(None, *flags, store_dir=store) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield Victim(server, client)


def upload_all(victim: Victim, checkpoints: list[Path]) -> dict[str, Files]:
    """Digest -> files."""
    contents = {}
    for checkpoint in checkpoints:
        files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.suffix != ".md"}
        contents[victim.put("first", files)] = files
        victim.delete("first")
    return contents


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_what_was_acknowledged_is_served_after_a_kill(tmp_path: Path) -> None:
    base, store = save_tiny_base("tiny-llama", tmp_path / "tiny-llama"), tmp_path / "store"
    specs = [Spec(f"c{rank}", "CAUSAL_LM", rank, ["q_proj", "v_proj"]) for rank in (2, 4, 8)]
    checkpoints = [make_adapter(base, tmp_path, spec) for spec in specs]
    with running(base, store) as victim:
        client = Client(upload_all(victim, checkpoints), random.Random(4))
    assert len(client.contents) == len(specs)
    kills = interrupted = 0
    while kills < KILLS or client.changes < CHANGES:
        with running(base, store) as victim:
            client.check(victim.served())
            delay = client.rng.uniform(0.01, 0.5)
            threading.Timer(delay, victim.process.send_signal, (signal.SIGKILL,)).start()
            client.change_until_it_ends(victim)
            kills += 1
            interrupted += client.in_flight is not None
        with closing(AdapterStore(store, KEEP)) as closed:
            assert closed.audit() == []
    assert interrupted > 0, "no change was under way at any kill"
    with running(base, store) as victim:
        client.check(victim.served())
        for name in client.acknowledged:
            answer = victim.client.post("/v1/completions", json={"model": name, "prompt": [5, 6], "max_tokens": 1})
            assert answer.status_code == 200, answer.text

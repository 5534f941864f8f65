"""The server under SIGKILL while it takes uploads and deletions: what it acknowledged is there at the next start."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from adapters.store import AdapterStore
from tests.support import Spec, make_adapter, save_tiny_base

KILLS = 10
CHANGES = 100
NAMES = [f"name-{number}" for number in range(5)]
KEEP = 2
STARTS_WITHIN_S = 120
Files = dict[str, bytes]


class Victim:
    """One server process, and what the client knows of it."""

    def __init__(self, base: Path, store: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "server", "serve", "--base", str(base), "--port", str(port)]
        command += ["--store-dir", str(store), "--keep-versions", str(KEEP), "--log-level", "error"]
        self.process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def wait_ready(self) -> None:
        end = time.monotonic() + STARTS_WITHIN_S
        while True:
            assert self.process.poll() is None, "the server did not start"
            assert time.monotonic() < end, "the server was not ready in time"
            try:
                if self.client.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)

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
    victim = Victim(base, store)
    try:
        victim.wait_ready()
        yield victim
    finally:
        victim.process.kill()
        victim.process.wait()
        victim.client.close()


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

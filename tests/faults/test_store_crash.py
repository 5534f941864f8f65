"""AdapterStore under SIGKILL: what was acknowledged is there, what was in flight is whole or absent, nothing else is.

Run as a program (`main`), this file is the process that loads the library once and forks the victims: each opens the
store, changes it in a loop, and says before each change what it intends and after it that it is done.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from adapters.adapter import Adapter, AdapterInfo, LoraPair
from adapters.arena import build_arena
from adapters.arena_files import ArenaFiles
from adapters.config import LoraConfig
from adapters.store import AdapterStore

KILLS = 100
KEEP = 2
NAMES = [f"name-{number}" for number in range(6)]
WEIGHTS = "adapter_model.safetensors"


# the victim


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def change(store: AdapterStore, rng: random.Random) -> None:
    """One random change; the digests are of what is in the files."""
    name = rng.choice(NAMES)
    operation = rng.choices(["commit", "remove", "collect", "keep"], [6, 3, 2, 2])[0]
    weights = rng.randbytes(rng.randrange(1, 5000))
    words = (operation, name, hashlib.sha256(weights).hexdigest())
    say("intent", *words)
    if operation == "commit":
        staged = store.stage()
        (staged / "adapter_config.json").write_bytes(b"{}")
        (staged / WEIGHTS).write_bytes(weights)
        store.commit(name, staged, AdapterInfo(words[2], "CAUSAL_LM", 8, (), "regression", len(weights)))
    elif operation == "remove":
        store.remove(name)
    elif operation == "keep":
        ArenaFiles(store.scratch, 1 << 20).write(arena_of(rng.randrange(1, 500), words[2]))
    else:
        store.collect(lambda digest: False)
    say("done", *words)


def arena_of(size: int, digest: str) -> Adapter:
    """Any adapter that has an arena."""
    pair = LoraPair(torch.zeros(2, size), torch.zeros(size, 2), 1.0)
    arena = build_arena({"layer": pair})
    info = AdapterInfo(digest, "CAUSAL_LM", 2, (), "regression", size)
    return Adapter(info, LoraConfig(2, 2, ("layer",)), arena.pairs, None, memory=arena.memory)


def be_the_victim(root: Path, number: int) -> None:
    signal.alarm(30)  # its end, should nobody kill it
    say("started", os.getpid())
    rng = random.Random(number)
    say("intent", "open", "-", "-")
    store = AdapterStore(root, KEEP)
    say("done", "open", "-", "-")
    while True:
        change(store, rng)


def main(root: Path) -> None:
    """Fork a victim for each number that is read, and say when it is dead."""
    for line in sys.stdin:
        victim = os.fork()
        if victim == 0:
            try:
                be_the_victim(root, int(line))
            finally:
                os._exit(1)
        _, status = os.waitpid(victim, 0)
        say("ended", os.waitstatus_to_exitcode(status))


# the test


@dataclass
class Witness:
    """What the victims said: the digest that each name must have, and what was being done."""

    current: dict[str, str] = field(default_factory=dict)
    in_flight: list[str] | None = None

    def hear(self, kind: str, words: list[str]) -> None:
        if kind == "intent":
            self.in_flight = words
        elif kind == "done":
            self.finish()

    def finish(self) -> None:
        """The change in flight was made."""
        assert self.in_flight is not None
        operation, name, digest = self.in_flight
        if operation == "commit":
            self.current[name] = digest
        elif operation == "remove":
            self.current.pop(name, None)
        self.in_flight = None


@pytest.fixture
def forker(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(tmp_path / "store")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def kill_one(forker: subprocess.Popen[str], number: int, witness: Witness) -> None:
    """Let victim `number` say some lines, kill it somewhere in what follows, and hear the rest."""
    assert forker.stdin is not None
    assert forker.stdout is not None
    rng = random.Random(f"kill {number}")
    last_line = rng.randrange(2, 20)
    forker.stdin.write(f"{number}\n")
    forker.stdin.flush()
    began, victim = 0.0, 0
    for count, line in enumerate(forker.stdout, start=1):
        kind, *words = line.split()
        if kind == "ended":
            assert int(words[0]) == -signal.SIGKILL, f"victim {number} ended by itself: {words}"
            return
        if kind == "started":
            began, victim = time.perf_counter(), int(words[0])
        witness.hear(kind, words)
        if count == last_line:
            a_change_s = 2 * (time.perf_counter() - began) / count
            time.sleep(rng.random() * a_change_s)  # no busy loop: the victim may need this core
            os.kill(victim, signal.SIGKILL)
    pytest.fail(f"the forker ended under victim {number}")


def stage_of_death(root: Path, in_flight: list[str] | None) -> str:
    """Where in its work a victim died, by what it left."""
    if in_flight is None:
        return "between changes"
    journal = root / "store.db-journal"
    if journal.is_file() and journal.stat().st_size:
        return f"{in_flight[0]}, journal open"
    if any((root / "incoming").glob("*")):
        return f"{in_flight[0]}, files in incoming"
    if (root / "versions" / in_flight[2]).is_dir():
        return f"{in_flight[0]}, directory in place"
    return in_flight[0]


def check(store: AdapterStore, witness: Witness, context: str) -> None:
    assert store.audit() == [], context
    assert list(store._incoming.iterdir()) == [], context
    assert list(store.scratch.iterdir()) == [], context
    rows = {digest for (digest,) in store._database.run("SELECT digest FROM version")}
    assert {path.name for path in store._versions.iterdir()} == rows, context
    found = {name: info.digest for name, info in store.names().items()}
    if found != witness.current and witness.in_flight is not None:
        witness.finish()
    assert found == witness.current, context
    for digest in found.values():
        weights = (store.path(digest) / WEIGHTS).read_bytes()
        assert hashlib.sha256(weights).hexdigest() == digest, context


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its victims")
def test_a_hundred_kills(tmp_path: Path, forker: subprocess.Popen[str]) -> None:
    root = tmp_path / "store"
    witness, died = Witness(), Counter[str]()
    for number in range(KILLS):
        kill_one(forker, number, witness)
        in_flight = witness.in_flight
        died[stage_of_death(root, in_flight)] += 1
        died["with arena files"] += (root / "scratch").is_dir() and any((root / "scratch").iterdir())
        with closing(AdapterStore(root, KEEP)) as store:
            check(store, witness, f"victim {number}, in flight: {in_flight}")
        witness.in_flight = None
    assert died["between changes"] < KILLS / 2, died
    assert {"commit", "remove", "collect", "with arena files"} <= {stage.partition(",")[0] for stage in +died}, died


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Whose key it is, by a file that may change under it; how often each may ask; and how keys are made."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import traceback
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from server import key_file, keys
from server.caller import ANYONE, RIGHTS, Caller
from server.cli import main
from server.key_file import MAX_FILE_BYTES
from server.keys import InvalidKeyFile, KeyRing, RateExceeded, make_key

PASTED = "ml-" + "Secret_1-" * 4 + "Secret_"
"""Made as keys are."""
EMPTY_HASH = hashlib.sha256().hexdigest()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.1

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += seconds


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def entry(name: str, **fields: Any) -> dict[str, Any]:
    """An entry whose key is `key of NAME`."""
    return {"name": name, "sha256": sha256(f"key of {name}"), **fields}


def write(path: Path, *entries: dict[str, Any]) -> Path:
    """Replaces the file, as an editor or a mount of secrets does: another inode."""
    new = path.with_suffix(".new")
    new.touch(0o600)
    new.write_text(json.dumps({"keys": entries}))
    new.replace(path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def names_found(ring: KeyRing, *names: str) -> list[str | None]:
    found = [ring.find(f"key of {name}") for name in names]
    return [caller.name if caller else None for caller in found]


def errors(caplog: pytest.LogCaptureFixture, level: int = logging.ERROR) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


# Callers


@pytest.mark.parametrize(
    ("patterns", "allowed", "refused"),
    [
        (("*",), ["a", "smollm2", "a@12ab"], []),
        (("team-a-*", "smollm2"), ["team-a-x", "team-a-x@12ab", "smollm2"], ["team-b-x", "Team-a-x", "smollm2x", ""]),
        (("a?",), ["a1", "a1@1", "a1@a2@3"], ["a", "a@1", "b@a1"]),
        ((), [], ["a", ""]),
    ],
)
def test_patterns_are_over_names_without_digests(
    patterns: tuple[str, ...], allowed: list[str], refused: list[str]
) -> None:
    caller = Caller("c", frozenset({"infer"}), patterns)
    assert [name for name in allowed + refused if caller.may_use(name)] == allowed


def test_anyone_may_everything_without_bounds() -> None:
    assert all(ANYONE.may(right) for right in RIGHTS)
    assert ANYONE.may_use("any/thing@12")
    assert (ANYONE.queue_share, ANYONE.requests_per_minute) == (1.0, None)
    assert [right for right in RIGHTS if Caller("c", frozenset({"metrics"})).may(right)] == ["metrics"]


# Finding


def test_a_key_is_found_with_what_it_may(file: Path) -> None:
    full = {"rights": ["admin", "infer"], "adapters": ["a-*"], "requests_per_minute": 6, "queue_share": 0.5}
    shouted = {**entry("c"), "sha256": sha256("key of c").upper()}
    ring = KeyRing(write(file, entry("a", **full), entry("b"), shouted))
    assert ring.find("key of a") == Caller("a", frozenset({"admin", "infer"}), ("a-*",), 0.5, 6)
    assert ring.find("key of b") == Caller("b", frozenset({"infer"}), ("*",), 1.0, None)
    assert names_found(ring, "c") == ["c"]


@pytest.mark.parametrize(
    "presented", ["", "key", "key of A", "key of a ", "clé", "\udcff\ud800", "\0", sha256("key of a")]
)
def test_what_is_no_key_is_not_found(file: Path, presented: str) -> None:
    assert KeyRing(write(file, entry("a"))).find(presented) is None


def test_a_key_need_not_be_ascii(file: Path) -> None:
    caller = KeyRing(write(file, entry("a", sha256=sha256("clé")))).find("clé")
    assert caller is not None
    assert caller.name == "a"


def test_a_file_without_keys_lets_nobody_in(file: Path) -> None:
    assert names_found(KeyRing(write(file)), "a", "") == [None, None]


@pytest.mark.parametrize("presented", ["key of a", "key of b", "key of c", "nobody's", ""])
def test_every_entry_is_compared(file: Path, presented: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing(write(file, entry("a"), entry("b"), entry("c")))
    compared: list[bytes] = []
    real: Callable[[bytes, bytes], bool] = hmac.compare_digest

    def counted(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    ring.find(presented)
    assert [digest.hex() for digest in compared] == [sha256(f"key of {name}") for name in "abc"]


# A file that changes


def test_a_change_is_seen_within_a_second_and_not_looked_for_more_often(
    file: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = KeyRing(write(file, entry("a"), entry("b")), clock)
    looks: list[Path] = []
    real = key_file.stat_keys

    def counted(path: Path) -> os.stat_result:
        looks.append(path)
        return real(path)

    monkeypatch.setattr(keys, "stat_keys", counted)
    write(file, entry("b"), entry("c"))
    clock.forward(0.9)
    assert names_found(ring, "a", "b", "c") == ["a", "b", None]
    assert looks == []
    clock.forward(0.2)
    assert names_found(ring, "a", "b", "c") == [None, "b", "c"]
    assert looks == [file]


def test_a_file_written_in_place_is_read_again(file: Path, clock: Clock) -> None:
    ring = KeyRing(write(file, entry("a")), clock)
    file.write_text(json.dumps({"keys": [entry("b")]}))
    os.utime(file, ns=(0, 0))  # the same inode and size
    clock.forward(1)
    assert names_found(ring, "a", "b") == [None, "b"]


def test_a_file_that_is_as_it_was_is_not_read_again(file: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing(write(file, entry("a")), clock)
    monkeypatch.setattr(keys, "read_keys", None)
    clock.forward(5)
    assert names_found(ring, "a") == ["a"]


def test_a_broken_or_missing_file_keeps_the_keys_and_is_logged_once_a_change(
    file: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(write(file, entry("a")), clock)

    def after_seconds() -> list[str]:
        caplog.clear()
        for _ in range(3):
            clock.forward(1.5)
            assert names_found(ring, "a", "b") == ["a", None]
        return [message.removeprefix(f"key file {file}: ") for message in errors(caplog)]

    kept = "; the keys read before stay valid"
    write(file, entry("b", rights=[]))
    assert after_seconds() == [
        f"entry 1 (b): rights: List should have at least 1 item after validation, not 0{kept}",
    ]
    file.unlink()
    assert after_seconds() == [f"it cannot be read: No such file or directory{kept}"]
    file.mkdir()
    assert after_seconds() == [f"it cannot be read: it is not a regular file{kept}"]
    file.rmdir()
    file.write_text(PASTED)
    assert after_seconds() == [f"it is not JSON, at line 1, column 1{kept}"]
    file.write_text(PASTED * 2)
    assert after_seconds() == [f"it is not JSON, at line 1, column 1{kept}"]
    write(file, entry("a"))
    assert after_seconds() == []
    assert PASTED not in caplog.text


def test_a_file_that_may_be_read_again_is_read(file: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mode says nothing of when it was written: what could not be read is tried each time."""
    ring = KeyRing(write(file, entry("a")), clock)
    write(file, entry("b"))
    with monkeypatch.context() as without:

        def refused(_path: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        without.setattr(keys, "read_keys", refused)
        clock.forward(1)
        assert names_found(ring, "a") == ["a"]
    clock.forward(1)
    assert names_found(ring, "a", "b") == [None, "b"]


# What is wrong with a file


BROKEN: dict[str, tuple[object, str]] = {
    "a list": ([entry("a")], "must be an object"),
    "no keys": ({}, "keys: Field required"),
    "keys that are no list": ({"keys": {PASTED: 1}}, "keys: Input should be a valid list"),
    "more than keys": ({"keys": [], PASTED: 1}, "has an unknown field; known are keys"),
    "no entry": ({"keys": [PASTED]}, "entry 1: must be an object"),
    "an unknown field": (
        {"keys": [entry("a"), entry("b", **{PASTED: PASTED})]},
        "entry 2 (b): has an unknown field; known are name, sha256, rights, adapters, requests_per_minute, queue_share",
    ),
    "a field's name of no text": (
        {"keys": [{**entry("a"), "\ud800": PASTED}]},
        "entry 1 (a): Input should be a valid*",
    ),
    "no name": ({"keys": [{"sha256": sha256("k")}]}, "entry 1: name: Field required"),
    "a name with a space": (
        {"keys": [entry("my key")]},
        "entry 1: name: must be 1 to 64 letters, digits, dots, underscores or hyphens",
    ),
    "a name too long": (
        {"keys": [entry("a" * 65)]},
        "entry 1: name: must be 1 to 64 letters, digits, dots, underscores or hyphens",
    ),
    "a line's end in a name": (
        {"keys": [entry("a\n")]},
        "entry 1: name: must be 1 to 64 letters, digits, dots, underscores or hyphens",
    ),
    "a name of no text": (
        {"keys": [{**entry("a"), "name": "\ud800"}]},
        "entry 1: name: must be 1 to 64*",
    ),
    "a key as name": ({"keys": [entry(PASTED)]}, "entry 1: name: must not look like a key or a hash"),
    "a hash as name": ({"keys": [entry(sha256("k"))]}, "entry 1: name: must not look like a key or a hash"),
    "no hash": ({"keys": [{"name": "a"}]}, "entry 1 (a): sha256: Field required"),
    "a key as hash": (
        {"keys": [entry("a", sha256=PASTED)]},
        "entry 1 (a): sha256: must be the 64 hexadecimal digits of the key's SHA-256",
    ),
    "a hash and more": (
        {"keys": [entry("a", sha256=sha256("k") + "0")]},
        "entry 1 (a): sha256: must be the 64 hexadecimal digits of the key's SHA-256",
    ),
    "the hash of nothing": (
        {"keys": [entry("a", sha256=EMPTY_HASH)]},
        "entry 1 (a): sha256: must not be the SHA-256 of nothing",
    ),
    "no right": (
        {"keys": [entry("a", rights=[])]},
        "entry 1 (a): rights: List should have at least 1 item after validation, not 0",
    ),
    "an unknown right": (
        {"keys": [entry("a", rights=["infer", PASTED])]},
        "entry 1 (a): rights.1: Input should be 'infer', 'admin' or 'metrics'",
    ),
    "a word for rights": ({"keys": [entry("a", rights=PASTED)]}, "entry 1 (a): rights: Input should be a valid list"),
    "an empty pattern": (
        {"keys": [entry("a", adapters=[""])]},
        "entry 1 (a): adapters.0: String should have at least 1 character",
    ),
    "a number for a pattern": (
        {"keys": [entry("a", adapters=["b", 7])]},
        "entry 1 (a): adapters.1: Input should be a valid string",
    ),
    "a rate of nothing": (
        {"keys": [entry("a", requests_per_minute=0)]},
        "entry 1 (a): requests_per_minute: Input should be greater than or equal to 1",
    ),
    "a rate in words": (
        {"keys": [entry("a", requests_per_minute="600")]},
        "entry 1 (a): requests_per_minute: Input should be a valid integer",
    ),
    "a share of nothing": (
        {"keys": [entry("a", queue_share=0)]},
        "entry 1 (a): queue_share: Input should be greater than 0",
    ),
    "a share of more than all": (
        {"keys": [entry("a", queue_share=1.5)]},
        "entry 1 (a): queue_share: Input should be less than or equal to 1",
    ),
    "a share of no number": (
        {"keys": [entry("a", queue_share=float("nan"))]},
        "entry 1 (a): queue_share: Input should be a finite number",
    ),
    "a name twice": (
        {"keys": [entry("a"), entry("b"), entry("a", sha256=sha256("k"))]},
        "entry 3 (a): name: is that of entry 1 too",
    ),
    "a hash twice": (
        {"keys": [entry("a"), entry("b", sha256=sha256("key of a").upper())]},
        "entry 2 (b): sha256: is that of entry 1 too",
    ),
    "all of it": (
        {"keys": [entry("a", rights=[PASTED]), {**entry("b"), "sha256": PASTED, "queue_share": 2}, entry("a")]},
        "entry 1 (a): rights.0: Input should be 'infer', 'admin' or 'metrics'; "
        "entry 2 (b): sha256: must be the 64 hexadecimal digits of the key's SHA-256; "
        "entry 2 (b): queue_share: Input should be less than or equal to 1; "
        "entry 3 (a): name: is that of entry 1 too; entry 3 (a): sha256: is that of entry 1 too",
    ),
}
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is not JSON, at line 1, column 1"),
    "a key": (PASTED.encode(), "it is not JSON, at line 1, column 1"),
    "half a file": (json.dumps({"keys": [entry("a")]})[:-3].encode(), "it is not JSON, at line 1, column *"),
    "no text": (b'{"keys": "\xff"}', "it is not UTF-8"),
    "brackets": (b"[" * 100_000, "it holds a number too long or is nested too deep"),
    "digits": (b"1" * 5000, "it holds a number too long or is nested too deep"),
    "a field twice": (b'{"keys": [], "keys": []}', "a field stands twice in one object"),
    "too much": (b" " * MAX_FILE_BYTES + b'{"keys": []}', f"it has more than {MAX_FILE_BYTES} bytes"),
}
CONTENTS = {
    **{name: (json.dumps(document).encode(), reason) for name, (document, reason) in BROKEN.items()},
    **UNREADABLE,
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_broken_file_is_refused_with_its_reasons_and_without_its_values(
    file: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    content, reason = CONTENTS[case]
    file.write_bytes(content)
    with pytest.raises(InvalidKeyFile) as raised:
        KeyRing(file)
    told = str(raised.value).removeprefix(f"key file {file}: ")
    assert fnmatchcase(told, reason)
    trace = "".join(traceback.format_exception(raised.value))
    for text in (told, trace, caplog.text):
        assert PASTED not in text
        assert not any(sha256(key) in text.lower() for key in ("k", "key of a", "key of b", ""))
    assert raised.value.__context__ is None  # what holds the values goes no further


def test_a_file_must_be_there_at_the_start(file: Path) -> None:
    with pytest.raises(InvalidKeyFile, match="it cannot be read: No such file or directory"):
        KeyRing(file)


def test_reasons_without_end_are_counted(file: Path) -> None:
    file.write_text(json.dumps({"keys": [1] * 1000}))
    with pytest.raises(InvalidKeyFile, match=r"entry 100: must be an object; and 900 more$"):
        KeyRing(file)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o400, 0), (0o640, 1), (0o644, 1), (0o602, 1)])
def test_a_file_that_others_may_read_is_warned_about_once(
    file: Path, clock: Clock, mode: int, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    write(file, entry("a")).chmod(mode)
    ring = KeyRing(file, clock)
    clock.forward(5)
    assert names_found(ring, "a") == ["a"]
    assert len(errors(caplog, logging.WARNING)) == warned
    assert caplog.text.count("others than its owner may read or write it") == warned


# Rates


def taken(ring: KeyRing, name: str, most: int = 1000) -> int:
    """How many requests of `name` are let through at once."""
    caller = ring.find(f"key of {name}")
    assert caller is not None
    for count in range(most):
        try:
            ring.take(caller)
        except RateExceeded:
            return count
    return most


def retry_after(ring: KeyRing, name: str) -> int:
    caller = ring.find(f"key of {name}")
    assert caller is not None
    with pytest.raises(RateExceeded) as raised:
        ring.take(caller)
    assert f"in {raised.value.retry_after_s} s" in str(raised.value)
    return raised.value.retry_after_s


@pytest.mark.parametrize(("rate", "wait_s"), [(1, 60), (7, 9), (40, 2), (60, 1), (600, 1)])
def test_one_minutes_worth_at_once_then_evenly(file: Path, clock: Clock, rate: int, wait_s: int) -> None:
    ring = KeyRing(write(file, entry("a", requests_per_minute=rate), entry("b", requests_per_minute=rate)), clock)
    assert taken(ring, "a") == rate
    assert retry_after(ring, "a") == wait_s  # what is refused costs nothing
    clock.forward(wait_s)
    assert taken(ring, "a") == rate * wait_s // 60
    assert taken(ring, "b") == rate  # each has a bucket of its own
    clock.forward(3600)
    assert taken(ring, "a") == rate  # and no more, however long


def test_retry_after_counts_down(file: Path, clock: Clock) -> None:
    ring = KeyRing(write(file, entry("a", requests_per_minute=2)), clock)
    assert taken(ring, "a") == 2
    for wait_s in (30, 20, 10, 1):
        clock.now = 1000.1 + 30 - wait_s
        assert retry_after(ring, "a") == wait_s
    clock.now = 1000.1 + 29.9
    assert retry_after(ring, "a") == 1
    clock.now = 1000.1 + 30
    assert taken(ring, "a") == 1


def test_who_has_no_rate_has_no_bucket(file: Path, clock: Clock) -> None:
    ring = KeyRing(write(file, entry("a")), clock)
    assert taken(ring, "a") == 1000
    for _ in range(1000):
        ring.take(ANYONE)


def test_buckets_outlive_a_new_file_follow_its_rates_and_go_with_their_names(file: Path, clock: Clock) -> None:
    ring = KeyRing(write(file, *(entry(name, requests_per_minute=60) for name in "abc")), clock)
    assert [taken(ring, name) for name in "abc"] == [60, 60, 60]
    assert taken(ring, "a") == 0
    write(file, entry("a", requests_per_minute=60, sha256=sha256("key of a")), entry("b", requests_per_minute=600))
    clock.forward(1)
    assert [taken(ring, "a"), taken(ring, "b")] == [1, 10]
    write(file, *(entry(name, requests_per_minute=60) for name in "abc"))
    clock.forward(1)
    assert [taken(ring, name) for name in "abc"] == [1, 1, 60]


# Making keys


def run(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, str, str]:
    status = main(["make-key", *map(str, flags)])
    return status, *capsys.readouterr()


def test_a_key_that_was_made_is_found(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, key, told = run(capsys, "--file", file, "--name", "team-a")
    assert status == 0
    assert key.startswith("ml-")
    assert len(key) == 47  # with the line's end
    assert key == key.strip() + "\n"
    assert key.strip() not in told + file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    flags = "--right infer --right admin --adapters team-b-* --adapters m --requests-per-minute 60 --queue-share 0.5"
    status, other, _ = run(capsys, "--file", file, "--name", "team-b", *flags.split())
    assert status == 0
    ring = KeyRing(file)
    assert ring.find(key.strip()) == Caller("team-a", frozenset({"infer"}))
    assert ring.find(other.strip()) == Caller("team-b", frozenset({"infer", "admin"}), ("team-b-*", "m"), 0.5, 60)
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--name", "a"], "there is a key named a already"),
        (["--name", "my key"], "entry 2: name: must be 1 to 64 letters, digits, dots, underscores or hyphens"),
        (["--name", PASTED], "entry 2: name: must not look like a key or a hash"),
        (["--name", "b", "--queue-share", "2"], "entry 2 (b): queue_share: Input should be less than or equal to 1"),
        (["--name", "b", "--queue-share", "nan"], "entry 2 (b): queue_share: Input should be a finite number"),
        (["--name", "b", "--requests-per-minute", "0"], "entry 2 (b): requests_per_minute: Input should be greater"),
        (["--name", "b", "--adapters", ""], "entry 2 (b): adapters.0: String should have at least 1 character"),
    ],
)
def test_what_would_break_the_file_is_refused(
    file: Path, flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write(file, entry("a")).read_bytes()
    status, out, told = run(capsys, "--file", file, *flags)
    assert (status, out) == (2, "")
    assert told.startswith(f"multilora: key file {file}: {reason}")
    assert told.count("\n") == 1
    assert PASTED not in told
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_no_key_is_added_to_a_broken_file_or_nowhere(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(PASTED)
    status, out, told = run(capsys, "--file", file, "--name", "a")
    assert (status, out) == (2, "")
    assert told == f"multilora: key file {file}: it is not JSON, at line 1, column 1\n"
    status, out, told = run(capsys, "--file", file.parent / "absent" / "keys.json", "--name", "a")
    assert (status, out) == (2, "")
    assert "No such file or directory" in told
    with pytest.raises(SystemExit) as left:
        run(capsys, "--file", file, "--name", "a", "--right", "everything")
    assert left.value.code == 2
    assert file.read_text() == PASTED


def test_two_do_not_add_keys_at_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write(file, entry("a")).with_name(".keys.json.new")
    other.touch()
    status, out, told = run(capsys, "--file", file, "--name", "b")
    assert (status, out) == (2, "")
    assert told == f"multilora: {other} is there: remove it, unless another key is being made just now\n"
    assert other.exists()
    other.unlink()
    assert run(capsys, "--file", file, "--name", "b")[0] == 0


def test_a_file_cut_off_in_writing_is_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write(file, entry("a")).read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as without:
        without.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            make_key(file, "b")
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_what_a_link_leads_to_is_replaced_and_keeps_its_owner(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(file, entry("a"))
    link = tmp_path / "link.json"
    link.symlink_to(file)
    owners: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda _descriptor, user, group: owners.append((user, group)))
    make_key(link, "b")
    assert link.is_symlink()
    assert names_found(KeyRing(file), "a") == ["a"]
    assert owners == [(file.stat().st_uid, file.stat().st_gid)]

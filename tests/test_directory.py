"""What lies in the operator's directory is told from its files' state, whatever half of it is there."""

from __future__ import annotations

import json
import os
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from adapters.checkpoint import CONFIG_FILE, LABELS_FILE, MAX_JSON_BYTES, MODEL_CONFIG_FILE, WEIGHTS_FILE
from adapters.directory import CHECKPOINT_FILES, scan, signature_of, unfinished
from adapters.tokenizer_files import TOKENIZER_FILES

WEIGHTS = save({"a": np.arange(12, dtype=np.float32), "b": np.ones((2, 3), dtype=np.float16)}, {"format": "pt"})
HEADER_END = 8 + int.from_bytes(WEIGHTS[:8], "little")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A complete one."""
    path = tmp_path / "root" / "one"
    path.mkdir(parents=True)
    (path / CONFIG_FILE).write_text('{"r": 4}')
    (path / WEIGHTS_FILE).write_bytes(WEIGHTS)
    return path


def with_header(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def test_the_files() -> None:
    assert set(CHECKPOINT_FILES) == {CONFIG_FILE, WEIGHTS_FILE, LABELS_FILE, MODEL_CONFIG_FILE, *TOKENIZER_FILES}


def test_a_signature_changes_with_each_file_and_only_with_those(checkpoint: Path) -> None:
    seen = [signature_of(checkpoint)]
    assert seen[0]
    (checkpoint / "README.md").write_text("a note")
    assert signature_of(checkpoint) == seen[0]
    for file in CHECKPOINT_FILES:
        (checkpoint / file).write_text("[0]")
        seen.append(signature_of(checkpoint))
        os.utime(checkpoint / file, ns=(1, 1))
        seen.append(signature_of(checkpoint))
        (checkpoint / "new").write_text("[1]")
        os.utime(checkpoint / "new", ns=(1, 1))
        (checkpoint / "new").replace(checkpoint / file)
        seen.append(signature_of(checkpoint))
    assert len(set(seen)) == len(seen) == 1 + 3 * len(CHECKPOINT_FILES)


def test_either_of_config_and_weights_makes_a_checkpoint(checkpoint: Path) -> None:
    (checkpoint / LABELS_FILE).write_text("[]")
    (checkpoint / MODEL_CONFIG_FILE).write_text("{}")
    both = signature_of(checkpoint)
    (checkpoint / CONFIG_FILE).rename(checkpoint / "aside")
    weights = signature_of(checkpoint)
    (checkpoint / WEIGHTS_FILE).unlink()
    assert signature_of(checkpoint) is None
    (checkpoint / "aside").rename(checkpoint / CONFIG_FILE)
    assert len({both, weights, signature_of(checkpoint)}) == 3
    assert signature_of(checkpoint / CONFIG_FILE) is None
    assert signature_of(checkpoint / "nothing" / "here") is None


def test_a_signature_follows_links(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / CONFIG_FILE).write_text("{}")
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    assert signature_of(link) == signature_of(checkpoint)
    link.unlink()
    link.symlink_to(other)
    assert signature_of(link) == signature_of(other) != signature_of(checkpoint)
    link.unlink()
    link.symlink_to(link)
    assert signature_of(link) is not None, "what cannot be read for now has not gone"
    assert unfinished(link)
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    assert signature_of(link) is None


def test_only_plain_files_count(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).mkdir()
    os.mkfifo(tmp_path / WEIGHTS_FILE)
    assert signature_of(tmp_path) is None
    assert unfinished(tmp_path) == f"{CONFIG_FILE} is missing"


def test_scan_finds_the_checkpoints(checkpoint: Path) -> None:
    root = checkpoint.parent
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("")
    (root / "link").symlink_to(checkpoint)
    for name in (".hidden", "weights-only"):
        (root / name).mkdir()
        (root / name / WEIGHTS_FILE).write_bytes(WEIGHTS)
    found = scan(root)
    assert found.keys() == {"one", "link", "weights-only"}
    assert all(signature == signature_of(root / name) for name, signature in found.items())
    with pytest.raises(FileNotFoundError):
        scan(root / "nothing")


def test_a_scan_survives_what_vanishes_meanwhile(checkpoint: Path) -> None:
    root, stop = checkpoint.parent, threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            checkpoint.rename(root / "two")
            (root / "two" / WEIGHTS_FILE).rename(root / "two" / "aside")
            (root / "two" / "aside").rename(root / "two" / WEIGHTS_FILE)
            (root / "two").rename(checkpoint)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(500):
            assert scan(root).keys() <= {"one", "two"}
            assert unfinished(checkpoint) in (
                None,
                f"{CONFIG_FILE} is missing",
                f"{WEIGHTS_FILE} is missing",
                "its files cannot be read: No such file or directory",
            )
    finally:
        stop.set()
        thread.join()


def test_a_complete_checkpoint_lacks_nothing(checkpoint: Path) -> None:
    assert unfinished(checkpoint) is None
    (checkpoint / LABELS_FILE).write_text('["a"]')
    (checkpoint / MODEL_CONFIG_FILE).write_text("not read where there are labels")
    assert unfinished(checkpoint) is None


def test_a_config_that_is_not_there_yet(checkpoint: Path) -> None:
    for text in ("", "{", '{"r": ', "\x00", "[" * 100_000):
        (checkpoint / CONFIG_FILE).write_text(text)
        assert str(unfinished(checkpoint)).startswith(f"{CONFIG_FILE} is not JSON: "), text[:9]
    (checkpoint / CONFIG_FILE).write_bytes(b'"\xff"')
    assert str(unfinished(checkpoint)).startswith(f"{CONFIG_FILE} is not JSON: ")
    (checkpoint / CONFIG_FILE).unlink()
    assert unfinished(checkpoint) == f"{CONFIG_FILE} is missing"


@pytest.mark.parametrize("file", [LABELS_FILE, MODEL_CONFIG_FILE])
def test_labels_that_are_half_there(checkpoint: Path, file: str) -> None:
    (checkpoint / file).write_text('{"id2label": {"0":')
    assert str(unfinished(checkpoint)).startswith(f"{file} is not JSON: ")


def test_weights_are_told_short_at_every_length(checkpoint: Path) -> None:
    for length in range(len(WEIGHTS)):
        (checkpoint / WEIGHTS_FILE).write_bytes(WEIGHTS[:length])
        if length < HEADER_END:
            expected = f"{WEIGHTS_FILE} ends within its header, after {length} bytes"
        else:
            expected = f"{WEIGHTS_FILE} has {length} of {len(WEIGHTS)} bytes"
        assert unfinished(checkpoint) == expected
    (checkpoint / WEIGHTS_FILE).unlink()
    assert unfinished(checkpoint) == f"{WEIGHTS_FILE} is missing"


def test_room_that_was_made_for_weights_is_not_weights(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS_FILE).write_bytes(bytes(len(WEIGHTS)))
    assert unfinished(checkpoint) == f"{WEIGHTS_FILE} has a header that is not JSON"
    (checkpoint / WEIGHTS_FILE).write_bytes(WEIGHTS[:8] + bytes(len(WEIGHTS) - 8))
    assert unfinished(checkpoint) == f"{WEIGHTS_FILE} has a header that is not JSON"
    (checkpoint / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    assert unfinished(checkpoint) == f"{WEIGHTS_FILE} claims a header of 100000001 bytes, at most 100000000 are read"


@pytest.mark.parametrize(
    "header", [[], 3, {"a": None}, {"a": {"data_offsets": "ab"}}, {"a": {"data_offsets": [0, int("9" * 4000)]}}]
)
def test_what_waiting_does_not_mend_is_left_to_the_reader(checkpoint: Path, header: Any) -> None:
    (checkpoint / WEIGHTS_FILE).write_bytes(with_header(header))
    assert unfinished(checkpoint) is None
    (checkpoint / CONFIG_FILE).write_bytes(b"[" * (MAX_JSON_BYTES + 1))
    assert unfinished(checkpoint) is None

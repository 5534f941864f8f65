"""Arena files: what is read from one is the checkpoint's adapter bit by bit, or nothing; bounded, private, repaired."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import random
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from adapters.adapter import Adapter, Limits
from adapters.arena import build_arena
from adapters.arena_files import ArenaFiles
from adapters.checkpoint import read_checkpoint
from adapters.layout import BaseLayout
from tests.adapters_support import adapter_of, random_pair
from tests.exactness.test_checkpoint_matrix import KINDS, pytestmark, save_base, save_checkpoint
from tests.support import Runner, Spec, live_server, make_adapter, random_ids, service_for

__all__ = ["pytestmark"]
PLENTY = 1 << 30


def content(number: int, d_in: int = 24) -> Adapter:
    adapter = adapter_of({"layer": random_pair(number, d_in, 10, 3)}, digest=f"digest-{number}")
    arena = build_arena(adapter.pairs)
    return dataclasses.replace(adapter, pairs=arena.pairs, memory=arena.memory)


@pytest.fixture
def files(tmp_path: Path) -> ArenaFiles:
    return ArenaFiles(tmp_path, PLENTY)


def bits(part: Tensor) -> Tensor:
    return part.contiguous().view(-1).view(torch.uint8)


def assert_same(one: Any, other: Any) -> None:
    """In every bit of every part; tensors also in how they lie."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(bits(one), bits(other))
    elif dataclasses.is_dataclass(one):
        for item in dataclasses.fields(one):
            if item.name != "loaded_in_s":
                assert_same(getattr(one, item.name), getattr(other, item.name))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same(one[name], other[name])
    else:
        assert one == other


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[BaseLayout, dict[str, Path]]]:
    """By base: its layout and its checkpoints."""

    def save(base: str) -> tuple[BaseLayout, dict[str, Path]]:
        folder = tmp_path_factory.mktemp(base)
        location = save_base(base, folder / "base")
        layout = Runner(location).base.layout
        return layout, {spec.name: save_checkpoint(location, folder, spec) for spec in KINDS[base]}

    return cache(save)


@pytest.mark.parametrize("lora_dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("base", KINDS)
def test_every_kind_of_checkpoint_comes_back_as_it_was(
    base: str, lora_dtype: str, files: ArenaFiles, saved: Callable[[str], tuple[BaseLayout, dict[str, Path]]]
) -> None:
    layout, checkpoints = saved(base)
    limits = Limits(lora_dtype=lora_dtype)
    left_out = set()
    for spec in KINDS[base]:
        adapter = read_checkpoint(checkpoints[spec.name], layout, limits)
        files.write(adapter)
        again = files.read(adapter.info)
        if again is None:
            left_out.add(spec.name)
            assert "use_dora" in spec.options
            continue
        assert_same(again, adapter)
        assert again.memory is not adapter.memory
        tokens, held = adapter.tokens, again.tokens
        if tokens is not None and held is not None:
            assert (held.embedding is held.output) == (tokens.embedding is tokens.output)
    assert left_out == {spec.name for spec in KINDS[base] if "use_dora" in spec.options}
    assert files.reads == len(KINDS[base]) - len(left_out) > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_parts_without_numbers_come_back_too(rank: int, files: ArenaFiles) -> None:
    """Their address says nothing."""
    arena = build_arena({"one": random_pair(1, 24, 10, 3), "other": random_pair(2, 5, 1, rank)})
    adapter = dataclasses.replace(content(1), pairs=arena.pairs, memory=arena.memory)
    files.write(adapter)
    assert_same(files.read(adapter.info), adapter)


def test_what_lies_elsewhere_is_not_taken_for_a_part_of_the_arena(files: ArenaFiles, tmp_path: Path) -> None:
    adapter = dataclasses.replace(content(1), pairs=content(2).pairs)
    with pytest.raises(AssertionError):
        files.write(adapter)
    assert list(tmp_path.iterdir()) == []


def flip(position: int) -> Callable[[Path], object]:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[position] ^= 1 << position % 8
        file.write_bytes(data)

    return damage


def turn_into_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "shortened by one byte": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer by one byte": lambda file: file.write_bytes(file.read_bytes() + b" "),
    "empty": lambda file: file.write_bytes(b""),
    "of zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "another's": lambda file: file.write_bytes(file.with_name("digest-2").read_bytes()),
    "gone": lambda file: file.unlink(),
    "a directory": turn_into_a_directory,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_told_not_served_and_written_again(
    damage: str, files: ArenaFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = content(1)
    files.write(adapter)
    files.write(content(2))
    DAMAGE[damage](tmp_path / "digest-1")
    assert files.read(adapter.info) is None
    assert "the arena file of digest-1 is lost, its checkpoint is read" in caplog.text
    if damage == "a directory":
        (tmp_path / "digest-1").rmdir()
    files.write(adapter)
    assert_same(files.read(adapter.info), adapter)


def test_no_byte_can_change_unseen(files: ArenaFiles, tmp_path: Path) -> None:
    adapter = content(1)
    files.write(adapter)
    size = (tmp_path / "digest-1").stat().st_size
    for position in range(size):
        files.write(adapter)
        flip(position)(tmp_path / "digest-1")
        assert files.read(adapter.info) is None, position
    assert files.reads == 0
    assert files.num_bytes == 0


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    files = ArenaFiles(tmp_path, PLENTY)
    adapters = [content(number) for number in range(4)]
    files.write(adapters[0])
    room_for_three = ArenaFiles(tmp_path, 3 * files.num_bytes)
    for adapter in adapters[:3]:
        room_for_three.write(adapter)
    assert room_for_three.read(adapters[0].info) is not None
    room_for_three.write(adapters[3])
    assert {path.name for path in tmp_path.iterdir()} == {"digest-0", "digest-2", "digest-3"}
    assert room_for_three.read(adapters[1].info) is None
    assert room_for_three.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir()) == 3 * files.num_bytes


def test_what_is_larger_than_all_may_be_moves_nothing(tmp_path: Path) -> None:
    files = ArenaFiles(tmp_path, 4096)
    files.write(content(1))
    files.write(content(2, d_in=4096))
    assert {path.name for path in tmp_path.iterdir()} == {"digest-1"}


def test_a_full_disk_is_told_once_and_hinders_nothing(
    files: ArenaFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    adapter = content(1)
    for _ in range(2):
        (tmp_path / "digest-1").symlink_to("/dev/full")
        files.write(adapter)
        assert files.read(adapter.info) is None
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "no arena file is written, checkpoints are read again: [Errno 28] No space left on device"
    ]
    files.write(adapter)
    assert_same(files.read(adapter.info), adapter)


def test_some_of_the_disk_is_left_to_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = ArenaFiles(tmp_path, PLENTY, spare_bytes=1 << 60)
    files.write(content(1))
    assert list(tmp_path.iterdir()) == []
    assert "No space left" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="has other rights")
def test_only_the_owner_may_read_them(files: ArenaFiles, tmp_path: Path) -> None:
    files.write(content(1))
    assert stat.S_IMODE((tmp_path / "digest-1").stat().st_mode) == 0o600


def test_those_that_are_not_wanted_are_removed(files: ArenaFiles, tmp_path: Path) -> None:
    for number in range(3):
        files.write(content(number))
    files.keep(lambda digest: digest == "digest-1")
    assert {path.name for path in tmp_path.iterdir()} == {"digest-1"}
    assert files.read(content(0).info) is None


def test_magnitudes_that_a_slot_changes_in_place_are_left_to_the_checkpoint(files: ArenaFiles, tmp_path: Path) -> None:
    pair = random_pair(1, 24, 10, 3)
    pair.magnitude = torch.ones(10)
    arena = build_arena({"layer": pair})
    files.write(dataclasses.replace(content(1), pairs=arena.pairs, memory=arena.memory))
    assert list(tmp_path.iterdir()) == []


def test_many_threads_get_the_right_adapter_or_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapters = [content(number) for number in range(6)]
    files = ArenaFiles(tmp_path, PLENTY)
    files.write(adapters[0])
    files = ArenaFiles(tmp_path, 3 * files.num_bytes)
    counter = itertools.count()

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            adapter = rng.choice(adapters)
            found = files.read(adapter.info)
            if found is None:
                files.write(adapter)
            else:
                next(counter)
                assert_same(found, adapter)
            if rng.random() < 0.05:
                files.keep(lambda _: rng.random() < 0.5)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(4)))
    assert files.reads == next(counter) > 100
    assert files.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert "damaged" not in caplog.text


def test_what_another_thread_has_just_written_is_not_written_again(
    files: ArenaFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file would be short for who reads it meanwhile."""
    adapter, other = content(1), ThreadPoolExecutor(1)

    def overtaken(given: Adapter) -> bool:
        monkeypatch.undo()
        other.submit(files.write, given).result()
        os.utime(tmp_path / "digest-1", ns=(1, 1))  # a sign
        return True

    monkeypatch.setattr("adapters.arena_files.can_be_mapped", overtaken)
    files.write(adapter)
    other.shutdown()
    assert (tmp_path / "digest-1").stat().st_mtime_ns == 1
    assert_same(files.read(adapter.info), adapter)


def test_a_server_answers_from_arena_files_as_from_checkpoints(base_location: dict[str, str], tmp_path: Path) -> None:
    location = base_location["tiny-llama"]
    for spec in (
        Spec("a", "CAUSAL_LM", 4, ["q_proj", "down_proj"]),
        Spec("b", "CAUSAL_LM", 2, ["v_proj"], options={"use_dora": True}),
        Spec("c", "CAUSAL_LM", 8, ["q_proj"], options={"modules_to_save": ["lm_head"]}),
    ):
        make_adapter(location, tmp_path, spec)
    service = service_for(location, "base", adapter_dir=str(tmp_path), max_loras=1, max_cpu_loras=1)
    rounds = 5
    with live_server(service) as live, httpx.Client(base_url=live.url, timeout=60) as client:
        answers = [[complete(client, name) for name in "abc"] for _ in range(rounds)]
        metrics = client.get("/metrics").text
        arenas = service.registry.host.arenas
        assert arenas is not None
        assert arenas.reads >= rounds - 2, "of a and c, from the third reading on, but for one that was passed over"
        assert f"multilora:lora_arena_loads_total {arenas.reads:.1f}" in metrics
        scratch = service.lifecycle.catalog.store.scratch
    assert all(each == answers[0] for each in answers)
    assert len({str(answer) for answer in answers[0]}) == len(answers[0])
    assert not scratch.exists()


def complete(client: httpx.Client, name: str) -> Any:
    """What is generated, with log-probabilities."""
    asked = {"model": name, "prompt": random_ids(12, 3), "max_tokens": 4, "temperature": 0, "logprobs": 3}
    (choice,) = client.post("/v1/completions", json=asked).raise_for_status().json()["choices"]
    return choice["text"], choice["logprobs"]


def test_without_room_for_arena_files_there_are_none(base_location: dict[str, str]) -> None:
    with live_server(service_for(base_location["tiny-llama"], "base", arena_cache_bytes=0)) as live:
        assert live.service.registry.host.arenas is None

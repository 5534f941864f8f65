"""Memory that costs nothing until it is used; files whose pages are let go of."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import memory
from adapters.memory import MappedFiles, give_back, lazy_zeros
from tests.adapters_support import resident_bytes_of

CPU = torch.device("cpu")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5, 2)])
def test_zeros_of_any_shape_that_can_be_written(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = lazy_zeros(shape, dtype, CPU)
    assert torch.equal(tensor, torch.zeros(shape, dtype=dtype))
    assert tensor.data_ptr() % 64 == 0
    tensor += 1
    assert torch.equal(tensor, torch.ones(shape, dtype=dtype))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_what_is_touched_is_paid_for() -> None:
    before = resident_bytes()
    tensor = lazy_zeros((1024, 1 << 18), torch.float32, CPU)
    assert tensor.nbytes == 1 << 30
    assert resident_bytes() - before < 1 << 27
    tensor[5] = 1.0
    assert resident_bytes() - before < 1 << 27
    assert float(tensor[5].sum()) == 1 << 18


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_tensor_of_a_mapped_file_is_let_go_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    saved = {name: torch.rand(512, 1024) for name in "ab"}
    save_file(saved, file)
    loaded = load_file(file)
    assert all(torch.equal(loaded[name], saved[name]) for name in "ab")
    before = resident_bytes_of(file)
    assert before >= 2 * saved["a"].nbytes
    MappedFiles().leave(loaded["a"])
    assert before - resident_bytes_of(file) >= saved["a"].nbytes - 2 * mmap.PAGESIZE
    MappedFiles().leave(loaded["b"][:, :8])  # not contiguous
    assert resident_bytes_of(file) >= saved["b"].nbytes
    assert all(torch.equal(loaded[name], saved[name]) for name in "ab")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_stands_in_no_file_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(512, 1024)}, file)
    changed = load_file(file)["a"]
    changed[7, 7] = 5.0
    allocated, mapped = torch.ones(512, 1024), lazy_zeros((512, 1024), torch.float32, CPU) + 1
    files = MappedFiles()
    for tensor in (changed, allocated, mapped, torch.empty(0), torch.ones(3)):
        files.leave(tensor)
    assert float(changed.sum()) == 5.0
    assert bool((allocated == 1).all())
    assert bool((mapped == 1).all())


def told(*mappings: tuple[int, int, str, str, int, int]) -> bytes:
    """smaps of mappings: first address, last one, rights, path, kB written to that are in memory, and swapped out."""
    return "".join(
        f"{first:x}-{last:x} {rights} 00001000 08:01 7    {path}\nRss: 4 kB\nAnonymous: {here} kB\nSwap: {away} kB\n"
        f"SwapPss: 0 kB\nVmFlags: rd mr\n"
        for first, last, rights, path, here, away in mappings
    ).encode("utf-8", "surrogateescape")


class Telling:
    """Stands for smaps that change from one reading to the next."""

    def __init__(self, *texts: bytes) -> None:
        self._texts = [*texts]

    def read_bytes(self) -> bytes:
        return self._texts.pop(0)


def written(count: int = 4) -> tuple[Tensor, int, int]:
    """Pages of ones that stand in no file, and their addresses."""
    tensor = lazy_zeros((count * mmap.PAGESIZE,), torch.uint8, CPU)
    tensor += 1
    return tensor, tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux has them")
@pytest.mark.parametrize(("here", "away", "kept"), [(0, 0, False), (4, 0, True), (0, 4, True)])
def test_what_was_written_to_and_swapped_out_is_kept(
    here: int, away: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (library, first, last), (mapped, start, end) = written(), written()
    smaps = tmp_path / "smaps"
    smaps.write_bytes(
        told((first, last, "r-xp", "/lib/some.so", here, away), (start, end, "r--p", "/some.bin", here, away))
    )
    MappedFiles(smaps).leave(mapped)
    assert bool((mapped == 1).all()) == kept
    monkeypatch.setattr(memory, "SMAPS", smaps)
    give_back()
    assert bool((library == 1).all()) == kept


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux has them")
def test_a_library_that_another_thread_loads_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is mapped whole, then its data are mapped over that and written to."""
    tensor, first, last = written()
    middle = first + 2 * mmap.PAGESIZE
    whole = told((first, last, "r-xp", "/lib/some.so", 0, 0))
    parts = told((first, middle, "r-xp", "/lib/some.so", 0, 0), (middle, last, "rw-p", "/lib/some.so", 8, 0))
    monkeypatch.setattr(memory, "SMAPS", Telling(whole, parts))
    give_back()
    assert bool((tensor == 1).all())


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux has them")
@pytest.mark.parametrize("name", ["with spaces", "\x0b\x0c\x1c\x85\u2028 0-1", "\udcff\udcfe", "a\rb"])
def test_files_may_have_any_name(name: str, tmp_path: Path) -> None:
    tensor, first, last = written()
    smaps = tmp_path / "smaps"
    smaps.write_bytes(told((0, 1, "r--p", f"/{name}", 0, 0), (first, last, "r--p", f"/{name}", 0, 0)))
    MappedFiles(smaps).leave(tensor)
    assert bool((tensor == 0).all())


def test_where_the_system_tells_nothing_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, *_ = written()
    MappedFiles(tmp_path / "smaps").leave(tensor)
    monkeypatch.setattr(memory, "SMAPS", tmp_path / "smaps")
    give_back()
    assert bool((tensor == 1).all())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_only_loading_read_of_libraries_is_given_back() -> None:
    """What was written to stays: numbers, and the libraries themselves, which go on computing."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():
        pytest.skip("torch lies in no library of that name here")
    product = torch.rand(300, 300) @ torch.rand(300, 300)
    kept, before = product.clone(), resident_bytes_of(library)
    give_back()
    assert resident_bytes_of(library) < before / 2
    assert torch.equal(product, kept)
    assert torch.equal(torch.eye(300) @ kept, kept)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_read_of_other_files_is_kept(tmp_path: Path) -> None:
    """Another thread may unmap one meanwhile, and have memory of its own at its addresses."""
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(512, 1024)}, file)
    loaded = load_file(file)["a"]
    assert float(loaded.sum()) == 0.0
    before = resident_bytes_of(file)
    give_back()
    assert resident_bytes_of(file) == before >= loaded.nbytes


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's")
def test_what_malloc_keeps_is_given_back() -> None:
    blocks = [torch.ones(1 << 14) for _ in range(1024)]  # 64 KB each: too small to be mapped apart
    kept = blocks[::64]
    del blocks
    before = resident_bytes()
    give_back()
    assert before - resident_bytes() > 1 << 25
    assert all(bool((block == 1).all()) for block in kept)

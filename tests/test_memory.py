"""Memory that costs nothing until it is used; files whose pages are let go of."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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

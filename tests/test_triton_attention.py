"""Attention in Triton equals that by torch operations in Triton's interpreter, and compiles for every GPU meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from server.config import ServerConfig
from server.engine import engine as engine_module
from server.engine.attention import Rope, Rule, Span
from server.engine.base_model import load_base
from server.engine.engine import Engine
from server.engine.request import CAUSAL_LM, FEATURE_EXTRACTION
from server.engine.torch_attention import TorchAttention
from tests.support import Runner, random_ids
from tests.triton_support import ARCHS, Case, compile_cases, interpreted

triton = pytest.importorskip("triton")

KERNELS, LAUNCHER = "server.engine.triton_attention_kernel", "server.engine.triton_attention"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
CPU = torch.device("cpu")
TOLERANCE = {FP32: 1e-5, FP16: 2e-3, BF16: 1.6e-2}
"""max |kernel − fp32 torch| / max |fp32 torch|: two last places of the dtype."""
RULES = {
    "causal": Rule(0.3, True),
    "window": Rule(0.3, True, window=5),
    "softcap": Rule(0.3, True, softcap=2.0),
    "softcap and window": Rule(0.3, True, window=3, softcap=2.0),
}
BOTH_WAYS = {"both ways": Rule(0.3, False), "both ways, window": Rule(0.3, False, window=4)}


@pytest.fixture(scope="module")
def triton_attention() -> Iterator[ModuleType]:
    with interpreted(KERNELS, LAUNCHER) as module:
        yield module


def rows(tokens: int, heads: int, d: int, seed: int) -> Tensor:
    return torch.randn(tokens, heads, d, generator=torch.Generator().manual_seed(seed))


def steps(block_size: int) -> list[list[Span]]:
    """Three sequences with pages, out of order, and two without, over four packed rows."""
    lengths = (40, 9, 23)
    pages, free = [], list(range(1 + sum(-(-n // block_size) for n in lengths), 0, -1))
    for n in lengths:
        pages.append([free.pop((7 * i) % len(free)) for i in range(-(-n // block_size))])
    a, b, c = pages
    return [
        [Span(0, 18, 0, a), Span(18, 24, 0, None), Span(24, 25, 0, b)],
        [Span(0, 7, 0, None), Span(7, 8, 18, a), Span(8, 15, 1, b), Span(15, 35, 0, c)],
        [Span(0, 20, 19, a), Span(20, 21, 8, b), Span(21, 22, 20, c)],
        [Span(0, 1, 39, a), Span(1, 2, 21, c)],
    ]


def run(
    backend: Any,
    rule: Rule,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    block_size: int,
    device: torch.device = CPU,
) -> list[Tensor]:
    """The outputs of `steps`, on the CPU."""
    heads, kv_heads, d, v_d = shape
    outputs = []
    for step, spans in enumerate(steps(block_size)):
        n = spans[-1].end
        shapes = ((heads, d), (kv_heads, d), (kv_heads, v_d))
        # multiples of 1/16, which every dtype holds
        made = ((rows(n, *one, seed=10 * i + step) * 16).round() / 16 for i, one in enumerate(shapes))
        q, k, v = (tensor.to(device, dtype) for tensor in made)
        out = backend.attend(0, q, k, v, rule, backend.context(spans, device), None)
        outputs.append(out.float().cpu())
    return outputs


def assert_equal(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= TOLERANCE[dtype] * float(b.abs().max())


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
def test_equals_torch_attention(triton_attention: ModuleType, dtype: torch.dtype, rule: Rule) -> None:
    shape = (6, 2, 16, 16)
    got = run(triton_attention.TritonAttention(80, 4), rule, shape, dtype, 4)
    assert_equal(got, run(TorchAttention(80, 4), rule, shape, FP32, 4), dtype)


@pytest.mark.parametrize("shape", [(4, 4, 24, 24), (5, 1, 8, 40), (9, 3, 64, 64)], ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_any_shape_and_page_size(
    triton_attention: ModuleType, shape: tuple[int, int, int, int], block_size: int
) -> None:
    got = run(triton_attention.TritonAttention(80, block_size), RULES["window"], shape, FP32, block_size)
    assert_equal(got, run(TorchAttention(80, block_size), RULES["window"], shape, FP32, block_size), FP32)


@pytest.mark.parametrize("rule", BOTH_WAYS.values(), ids=BOTH_WAYS)
def test_encoders_see_both_ways(triton_attention: ModuleType, rule: Rule) -> None:
    spans = [Span(0, 20, 0, None), Span(20, 21, 0, None), Span(21, 90, 0, None)]
    q, k, v = (rows(90, 4, 16, seed) for seed in range(3))
    outputs = []
    for backend in (triton_attention.TritonAttention(1, 16), TorchAttention(1, 16)):
        outputs.append(backend.attend(None, q, k, v, rule, backend.context(spans, CPU), None))
    assert_equal(outputs[:1], outputs[1:], FP32)


def test_nothing_is_read_that_was_not_written(triton_attention: ModuleType) -> None:
    """Pages are handed out as they were left, with NaN in them."""
    backend, shape = triton_attention.TritonAttention(80, 4), (6, 2, 16, 16)
    expected = run(backend, RULES["causal"], shape, FP32, 4)
    for tensor in (*backend.pages.keys.values(), *backend.pages.values.values()):
        tensor.fill_(float("nan"))
    assert_equal(run(backend, RULES["causal"], shape, FP32, 4), expected, FP32)


def test_neighbours_change_no_bit_and_their_nan_stays_theirs(triton_attention: ModuleType) -> None:
    q, k, v = rows(30, 6, 16, 0), rows(30, 2, 16, 1), rows(30, 2, 16, 2)
    span = Span(0, 20, 0, [2, 1])
    alone = triton_attention.TritonAttention(4, 16)
    expected = alone.attend(0, q[:20], k[:20], v[:20], RULES["causal"], alone.context([span], CPU), None)
    backend = triton_attention.TritonAttention(4, 16)
    k[25:] = float("nan")
    got = backend.attend(
        0, q, k, v, RULES["causal"], backend.context([span, Span(20, 30, 0, [3])], CPU), None
    )  # fmt: skip
    assert torch.equal(got[:20], expected)
    assert bool(got[25:].isnan().all())


def test_strided_rows_and_rotation(triton_attention: ModuleType) -> None:
    wide = rows(24, 10, 16, 3)
    q, k, v = wide[:, :6], wide[:, 6:8], wide[:, 8:]
    angles = torch.arange(24.0)[:, None] * torch.rand(8, generator=torch.Generator().manual_seed(1)).repeat(2)
    rope = Rope(angles.cos(), angles.sin())
    spans = [Span(0, 24, 0, [0, 1])]
    outputs = []
    for backend in (triton_attention.TritonAttention(2, 16), TorchAttention(2, 16)):
        outputs.append(backend.attend(0, q, k, v, RULES["causal"], backend.context(spans, CPU), rope))
    assert_equal(outputs[:1], outputs[1:], FP32)


def test_tiles_cover_each_span_once(triton_attention: ModuleType) -> None:
    spans = [Span(0, 1, 4, [7, 8]), Span(1, 36, 0, None), Span(36, 53, 3, [9, 5]), Span(53, 54, 0, [6])]
    kinds, pages = triton_attention.cut(spans)
    assert pages == [7, 8, 9, 5, 6]
    assert kinds == {
        (True, 1): [(0, 1, 4, 5, 0), (53, 1, 0, 1, 4)],
        (False, 16): [(1, 16, 0, 35, 1), (17, 16, 16, 35, 1), (33, 3, 32, 35, 1)],
        (True, 16): [(36, 16, 3, 20, 2), (52, 1, 19, 20, 2)],
    }
    context = triton_attention.TritonAttention(10, 16).context(spans, CPU)
    assert all(tiles.table.dtype == torch.int32 and tiles.table.data_ptr() % 16 == 0 for tiles in context.tiles)


def test_a_whole_engine_with_it(
    triton_attention: ModuleType, base_location: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-test passes, and generation and embedding in one batch give what they give by torch."""
    results = []
    for backend in (triton_attention.TritonAttention, TorchAttention):
        monkeypatch.setattr(engine_module, "_attention", lambda config, *_, kind=backend: kind(20, config.block_size))
        runner = Runner(base_location["tiny-llama"], kernel="torch", kv_cache_bytes=1 << 20)
        assert isinstance(runner.engine.cache.backend, backend)
        rows = [runner.submit(CAUSAL_LM, random_ids(n, n), None) for n in (3, 20)]
        embedded = runner.submit(FEATURE_EXTRACTION, random_ids(9, 1))
        runner.drain()
        results.append(([row.output_ids for row in rows], torch.from_numpy(runner.values(embedded))))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1])


def test_a_16_bit_engine_with_it(
    triton_attention: ModuleType, base_location: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_attention", lambda config, *_: triton_attention.TritonAttention(20, 16))
    base = load_base(base_location["tiny-llama"], CPU, "bfloat16")
    engine = Engine(ServerConfig(max_loras=2, kv_cache_bytes=1 << 20), base, "base")
    assert engine.base.dtype == BF16
    assert isinstance(engine.cache.backend, triton_attention.TritonAttention)
    heads, d = 2, 16  # keys and values of three layers, two bytes each
    assert engine.cache.backend.bytes_per_block == 16 * heads * d * 2 * 2 * 3


def most_shared_kb(arch: int, dtype: torch.dtype, d: int) -> int:
    """What a program may have: 99 on sm_86 (which runs code for sm_80), 163 on sm_80, 227 from sm_90 on.

    Heads of 256 are not for sm_86, and in fp32, eight to a key, not for sm_80 either.
    """
    if arch > 80 or (dtype == FP32 and d > 128):
        return 227
    return 99 if dtype != FP32 and d <= 128 else 163


class Launch:
    """Stands for a kernel and keeps what it was launched with."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: object) -> Launch:
        return self

    def __call__(self, *args: Any, **constants: Any) -> None:
        self.calls.append((args, constants))


def compile_all() -> None:
    """The kernel as it would be launched × dtype × rule × GPU; prints a JSON list of what came out. Not interpreted."""
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    import server.engine.triton_attention as module

    cases = []
    kernel: Any = vars(module)["attend_kernel"]
    for dtype, (rule, d) in product(TOLERANCE, ((RULES["causal"], 128), (RULES["softcap and window"], 256))):
        launch = Launch()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "attend_kernel", launch)
            run(module.TritonAttention(80, 16), rule, (16, 2, d, d), dtype, 16)
        variants = {json.dumps(constants, default=str): (args, constants) for args, constants in launch.calls}
        for args, constants in variants.values():
            given = dict(zip(kernel.arg_names, args, strict=False)) | constants
            signature = {n: "constexpr" if n in constants else mangle_type(given[n]) for n in kernel.arg_names}
            aligned: dict[tuple[int, ...], list[list[Any]]] = {
                (i,): [["tt.divisibility", 16]]
                for i, n in enumerate(kernel.arg_names)
                if n not in constants
                and not isinstance(given[n], float)
                and (given[n].data_ptr() if isinstance(given[n], Tensor) else given[n]) % 16 == 0
            }
            source = ASTSource(kernel, signature, constants, aligned)
            for arch in ARCHS:
                known = {
                    "case": f"sm_{arch} {dtype} {constants}",
                    "most_shared_kb": most_shared_kb(arch, dtype, d),
                    "expected": dtype != FP32,
                }
                cases.append(Case(source, arch, known))
    sys.stdout.write(json.dumps(compile_cases(cases, seen)))


def seen(compiled: Any) -> dict[str, Any]:
    return {
        "cubin": compiled.asm["cubin"][:4].decode("latin1"),
        "tensor_cores": "mma" in compiled.asm["ptx"],
        "tf32": "tf32" in compiled.asm["ptx"],
        "shared_bytes": compiled.metadata.shared,
    }


def test_it_compiles_ahead_of_time(tmp_path: Path) -> None:
    """In a process of its own: here the kernel is the interpreter's."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from tests.test_triton_attention import compile_all; compile_all()"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 3 * 2 * 3 * 3
    for result in results:
        case = result["case"]
        assert result["cubin"] == "\x7fELF", case
        assert result["tensor_cores"] == result["expected"], case
        assert not result["tf32"], case
        assert result["shared_bytes"] <= result["most_shared_kb"] << 10, case

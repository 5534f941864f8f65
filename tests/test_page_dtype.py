"""The KV cache in other dtypes than the base's: chosen at start, told, and near to exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters.kernels.library import Library
from server.config import ServerConfig
from server.engine.attention import Span
from server.engine.base_model import UnsupportedBase
from server.engine.engine import Engine
from server.engine.native_attention import NativeAttention
from server.engine.request import CAUSAL_LM, Batch, SamplingParams, ScheduledSequence, Sequence
from tests.bases import DECODERS, ENCODER_DECODERS, ENCODERS
from tests.support import Runner, random_ids

SMALL = ServerConfig(kv_cache_bytes=1 << 20, max_loras=2, max_lora_rank=4)
LLAMA = next(base for base in DECODERS if base.name == "Llama")
HALF, BRAIN = torch.float16, torch.bfloat16
ROUNDED = {HALF: 4e-3, BRAIN: 3e-2}
"""How far the logits of these small bases may be from exact ones, of their size: some units of the dtype's rounding."""


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch, library: Library) -> Library:
    """Each object of the CPU kernels."""
    monkeypatch.setattr("server.engine.engine.load_library", lambda: library)
    monkeypatch.setattr("adapters.kernels.load_library", lambda: library)
    return library


def engine_of(**settings: Any) -> Engine:
    return Engine(replace(SMALL, **settings), LLAMA.wrap(), "base")


@torch.inference_mode()
def logits_in(engine: Engine, chunks: tuple[int, ...]) -> torch.Tensor:
    """Of every token of one prompt that comes in `chunks`, over pages."""
    sequence = Sequence(0, CAUSAL_LM, random_ids(sum(chunks), 5, 99), None)
    sequence.pages = [3, 0, 2]
    parts, start = [], 0
    for count in chunks:
        item = ScheduledSequence(sequence, start, count, -1)
        _, logits = engine.runner.forward(Batch((item,)), [Span(0, count, start, sequence.pages)], range(count))
        assert logits is not None
        parts.append(logits.clone())
        start += count
    return torch.cat(parts)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", ROUNDED)
def test_logits_differ_by_little_and_not_by_chunks(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    name = str(dtype).removeprefix("torch.")
    exact, rounded = engine_of(), engine_of(kv_cache_dtype=name)
    assert f"keys and values are held in {name}: hidden states differ by" in caplog.text
    assert "tokens may differ" in caplog.text
    assert "quantised" not in caplog.text
    at_once = logits_in(rounded, (40,))
    assert 1e-6 < difference(at_once, logits_in(exact, (40,))) < ROUNDED[dtype]
    for chunks in ((1,) * 40, (7, 1, 32), (16, 16, 8)):
        assert difference(logits_in(rounded, chunks), at_once) < ROUNDED[dtype] / 10
    assert difference(logits_in(exact, (7, 1, 32)), logits_in(exact, (40,))) < 1e-5


def test_exact_by_itself_and_float16_with_quantised_weights(native: Library, caplog: pytest.LogCaptureFixture) -> None:
    exact = engine_of()
    assert (exact.page_dtype, caplog.text) == (torch.float32, "")
    assert engine_of(kv_cache_dtype="float32").page_dtype == torch.float32
    for mode in ("int8", "int8-dynamic"):
        caplog.clear()
        engine = engine_of(quantize=mode)
        assert engine.page_dtype == HALF
        text = f"weights are quantised ({mode}), keys and values are held in float16: hidden states differ by"
        assert text in caplog.text
    caplog.clear()
    engine = engine_of(quantize="int8", kv_cache_dtype="float32")
    assert engine.page_dtype == torch.float32
    assert "weights are quantised (int8): hidden states differ by" in caplog.text


def test_half_the_bytes_are_twice_the_pages() -> None:
    small = {"kv_cache_bytes": 1 << 15}
    exact, rounded = engine_of(**small), engine_of(**small, kv_cache_dtype="float16")
    assert exact.cache.bytes_per_block == 2 * rounded.cache.bytes_per_block
    assert rounded.scheduler.blocks.num_blocks == 2 * exact.scheduler.blocks.num_blocks
    assert isinstance(rounded.cache.backend, NativeAttention)
    logits_in(rounded, (40,))
    state = rounded.cache.backend._layers[1]
    assert state.keys is not None
    assert state.values is not None
    assert (state.keys.dtype, state.values.dtype) == (HALF, HALF)
    assert len(state.keys) == rounded.scheduler.blocks.num_blocks


@pytest.mark.parametrize("base", DECODERS, ids=lambda base: base.name)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_decoder_takes_it(name: str, base: Any, caplog: pytest.LogCaptureFixture) -> None:
    Engine(replace(SMALL, kv_cache_dtype=name), base.wrap(), "base")
    told = float(caplog.text.partition("hidden states differ by ")[2].split()[0])
    assert 0 < told < ROUNDED[getattr(torch, name)]


def test_tokens_are_the_same_after_preemption(base_location: dict[str, str]) -> None:
    """Computed again, in other chunks, a sequence goes on as it would have."""
    params = SamplingParams(max_tokens=20, min_tokens=20, temperature=0.0)
    page_bytes = Runner(base_location["tiny-llama"], kv_cache_dtype="float16").engine.cache.bytes_per_block
    few_pages = {"kv_cache_bytes": 14 * page_bytes, "max_model_len": 128}
    kinds: list[dict[str, Any]] = [{}, {"max_num_batched_tokens": 13}, few_pages]
    tokens = []
    for settings in kinds:
        runner = Runner(base_location["tiny-llama"], kv_cache_dtype="float16", **settings)
        rows = [runner.submit(CAUSAL_LM, random_ids(20 + i, i), None, params) for i in range(12)]
        runner.drain()
        assert bool(runner.engine.scheduler.preemptions) == (settings is few_pages)
        tokens.append([row.output_ids for row in rows])
    assert tokens[1] == tokens[0]
    assert tokens[2] == tokens[0]


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@torch.inference_mode()
def test_a_key_that_is_not_finite_ends_its_sequence(base_location: dict[str, str], fault: float) -> None:
    runner = Runner(base_location["tiny-llama"], kv_cache_dtype="float16")
    backend = runner.engine.cache.backend
    assert isinstance(backend, NativeAttention)
    row = runner.submit(CAUSAL_LM, random_ids(20, 0), None, SamplingParams(max_tokens=9, min_tokens=9, temperature=0.0))
    for output in runner.engine.step():
        runner.outputs[output.sequence.id].append(output)
    keys = backend._layers[0].keys
    assert keys is not None
    keys[row.pages[0], :, :, 3] = fault
    runner.drain()
    assert runner.outputs[row.id][-1].finish_reason == "error"


@pytest.mark.parametrize("base", ENCODER_DECODERS, ids=lambda base: base.name)
def test_encoder_decoders_keep_targets_and_sources_so(base: Any, caplog: pytest.LogCaptureFixture) -> None:
    exact, rounded = (
        Engine(replace(SMALL, kv_cache_dtype=name), base.wrap(), "base") for name in ("float32", "float16")
    )
    assert exact.cache.bytes_per_block == 2 * rounded.cache.bytes_per_block
    told = float(caplog.text.partition("hidden states differ by ")[2].split()[0])
    assert 0 < told < ROUNDED[HALF]


@pytest.mark.parametrize("settings", [{"kernel": "torch"}, {"pack_weights": False}, {"block_size": 20}])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_other_attention_refuses_it_at_start(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedBase, match=f"kv_cache_dtype {name} on a base in float32 needs the CPU kernels"):
        engine_of(kv_cache_dtype=name, **settings)
    assert engine_of(kv_cache_dtype="float32", **settings).page_dtype == torch.float32


def test_an_encoder_has_no_cache_for_it() -> None:
    with pytest.raises(UnsupportedBase, match=r"kv_cache_dtype float16 is for bases with a KV cache"):
        Engine(replace(SMALL, kv_cache_dtype="float16"), ENCODERS[0].wrap(), "base")
    Engine(replace(SMALL, quantize="int8"), ENCODERS[0].wrap(), "base")

"""All layers of a decoder in one call of the kernels give what they give one by one; what differs stays as it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaModel

from adapters.batch import NO_SLOT, LoraBatch
from adapters.kernels.contract import POOL_DTYPES
from adapters.kernels.library import Library
from adapters.products import NativeProducts
from server.config import ServerConfig
from server.engine.attention import Span
from server.engine.base_model import wrap_base
from server.engine.decoder_stack import DecoderStack, NoteAngles, StackedLayers
from server.engine.engine import Engine
from server.engine.fused import fused_modules
from tests.adapters_support import adapter_of, random_pair
from tests.native_support import torch_threads
from tests.test_fused import SMALL, difference, hidden_of, model_of

LENGTHS, SLOTS = [40, 2, 33, 17], [1, NO_SLOT, 2, 0]
TOLERANCE = 1e-5
BIASES = {"attention_bias": True, "mlp_bias": True}
KINDS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def engine_with(library: Library, model: Any, config: ServerConfig = SMALL) -> Engine:
    """An engine for a transformers model on this object of the CPU kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.engine.engine.load_library", lambda: library)
        patch.setattr("adapters.kernels.load_library", lambda: library)
        return Engine(replace(config, max_loras=3, max_lora_rank=16), wrap_base(model), "base")


@pytest.fixture
def engine_of(library: Library) -> Callable[..., Engine]:
    """`engine_with` each object of the CPU kernels."""
    return partial(engine_with, library)


def stacks_of(engine: Engine) -> list[DecoderStack]:
    return [module.stack for module in fused_modules(engine.base.model) if isinstance(module, StackedLayers)]


@contextmanager
def one_by_one(engine: Engine) -> Iterator[None]:
    """Meanwhile layers are computed in calls of their own."""
    stacks = stacks_of(engine)
    for stack in stacks:
        stack._serves = lambda batch: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        for stack in stacks:
            del stack._serves


def write_adapters(engine: Engine) -> None:
    """In each slot another: rank 3 in fp32, rank 16 in fp16 with biases, rank 5 in bf16 on some layers only."""
    shapes = engine.base.layout.linears.items()
    for slot, (rank, dtype) in enumerate(((3, torch.float32), (16, torch.float16), (5, torch.bfloat16))):
        pairs = {}
        for i, (name, shape) in enumerate(shapes):
            if slot < 2 or i % 3:
                pair = random_pair(i + slot, shape.d_in, shape.d_out, rank, 0.05, shape.has_bias)
                pairs[name] = replace(pair, a=pair.a.to(dtype), b=pair.b.to(dtype))
        engine.slots.write(slot, adapter_of(pairs, str(slot)))


def count_calls(monkeypatch: pytest.MonkeyPatch, stack: DecoderStack) -> list[int]:
    calls: list[int] = []
    library = stack._library
    right = library.decode

    def decode(*arguments: Any) -> None:
        calls.append(1)
        right(*arguments)

    monkeypatch.setattr(library, "decode", decode)
    return calls


def both(engine: Engine, lengths: list[int], slots: list[int], cached: bool) -> tuple[Tensor, Tensor]:
    together = hidden_of(engine, lengths, slots, cached)
    with one_by_one(engine):
        return together, hidden_of(engine, lengths, slots, cached)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LlamaConfig", {}),
        ("LlamaConfig", {"num_hidden_layers": 5, "attention_bias": True, "mlp_bias": True}),
        ("MistralConfig", {"sliding_window": 4}),
        ("GemmaConfig", {"head_dim": 8}),
        ("GemmaConfig", {"head_dim": 16}),
        ("Qwen3Config", {"head_dim": 40}),
        ("Qwen3Config", {"head_dim": 12, "attention_bias": True}),
        ("Gemma2Config", {"head_dim": 8, "sliding_window": 4}),
        ("Gemma3TextConfig", {"head_dim": 24, "sliding_window": 4, "num_hidden_layers": 5, "layer_types": KINDS}),
        ("GraniteConfig", {"residual_multiplier": 0.3, "num_hidden_layers": 3}),
        ("SmolLM3Config", {"no_rope_layers": [1, 0, 1, 0], "num_hidden_layers": 4}),
        ("Phi3Config", {"num_hidden_layers": 3}),
        ("Phi3Config", {"head_dim": 40, "partial_rotary_factor": 0.3, "intermediate_size": 36}),
        ("HyperCLOVAXConfig", {"residual_multiplier": 0.4}),
        ("Qwen2Config", {"hidden_size": 24, "intermediate_size": 36}),
        ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
)
def test_together_they_give_what_each_gives(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any], threads: int
) -> None:
    engine = engine_of(model_of(kind, options))
    engine.cache.resize(32)
    write_adapters(engine)
    (stack,) = stacks_of(engine)
    calls = count_calls(monkeypatch, stack)
    with torch_threads(threads):
        for cached in (False, True):
            for slots in (SLOTS, [NO_SLOT] * 4, [2, 2, 1, 1]):
                together, alone = both(engine, LENGTHS, slots, cached)
                assert difference(together, alone) <= TOLERANCE
    assert len(calls) == 3 * (1 + 2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_with_pages_and_without_in_one_row(engine_of: Callable[..., Engine], threads: int) -> None:
    engine = engine_of(model_of("MistralConfig", {"sliding_window": 7}))
    engine.cache.resize(8)
    write_adapters(engine)
    spans = [Span(0, 20, 0, [5, 2]), Span(20, 53, 0, None), Span(53, 54, 0, [0]), Span(54, 57, 0, None)]
    after = [Span(0, 1, 20, [5, 2]), Span(1, 6, 0, None), Span(6, 9, 1, [0])]

    @torch.inference_mode()
    def hidden() -> list[Tensor]:
        parts = []
        for row in (spans, after):
            slots = [slot for span, slot in zip(row, SLOTS, strict=False) for _ in range(span.end - span.start)]
            places = [span.context + place for span in row for place in range(span.end - span.start)]
            ids = torch.arange(1, len(places) + 1)[None]
            with engine.cache.use(row, engine.base.device), engine.runner.scope.use(LoraBatch.of_slots(slots)):
                parts.append(engine.base.forward(ids, torch.tensor([places]), None)[0].clone())
        return parts

    with torch_threads(threads):
        together = hidden()
        with one_by_one(engine):
            alone = hidden()
    for got, expected in zip(together, alone, strict=True):
        assert difference(got, expected) <= TOLERANCE


def test_more_threads_than_processors(engine_of: Callable[..., Engine]) -> None:
    """They wait for one another asleep; whatever wakes them, none goes on too early, and none is forgotten."""
    engine = engine_of(model_of("LlamaConfig", {"num_hidden_layers": 5}))
    engine.cache.resize(32)
    write_adapters(engine)
    with torch_threads(1):
        alone = hidden_of(engine, LENGTHS, SLOTS, False)
    with torch_threads(4 * (os.cpu_count() or 1)):
        for _ in range(20):
            assert difference(hidden_of(engine, LENGTHS, SLOTS, False), alone) <= TOLERANCE


def test_many_tokens(engine_of: Callable[..., Engine]) -> None:
    """More than what stays of the scratch memory from one call to the next."""
    engine = engine_of(model_of("LlamaConfig", {"intermediate_size": 4096, "max_position_embeddings": 1500}))
    write_adapters(engine)
    together, alone = both(engine, [1300, 700], [1, 0], False)
    assert difference(together, alone) <= TOLERANCE
    again, _ = both(engine, [3], [0], False)
    assert torch.isfinite(again).all()


def test_other_pages_are_found_after_a_resize(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(model_of("LlamaConfig", {}))
    engine.cache.resize(32)
    first = hidden_of(engine, LENGTHS, [NO_SLOT] * 4, True)
    engine.cache.resize(64)
    assert difference(hidden_of(engine, LENGTHS, [NO_SLOT] * 4, True), first) <= 1e-6


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LlamaConfig", {}),
        ("Phi3Config", {"intermediate_size": 36}),
        ("GraniteConfig", {"residual_multiplier": 0.3, "num_hidden_layers": 5}),
    ],
)
@pytest.mark.parametrize("quantize", ["int8", "int8-dynamic"])
def test_quantised_layers(engine_of: Callable[..., Engine], kind: str, options: dict[str, Any], quantize: str) -> None:
    engine = engine_of(model_of(kind, options), replace(SMALL, quantize=quantize))
    assert stacks_of(engine)
    engine.cache.resize(32)
    write_adapters(engine)
    for cached in (False, True):
        together, alone = both(engine, LENGTHS, SLOTS, cached)
        assert difference(together, alone) <= TOLERANCE


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("kind", "options"), [("LlamaConfig", BIASES), ("Phi3Config", {})])
@pytest.mark.parametrize("dtype", POOL_DTYPES[1:])
def test_layers_in_16_bits(
    engine_of: Callable[..., Engine], dtype: torch.dtype, kind: str, options: dict[str, Any], threads: int
) -> None:
    """By tiles too, where these are: products of the test's other models are in fp32."""
    model = model_of(kind, {"hidden_size": 72, "intermediate_size": 100, **options})
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    engine = engine_of(model)
    engine.cache.resize(32)
    write_adapters(engine)
    (stack,) = stacks_of(engine)
    products = [group.products for group in stack.groups if isinstance(group.products, NativeProducts)]
    assert all(layer.dtype == POOL_DTYPES.index(dtype) for each in products for layer in each._layers)
    with torch_threads(threads):
        for cached in (False, True):
            together, alone = both(engine, LENGTHS, SLOTS, cached)
            assert difference(together, alone) <= TOLERANCE


@pytest.mark.parametrize(("kind", "options"), [("LlamaConfig", {}), ("LlamaConfig", BIASES), ("Phi3Config", {})])
def test_a_step_with_magnitudes(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    engine = engine_of(model_of(kind, options))
    write_adapters(engine)
    shapes = engine.base.layout.linears
    plain = {name: random_pair(i, s.d_in, s.d_out, 4, 0.05) for i, (name, s) in enumerate(shapes.items())}
    engine.slots.write(0, adapter_of(plain, "plain"))
    before = hidden_of(engine, LENGTHS, SLOTS, False)
    pairs = {n: replace(pair, magnitude=1 + torch.rand(shapes[n].d_out)) for n, pair in plain.items()}
    engine.slots.write(0, adapter_of(pairs, "dora"))
    (stack,) = stacks_of(engine)
    calls = count_calls(monkeypatch, stack)
    together, alone = both(engine, LENGTHS, SLOTS, False)
    assert len(calls) == 1
    assert difference(together, alone) <= TOLERANCE
    assert difference(together, before) > 0.01


@pytest.mark.parametrize("kind", ["Gemma3TextConfig", "Phi3Config"])
def test_nan_stays_in_its_sequence(engine_of: Callable[..., Engine], kind: str) -> None:
    engine = engine_of(model_of(kind, {"num_hidden_layers": 3}))
    slots = [NO_SLOT] * 3
    right = hidden_of(engine, [5, 4, 7], slots, False)
    embedding = engine.base.body.get_submodule("embed_tokens")
    hook = embedding.register_forward_hook(lambda _m, _a, y: y.index_fill(1, torch.tensor([6]), float("nan")))
    try:
        spoiled = hidden_of(engine, [5, 4, 7], slots, False)
    finally:
        hook.remove()
    assert spoiled[6:9].isnan().all()
    assert torch.equal(spoiled[:5], right[:5])
    assert torch.equal(spoiled[9:], right[9:])


def test_a_step_that_fails_leaves_nothing_for_the_next(engine_of: Callable[..., Engine]) -> None:
    """Angles that were noted for it, of another number of tokens."""
    engine = engine_of(model_of("Gemma3TextConfig", {"num_hidden_layers": 3, "layer_types": KINDS[1:4]}))
    (stack,) = stacks_of(engine)
    right = hidden_of(engine, [5, 4], [NO_SLOT] * 2, False)
    note = next(module for module in engine.base.model.modules() if isinstance(module, NoteAngles))
    hook = note.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden_of(engine, [7, 1], [NO_SLOT] * 2, False)
    hook.remove()
    assert torch.equal(hidden_of(engine, [5, 4], [NO_SLOT] * 2, False), right)
    with pytest.raises(RuntimeError, match="no angles"):
        stack(torch.zeros(1, 1, 32), position_embeddings=(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)))


class AddsBetween(LlamaModel):
    """Something happens between layers."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        hooks = [layer.register_forward_hook(lambda _m, _a, y: y + 1e-9) for layer in self.layers]
        try:
            return super().forward(*arguments, **named)
        finally:
            for hook in hooks:
                hook.remove()


def test_layers_between_which_something_happens_stay_apart(engine_of: Callable[..., Engine]) -> None:
    model = model_of("LlamaConfig", {})
    model.model.__class__ = AddsBetween
    assert not stacks_of(engine_of(model))


class CountsLayers(LlamaModel):
    """Asks for each layer by its number."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        assert all(isinstance(self.layers[i], nn.Module) for i in range(self.config.num_hidden_layers))
        return super().forward(*arguments, **named)


class AsksLayers(LlamaModel):
    """Wants to know something of each layer."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        assert all(layer.hidden_size == self.config.hidden_size for layer in self.layers)
        return super().forward(*arguments, **named)


@pytest.mark.parametrize("kind", [CountsLayers, AsksLayers])
def test_layers_that_a_model_must_find_stay_apart(
    engine_of: Callable[..., Engine], caplog: pytest.LogCaptureFixture, kind: type[LlamaModel]
) -> None:
    model = model_of("LlamaConfig", {})
    model.model.__class__ = kind
    engine = engine_of(model)
    assert not stacks_of(engine)
    assert "layers are computed one by one" in caplog.text
    assert torch.isfinite(hidden_of(engine, [5, 3], [NO_SLOT] * 2, False)).all()


def test_layers_that_give_other_numbers_together_stay_apart(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = DecoderStack._compute

    def compute(self: DecoderStack, *arguments: Any) -> Tensor:
        y = right(self, *arguments)
        y[..., -1] *= 1.001
        return y

    monkeypatch.setattr(DecoderStack, "_compute", compute)
    assert not stacks_of(engine_of(model_of("LlamaConfig", {})))
    assert "layers are computed one by one" in caplog.text

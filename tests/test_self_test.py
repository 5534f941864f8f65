"""Architectures that the self-test lets through are served exactly; others are refused at start, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DistilBertConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from adapters.batch import LoraBatch, Segment
from adapters.kernels import AddLora, add_lora_segments
from adapters.kernels.library import Library
from adapters.products import NativeProducts
from server.config import ServerConfig
from server.engine.base_model import BaseModel, UnsupportedBase, wrap_base
from server.engine.engine import Engine
from server.engine.native_attention import NativeAttention
from server.engine.torch_attention import TorchAttention

COMMON: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral, window": lambda: MistralConfig(**GROUPED, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "gemma2, softcap and window": lambda: Gemma2Config(**GROUPED, head_dim=8, sliding_window=4),
    "phi": lambda: PhiConfig(**COMMON),
    "gpt-j": lambda: GPTJConfig(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8, initializer_range=0.2
    ),
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**COMMON),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "bloom": lambda: BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    "gpt-neo": lambda: GPTNeoConfig(
        vocab_size=99,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
        window_size=4,
        initializer_range=0.2,
    ),
    "falcon": lambda: FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
}
SMALL = ServerConfig(kv_cache_bytes=1 << 20, max_loras=2, max_lora_rank=4)


def build(config: Any, kind: Any = AutoModelForCausalLM) -> BaseModel:
    torch.manual_seed(1)
    return wrap_base(kind.from_config(config, attn_implementation="eager"))


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_that_are_served(name: str) -> None:
    engine = Engine(SMALL, build(DECODERS[name]()), "base")
    assert engine.scheduler.blocks.num_blocks > 2
    assert engine.base.causal


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_that_are_served(name: str) -> None:
    engine = Engine(SMALL, build(ENCODERS[name](), AutoModel), "base")
    assert not engine.base.causal
    assert engine.scheduler.blocks.num_blocks == 0


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_any_page_size_is_tested(block_size: int) -> None:
    config = ServerConfig(kv_cache_bytes=1 << 20, max_loras=2, max_lora_rank=4, block_size=block_size)
    assert Engine(config, build(DECODERS["mistral, window"]()), "base").runner.block_size == block_size


@pytest.mark.parametrize(
    ("config", "classifies"),
    [
        (BertConfig(**COMMON), True),
        (AlbertConfig(**{**COMMON, "embedding_size": 16}), False),  # its pooler's tanh stands outside the module
        (DistilBertConfig(vocab_size=99, dim=32, hidden_dim=48, n_layers=2, n_heads=4, initializer_range=0.2), False),
    ],
    ids=["bert", "albert", "distilbert"],
)
def test_sequence_classification_needs_a_pooler_that_is_known(config: Any, classifies: bool) -> None:
    engine = Engine(SMALL, build(config, AutoModel), "base")
    assert engine.base.layout.classifies == classifies


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_neighbours_are_refused(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    with pytest.raises(UnsupportedBase, match=f"rope type .*{kind}"):
        build(LlamaConfig(**GROUPED, rope_parameters=rope))


@pytest.mark.parametrize("name", REFUSED)
def test_bases_that_would_be_served_wrongly_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedBase, match=r"attention interface|longest context|linear layers"):
        Engine(SMALL, build(REFUSED[name]()), "base")


def use_kernel(monkeypatch: pytest.MonkeyPatch, add_lora: AddLora) -> None:
    monkeypatch.setattr("server.engine.engine.choose_kernel", lambda *_: add_lora)


def test_a_kernel_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_the_last_token(ys: Any, x: torch.Tensor, group: Any, batch: LoraBatch) -> None:
        *others, (slot, start, end) = batch.segments
        add_lora_segments(ys, x, group, LoraBatch((*others, Segment(slot, start, end - 1)), batch.num_tokens))

    use_kernel(monkeypatch, forgets_the_last_token)
    with pytest.raises(UnsupportedBase, match="differs from the reference"):
        Engine(SMALL, build(DECODERS["llama"]()), "base")


def test_a_kernel_that_touches_base_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def adds_to_all(ys: Any, x: torch.Tensor, group: Any, batch: LoraBatch) -> None:
        for y in ys:
            y.add_(0.5)

    use_kernel(monkeypatch, adds_to_all)
    with pytest.raises(UnsupportedBase, match="changes the base's rows"):
        Engine(SMALL, build(DECODERS["llama"]()), "base")


def use_native(monkeypatch: pytest.MonkeyPatch, library: Library | None) -> None:
    """What load_library finds; None: nothing is built."""
    monkeypatch.setattr("server.engine.engine.load_library", lambda: library)
    monkeypatch.setattr("adapters.kernels.load_library", lambda: library)


@pytest.mark.parametrize("name", ["llama", "gemma2, softcap and window", "phi"])
def test_a_base_is_served_without_the_cpu_kernels_too(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    use_native(monkeypatch, None)
    engine = Engine(SMALL, build(DECODERS[name]()), "base")
    assert isinstance(engine.cache.backend, TorchAttention)


@pytest.mark.parametrize("name", DECODERS)
def test_a_base_is_served_by_each_object_of_the_cpu_kernels(
    monkeypatch: pytest.MonkeyPatch, library: Library, name: str
) -> None:
    use_native(monkeypatch, library)
    engine = Engine(SMALL, build(DECODERS[name]()), "base")
    assert isinstance(engine.cache.backend, NativeAttention)
    assert not any(isinstance(module, torch.nn.Linear) for module in engine.base.body.modules())


def test_pages_that_are_no_multiple_of_a_vector_take_the_torch_attention(
    monkeypatch: pytest.MonkeyPatch, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    use_native(monkeypatch, library)
    config = replace(SMALL, block_size=library.lanes + 4)
    engine = Engine(config, build(DECODERS["llama"]()), "base")
    assert isinstance(engine.cache.backend, TorchAttention)
    assert f"block_size {library.lanes + 4} is no multiple of {library.lanes}" in caplog.text


def test_quantised_weights_are_served_and_the_difference_is_told(
    monkeypatch: pytest.MonkeyPatch, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    use_native(monkeypatch, library)
    Engine(replace(SMALL, quantize="int8"), build(DECODERS["llama"]()), "base")
    assert "weights are quantised (int8): hidden states differ by" in caplog.text


@pytest.mark.parametrize("settings", [{"pack_weights": False}, {"kernel": "torch"}])
def test_quantised_weights_need_the_cpu_kernels(
    monkeypatch: pytest.MonkeyPatch, library: Library, settings: dict[str, Any]
) -> None:
    use_native(monkeypatch, library)
    with pytest.raises(UnsupportedBase, match="quantize int8 needs the CPU kernels"):
        Engine(replace(SMALL, quantize="int8", **settings), build(DECODERS["llama"]()), "base")


@pytest.mark.parametrize(
    "wrong", [lambda ys: [y + 1e-2 for y in ys], lambda ys: [y * float("nan") for y in ys]], ids=["off", "nan"]
)
def test_packed_products_that_are_wrong_are_refused(
    monkeypatch: pytest.MonkeyPatch, library: Library, wrong: Callable[[list[torch.Tensor]], list[torch.Tensor]]
) -> None:
    right = NativeProducts.compute
    use_native(monkeypatch, library)
    monkeypatch.setattr(NativeProducts, "compute", lambda self, x, batch: wrong(right(self, x, batch)))
    with pytest.raises(UnsupportedBase, match="differs"):
        Engine(SMALL, build(DECODERS["llama"]()), "base")


def test_packed_products_that_forget_the_adapter_are_refused(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    right = NativeProducts.compute
    use_native(monkeypatch, library)
    monkeypatch.setattr(NativeProducts, "compute", lambda self, x, batch: right(self, x, None))
    with pytest.raises(UnsupportedBase, match=r"LoRA kernel differs|changes nothing"):
        Engine(SMALL, build(DECODERS["llama"]()), "base")


def test_a_cache_that_is_too_small_is_refused() -> None:
    with pytest.raises(UnsupportedBase, match="kv_cache_bytes 100 is too small"):
        Engine(ServerConfig(kv_cache_bytes=100), build(DECODERS["llama"]()), "base")


def test_positions_that_do_not_begin_at_zero_are_refused() -> None:
    """RoBERTa counts positions from the padding index on; whether packed or refused, never wrong."""
    config = RobertaConfig(**COMMON)
    with pytest.raises(UnsupportedBase, match="packed forward"):
        Engine(SMALL, build(config, AutoModel), "base")


@pytest.mark.parametrize("config", [GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)])
def test_gpt2_has_no_linear_layers_to_adapt(config: Any) -> None:
    """Its Conv1D layers come with `fan_in_fan_out`, in a later version."""
    with pytest.raises(UnsupportedBase, match="linear"):
        Engine(SMALL, build(config), "base")

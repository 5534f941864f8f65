"""Architectures that the self-test lets through are served exactly; others are refused at start, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
)

from adapters.batch import LoraBatch, Segment
from adapters.kernels import AddLora, add_lora_segments
from adapters.kernels.contract import LoraTerm, LoraWeights
from adapters.kernels.library import Library
from adapters.memory import lazy_zeros
from adapters.products import NativeProducts
from server.config import ServerConfig
from server.engine import native_attention, padded, pages, self_test
from server.engine.base_model import BaseModel, UnsupportedBase, wrap_base
from server.engine.engine import Engine
from server.engine.native_attention import NativeAttention
from server.engine.positions import Positions
from server.engine.request import CAUSAL_LM, SEQ_2_SEQ_LM, SamplingParams, Sequence
from server.engine.torch_attention import TorchAttention
from tests.bases import BART, COMMON, DECODERS, ENCODER_DECODERS, ENCODERS, GROUPED, PADDED_ENCODERS, REFUSED, TinyBase

DECODER_NAMED = {base.name: base for base in DECODERS}
SMALL = ServerConfig(kv_cache_bytes=1 << 20, max_loras=2, max_lora_rank=4)


def build(config: Any, kind: Any = AutoModelForCausalLM) -> BaseModel:
    torch.manual_seed(1)
    return wrap_base(kind.from_config(config, attn_implementation="eager"))


@pytest.mark.parametrize("name", DECODER_NAMED)
def test_decoders_that_are_served(name: str) -> None:
    engine = Engine(SMALL, DECODER_NAMED[name].wrap(), "base")
    assert engine.scheduler.blocks.num_blocks > 2
    assert engine.base.causal


@pytest.mark.parametrize("base", [*ENCODERS, *PADDED_ENCODERS], ids=lambda base: base.name)
def test_encoders_that_are_served(base: TinyBase, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(SMALL, base.wrap(), "base")
    assert not engine.base.causal
    assert engine.scheduler.blocks.num_blocks == 0
    assert engine.runner.padded == (base in PADDED_ENCODERS) == ("sequences are padded" in caplog.text)


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_any_page_size_is_tested(block_size: int) -> None:
    config = ServerConfig(kv_cache_bytes=1 << 20, max_loras=2, max_lora_rank=4, block_size=block_size)
    assert Engine(config, DECODER_NAMED["Mistral"].wrap(), "base").runner.block_size == block_size


@pytest.mark.parametrize("block_size", [16, 3], ids=["native", "torch"])
@pytest.mark.parametrize("name", ["Llama", "BART"])
def test_the_cache_is_whole_before_the_first_request(
    name: str, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first prompts made of it would lie between their activations: see open_cache."""
    made: list[object] = []

    def noted(*arguments: Any) -> Tensor:
        made.append(arguments)
        return lazy_zeros(*arguments)

    for module in (pages, native_attention):
        monkeypatch.setattr(module, "lazy_zeros", noted)
    base = next(base for base in (*DECODERS, *ENCODER_DECODERS) if base.name == name)
    engine = Engine(replace(SMALL, block_size=block_size), base.wrap(), "base")
    assert made
    made.clear()
    stacks = engine.base.stacks
    task, prompt = (CAUSAL_LM, [5, 6, 7]) if stacks is None else (SEQ_2_SEQ_LM, list(stacks.start_ids))
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    sequence = Sequence(0, task, prompt, None, params, source_ids=[] if stacks is None else [5, 6, 7])
    engine.add(sequence)
    while engine.scheduler.unfinished():
        engine.step()
    assert len(sequence.output_ids) == 3
    assert not made


@pytest.mark.parametrize(
    ("config", "classifies"),
    [
        (BertConfig(**COMMON), True),
        (AlbertConfig(**{**COMMON, "embedding_size": 16}), False),  # its pooler's tanh stands outside the module
        (DistilBertConfig(vocab_size=99, dim=32, hidden_dim=48, n_layers=2, n_heads=4, initializer_range=0.2), True),
    ],
    ids=["bert", "albert", "distilbert"],
)
def test_sequence_classification_needs_a_head_that_is_understood(config: Any, classifies: bool) -> None:
    engine = Engine(SMALL, build(config, AutoModel), "base")
    assert ("SEQ_CLS" not in engine.base.layout.unserved) == classifies


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_neighbours_are_refused(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    with pytest.raises(UnsupportedBase, match=f"rope type .*{kind}"):
        build(LlamaConfig(**GROUPED, rope_parameters=rope))


@pytest.mark.parametrize("base", REFUSED, ids=lambda base: base.name)
def test_bases_that_would_be_served_wrongly_are_refused(base: TinyBase) -> None:
    with pytest.raises(UnsupportedBase, match=base.note):
        Engine(SMALL, base.wrap(), "base")


def test_a_base_that_cannot_be_looked_at_is_refused() -> None:
    """Here: fewer positions than the tokens of the look."""
    with pytest.raises(UnsupportedBase, match="is not understood as encoder and decoder: index out of range"):
        TinyBase("BART", lambda: BartConfig(**{**BART, "max_position_embeddings": 5})).wrap()


def test_every_obstacle_is_told() -> None:
    bloom = next(base for base in REFUSED if base.name == "BLOOM")
    with pytest.raises(UnsupportedBase, match=r"computes attention by itself.*; .*names no longest context"):
        Engine(SMALL, bloom.wrap(), "base")


@pytest.mark.parametrize("base", PADDED_ENCODERS, ids=lambda base: base.name)
def test_a_padded_pass_that_is_wrong_is_refused(base: TinyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    right = padded.forward_padded
    monkeypatch.setattr("server.engine.model_runner.forward_padded", lambda *given: right(*given).roll(1, 0))
    with pytest.raises(UnsupportedBase, match=r"the padded forward of .* differs"):
        Engine(SMALL, base.wrap(), "base")


def test_positions_that_follow_no_known_rule_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the numbering were learned wrongly, the self-test would see it; an encoder is then served padded."""
    roberta = next(base for base in ENCODERS if base.name == "RoBERTa")
    monkeypatch.setattr("server.engine.base_model.learn_positions", lambda *_: Positions())
    assert Engine(SMALL, roberta.wrap(), "base").runner.padded


def use_kernel(monkeypatch: pytest.MonkeyPatch, add_lora: AddLora) -> None:
    monkeypatch.setattr("server.engine.engine.choose_kernel", lambda *_: add_lora)


def test_a_kernel_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_the_last_token(ys: Any, x: torch.Tensor, group: Any, batch: LoraBatch) -> None:
        *others, (slot, start, end) = batch.segments
        add_lora_segments(ys, x, group, LoraBatch((*others, Segment(slot, start, end - 1)), batch.num_tokens))

    use_kernel(monkeypatch, forgets_the_last_token)
    with pytest.raises(UnsupportedBase, match="differs from the reference"):
        Engine(SMALL, DECODER_NAMED["Llama"].wrap(), "base")


def test_a_kernel_that_touches_base_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def adds_to_all(ys: Any, x: torch.Tensor, group: Any, batch: LoraBatch) -> None:
        for y in ys:
            y.add_(0.5)

    use_kernel(monkeypatch, adds_to_all)
    with pytest.raises(UnsupportedBase, match="changes the base's rows"):
        Engine(SMALL, DECODER_NAMED["Llama"].wrap(), "base")


def use_native(monkeypatch: pytest.MonkeyPatch, library: Library | None) -> None:
    """What load_library finds; None: nothing is built."""
    monkeypatch.setattr("server.engine.engine.load_library", lambda: library)
    monkeypatch.setattr("adapters.kernels.load_library", lambda: library)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Phi"])
def test_a_base_is_served_without_the_cpu_kernels_too(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    use_native(monkeypatch, None)
    engine = Engine(SMALL, DECODER_NAMED[name].wrap(), "base")
    assert isinstance(engine.cache.backend, TorchAttention)


@pytest.mark.parametrize("name", DECODER_NAMED)
def test_a_base_is_served_by_each_object_of_the_cpu_kernels(
    monkeypatch: pytest.MonkeyPatch, library: Library, name: str
) -> None:
    use_native(monkeypatch, library)
    engine = Engine(SMALL, DECODER_NAMED[name].wrap(), "base")
    assert isinstance(engine.cache.backend, NativeAttention)
    assert not any(isinstance(module, torch.nn.Linear) for module in engine.base.body.modules())


def test_pages_that_are_no_multiple_of_a_vector_take_the_torch_attention(
    monkeypatch: pytest.MonkeyPatch, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    use_native(monkeypatch, library)
    config = replace(SMALL, block_size=library.lanes + 4)
    engine = Engine(config, DECODER_NAMED["Llama"].wrap(), "base")
    assert isinstance(engine.cache.backend, TorchAttention)
    assert f"block_size {library.lanes + 4} is no multiple of {library.lanes}" in caplog.text


def test_quantised_weights_are_served_and_the_difference_is_told(
    monkeypatch: pytest.MonkeyPatch, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    use_native(monkeypatch, library)
    Engine(replace(SMALL, quantize="int8"), DECODER_NAMED["Llama"].wrap(), "base")
    assert "weights are quantised (int8), keys and values are held in float16: hidden states differ by" in caplog.text


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 2, "pages"])
def test_what_is_not_finite_when_rounded_is_refused(
    monkeypatch: pytest.MonkeyPatch, library: Library, place: Any, fault: float
) -> None:
    """In whichever sequence it is, and over pages alone."""
    use_native(monkeypatch, library)
    runner = Engine(replace(SMALL, quantize="int8"), DECODER_NAMED["Llama"].wrap(), "base").runner
    probe = self_test.make_probe(DECODER_NAMED["Llama"].wrap())
    assert 0 < self_test.rounding_error(runner, probe) < 1
    packed, chunked = self_test._packed, self_test._chunked

    def spoiled(*arguments: Any) -> Any:
        hidden, logits = packed(*arguments)
        if place != "pages":
            hidden[place][0, 0] = fault
        return hidden, logits

    def spoiled_pages(*arguments: Any) -> Any:
        hidden = chunked(*arguments)
        if place == "pages":
            hidden[-1, 0] = fault
        return hidden

    monkeypatch.setattr(self_test, "_packed", spoiled)
    monkeypatch.setattr(self_test, "_chunked", spoiled_pages)
    with pytest.raises(UnsupportedBase, match="not finite when its weights, keys or values are rounded"):
        self_test.rounding_error(runner, probe)


@pytest.mark.parametrize("settings", [{"pack_weights": False}, {"kernel": "torch"}])
def test_quantised_weights_need_the_cpu_kernels(
    monkeypatch: pytest.MonkeyPatch, library: Library, settings: dict[str, Any]
) -> None:
    use_native(monkeypatch, library)
    with pytest.raises(UnsupportedBase, match="quantize int8 needs the CPU kernels"):
        Engine(replace(SMALL, quantize="int8", **settings), DECODER_NAMED["Llama"].wrap(), "base")


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
        Engine(SMALL, DECODER_NAMED["Llama"].wrap(), "base")


def test_packed_products_that_forget_the_adapter_are_refused(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    right = NativeProducts.compute
    use_native(monkeypatch, library)
    monkeypatch.setattr(NativeProducts, "compute", lambda self, x, batch: right(self, x, None))
    with pytest.raises(UnsupportedBase, match=r"LoRA kernel differs|changes nothing"):
        Engine(SMALL, DECODER_NAMED["Llama"].wrap(), "base")


def test_kernels_that_forget_gains_are_refused(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    def forget_gain(self: LoraWeights, slot: int, term: LoraTerm | None) -> None:
        right(self, slot, term)
        self.table["gain"][slot] = 0

    right = LoraWeights.set
    use_native(monkeypatch, library)
    monkeypatch.setattr(LoraWeights, "set", forget_gain)
    with pytest.raises(UnsupportedBase, match="LoRA kernel differs"):
        Engine(SMALL, DECODER_NAMED["Llama"].wrap(), "base")


def test_a_cache_that_is_too_small_is_refused() -> None:
    with pytest.raises(UnsupportedBase, match="kv_cache_bytes 100 is too small"):
        Engine(ServerConfig(kv_cache_bytes=100), DECODER_NAMED["Llama"].wrap(), "base")

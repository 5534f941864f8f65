"""Fused modules give what the originals give; what is not built as expected stays; all of it can be taken back."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from adapters.adapter import Adapter
from adapters.batch import NO_SLOT, LoraBatch
from adapters.kernels.library import GELU_TANH, SILU, Library
from server.config import ServerConfig
from server.engine.attention import Span
from server.engine.base_model import wrap_base
from server.engine.decoder_stack import StackedLayers
from server.engine.engine import Engine
from server.engine.fused import FusedAttention, FusedLayer, FusedMLP, FusedNorm, fused_modules, restore
from server.engine.fusing import PROBE_TOKENS, _activation, _fused_norm, fuse
from tests.adapters_support import adapter_of, random_pair
from tests.native_support import torch_threads

COMMON: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
SMALL = ServerConfig(kv_cache_bytes=1 << 20, max_loras=2, max_lora_rank=4)
PARTS = {FusedNorm: 5, FusedAttention: 2, FusedMLP: 2}
EVERYTHING = {**PARTS, FusedLayer: 2, StackedLayers: 1}
FOUR_NORMS = {**EVERYTHING, FusedNorm: 9}
CASES: dict[str, tuple[str, dict[str, Any], dict[Any, int]]] = {
    "llama": ("LlamaConfig", {}, EVERYTHING),
    "llama, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, EVERYTHING),
    "qwen2": ("Qwen2Config", {}, EVERYTHING),
    "mistral, window": ("MistralConfig", {"sliding_window": 4}, EVERYTHING),
    "gemma": ("GemmaConfig", {"head_dim": 8}, EVERYTHING),
    "gemma2, softcap and window": (
        "Gemma2Config", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 5}, FOUR_NORMS,
    ),
    "gemma3, two kinds of angles": (
        "Gemma3TextConfig",
        {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        FOUR_NORMS,
    ),
    "granite, multipliers": ("GraniteConfig", {"residual_multiplier": 0.5, "attention_multiplier": 0.3}, EVERYTHING),
    "hyperclova x, a factor of what is normed": ("HyperCLOVAXConfig", {"residual_multiplier": 0.4}, FOUR_NORMS),
    "hyperclova x, nothing in two norms' places": (
        "HyperCLOVAXConfig", {"residual_multiplier": 0.4, "use_post_norm": False}, EVERYTHING,
    ),
    "yarn": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        EVERYTHING,
    ),
    "qwen3, norms of queries and keys": ("Qwen3Config", {"head_dim": 8}, EVERYTHING),
    "olmo2, norms of queries and keys": ("Olmo2Config", {}, {FusedNorm: 9, FusedMLP: 2}),
    "exact gelu": ("LlamaConfig", {"hidden_act": "gelu"}, {FusedNorm: 5, FusedAttention: 2}),
    "relu": ("LlamaConfig", {"hidden_act": "relu"}, {FusedNorm: 5, FusedAttention: 2}),
    "experts": ("MixtralConfig", {"num_local_experts": 2}, {FusedNorm: 5, FusedAttention: 2}),
    "phi3, one projection for all": ("Phi3Config", {"partial_rotary_factor": 0.5}, EVERYTHING),
    "smollm3, a layer without positions": ("SmolLM3Config", {"no_rope_layers": [1, 0]}, EVERYTHING),
    "layer norms": ("Starcoder2Config", {}, {FusedAttention: 2}),
    "nemotron, a part of each head is rotated": ("NemotronConfig", {}, {FusedAttention: 2}),
}  # fmt: skip
NOT_ATTENTION: dict[str, tuple[str, dict[str, Any], dict[Any, int]]] = {
    "neighbours are rotated": ("CohereConfig", {}, {FusedMLP: 2}),
    "a part is rotated, by neighbours": ("GlmConfig", {"head_dim": 8}, {FusedNorm: 5, FusedMLP: 2}),
    "clamped queries": ("OlmoConfig", {"clip_qkv": 1.0}, {FusedMLP: 2}),
}  # fmt: skip


def model_of(kind: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, kind)(**{**COMMON, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms' weights are all one, biases zero
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))),
                alpha=0.3,
            )
    return model


@pytest.fixture
def engine_of(monkeypatch: pytest.MonkeyPatch, library: Library) -> Callable[[Any], Engine]:
    """An engine for a transformers model, on each object of the CPU kernels."""
    monkeypatch.setattr("server.engine.engine.load_library", lambda: library)
    monkeypatch.setattr("adapters.kernels.load_library", lambda: library)
    return lambda model: Engine(SMALL, wrap_base(model), "base")


@torch.inference_mode()
def hidden_of(engine: Engine, lengths: list[int], slots: list[int], cached: bool) -> Tensor:
    """Hidden states of random sequences in one row; cached: over pages, the last token by itself."""
    ids = torch.randint(1, 99, (sum(lengths),), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(n) for n in lengths])
    owners = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    result = torch.zeros(len(ids), engine.base.hidden_size)
    last = positions == torch.tensor(lengths)[owners] - 1
    for chosen in (~last, last) if cached else (torch.ones_like(last),):
        spans, start = [], 0
        for i in range(len(lengths)):
            mine = positions[chosen & (owners == i)]
            pages = [5 * i + 4, 5 * i, 5 * i + 2, 5 * i + 1] if cached else None
            spans.append(Span(start, start + len(mine), int(mine[0]), pages))
            start += len(mine)
        batch = LoraBatch.of_slots([slots[i] for i in owners[chosen].tolist()])
        with engine.cache.use(spans, engine.base.device), engine.runner.scope.use(batch):
            hidden, _ = engine.base.forward(ids[chosen][None], positions[chosen][None], None)
        result[chosen] = hidden
    return result


def difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def whole_adapter(engine: Engine) -> Adapter:
    shapes = engine.base.layout.linears.items()
    return adapter_of({n: random_pair(i, s.d_in, s.d_out, 3, 0.05, s.has_bias) for i, (n, s) in enumerate(shapes)})


def kinds_of(model: nn.Module) -> Counter[Any]:
    return Counter(type(module) for module in fused_modules(model))


@pytest.mark.parametrize("name", CASES)
def test_what_is_fused_gives_what_the_originals_give(engine_of: Callable[[Any], Engine], name: str) -> None:
    """With adapters and without, with pages and without, on longer sequences than the self-test's."""
    kind, options, expected = CASES[name]
    engine = engine_of(model_of(kind, options))
    assert kinds_of(engine.base.model) == expected
    engine.slots.write(1, whole_adapter(engine))
    lengths, slots = [40, 2, 33, 17], [1, NO_SLOT, 1, NO_SLOT]
    engine.cache.backend.resize(32)
    fused = [hidden_of(engine, lengths, slots, cached) for cached in (False, True)]
    base_only = hidden_of(engine, lengths, [NO_SLOT] * 4, False)
    restore(engine.base.model)
    assert not kinds_of(engine.base.model)
    plain = [hidden_of(engine, lengths, slots, cached) for cached in (False, True)]
    for got, reference in zip(fused, plain, strict=True):
        assert difference(got, reference) <= 1e-5
    assert difference(fused[1], fused[0]) <= 1e-5
    assert difference(fused[0], base_only) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_the_fused_base_is_transformers_own(engine_of: Callable[[Any], Engine], name: str) -> None:
    kind, options, _ = CASES[name]
    model = model_of(kind, options)
    ids = torch.randint(1, 99, (1, 50), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = model.base_model(input_ids=ids).last_hidden_state[0]
    assert difference(hidden_of(engine_of(model), [50], [NO_SLOT], False), expected) <= 1e-4


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_attention_that_does_more_stays_and_the_rest_is_fused(engine_of: Callable[[Any], Engine], name: str) -> None:
    kind, options, fused = NOT_ATTENTION[name]
    model = model_of(kind, options)
    ids = torch.randint(1, 99, (1, 50), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = model.base_model(input_ids=ids).last_hidden_state[0]
    engine = engine_of(model)
    assert kinds_of(engine.base.model) == fused
    assert difference(hidden_of(engine, [50], [NO_SLOT], False), expected) <= 1e-4


@pytest.mark.parametrize("kind", [FusedNorm, FusedMLP, FusedAttention])
@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_an_engine_whose_fused_result_differs_takes_all_of_it_back(
    engine_of: Callable[[Any], Engine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: Any,
    fault: str,
) -> None:
    """What is right on the probe of one module, of 3 or 8 tokens, and wrong in the whole base."""
    right = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        probed = (args[0] if args else kwargs["hidden_states"]).shape[-2] in (3, PROBE_TOKENS)
        if fault == "raises" and not probed:
            raise RuntimeError("not today")
        result = right(self, *args, **kwargs)
        if not probed:
            y = result[0] if isinstance(result, tuple) else result
            y[..., -1] += 0.05 if fault == "wrong" else float("nan")
        return result

    original = model_of("LlamaConfig", {})
    classes = {name: type(module) for name, module in original.named_modules()}
    monkeypatch.setattr(kind, "forward", forward)
    engine = engine_of(original)
    assert not kinds_of(engine.base.model)
    assert "the 11 fused modules are taken back" in caplog.text
    for name, module in engine.base.model.named_modules():
        if name in classes and classes[name] not in (nn.Linear, nn.Embedding):
            assert type(module) is classes[name], name


def test_restore_puts_the_very_same_modules_back(engine_of: Callable[[Any], Engine]) -> None:
    engine = engine_of(model_of("LlamaConfig", {}))
    originals = [module.original for module in fused_modules(engine.base.model)]
    assert len(originals) == 12
    restore(engine.base.model)
    there = set(engine.base.model.modules())
    assert all(module in there for module in originals)
    restore(engine.base.model)
    assert not kinds_of(engine.base.model)


def test_a_model_can_be_fused_again(engine_of: Callable[[Any], Engine], library: Library) -> None:
    engine = engine_of(model_of("LlamaConfig", {}))
    before = hidden_of(engine, [9, 4], [NO_SLOT] * 2, False)
    restore(engine.base.model)
    assert fuse(engine.base, library, engine.cache) == 11
    assert torch.equal(hidden_of(engine, [9, 4], [NO_SLOT] * 2, False), before)


class TwiceMLP(LlamaMLP):
    """Calls a layer twice, so that its output is not the first one's alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + self.down_proj(self.gate_proj(x))


class OtherInputMLP(LlamaMLP):
    """Its layers do not read the same tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(-x))


@pytest.mark.parametrize("kind", [TwiceMLP, OtherInputMLP])
def test_layers_that_are_called_otherwise_stay(engine_of: Callable[[Any], Engine], kind: type[LlamaMLP]) -> None:
    model = model_of("LlamaConfig", {})
    model.model.layers[1].mlp.__class__ = kind
    ids = torch.randint(1, 99, (1, 50), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = model.base_model(input_ids=ids).last_hidden_state[0]
    engine = engine_of(model)
    assert kinds_of(engine.base.model) == {**PARTS, FusedMLP: 1, FusedLayer: 1}
    assert type(engine.base.body.layers[1].mlp) is kind  # type: ignore[index,union-attr]
    assert difference(hidden_of(engine, [50], [NO_SLOT], False), expected) <= 1e-4


def test_queries_that_are_scaled_at_far_positions(engine_of: Callable[[Any], Engine]) -> None:
    """Ministral 3 scales queries from `original_max_position_embeddings` on, past the self-test's sequences."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5}
    rope["original_max_position_embeddings"] = 16
    model = model_of("Ministral3Config", {"head_dim": 8, "rope_parameters": rope})
    ids = torch.randint(1, 99, (1, 50), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = model.base_model(input_ids=ids).last_hidden_state[0]
    assert difference(hidden_of(engine_of(model), [50], [NO_SLOT], False), expected) <= 1e-4


def test_queries_that_are_clamped_only_with_an_adapter(engine_of: Callable[[Any], Engine]) -> None:
    engine = engine_of(model_of("OlmoConfig", {"clip_qkv": 12.0}))
    adapter = whole_adapter(engine)
    for name, pair in adapter.pairs.items():
        if "q_proj" in name:
            pair.b.mul_(100)
    engine.slots.write(0, adapter)
    fused = hidden_of(engine, [20], [0], False)
    restore(engine.base.model)
    assert difference(fused, hidden_of(engine, [20], [0], False)) <= 1e-4


# the operations themselves


@pytest.mark.parametrize("d", [1, 7, 16, 33, 576])
@pytest.mark.parametrize("rows", [0, 1, 5, 300])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_fused_norm_is_the_plain_one(library: Library, d: int, rows: int, scale: float) -> None:
    norm = LlamaRMSNorm(d, eps=1e-5).requires_grad_(False)
    norm.weight.uniform_(-1, 1)
    fused = _fused_norm(norm, library)
    assert fused is not None
    x = scale * torch.randn(1, rows, d)
    torch.testing.assert_close(fused(x), norm(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused(x.transpose(0, 1)), norm(x.transpose(0, 1)), rtol=1e-5, atol=1e-6)


class AlmostRMSNorm(LlamaRMSNorm):
    """The weight's square: no norm of a kind that is known."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * self.weight


def test_another_norm_of_that_name_stays(library: Library) -> None:
    norm = AlmostRMSNorm(16).requires_grad_(False)
    norm.weight.uniform_(-1, 1)
    assert _fused_norm(norm, library) is None
    assert _fused_norm(nn.LayerNorm(16), library) is None


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (nn.functional.silu, SILU),
        (nn.SiLU(), SILU),
        (nn.GELU(approximate="tanh"), GELU_TANH),
        (nn.GELU(), None),
        (nn.ReLU(), None),
        (nn.Sigmoid(), None),
        (transformers.activations.ACT2FN["quick_gelu"], None),
        (transformers.activations.ACT2FN["gelu_new"], GELU_TANH),
        (None, None),
    ],
)
def test_activations_are_known_by_what_they_compute(library: Library, function: Any, found: int | None) -> None:
    with torch.inference_mode():
        assert _activation(function, library) == found


@pytest.mark.parametrize("count", [1, 7, 16, 31, 4096, 99_999])
@pytest.mark.parametrize(("activation", "function"), [(SILU, nn.SiLU()), (GELU_TANH, nn.GELU(approximate="tanh"))])
def test_gated_products(library: Library, count: int, activation: int, function: nn.Module) -> None:
    """Also in place, and at values where e^x would overflow."""
    gate, up = 30 * torch.randn(count), torch.randn(count)
    gate[:: max(count // 7, 1)] = torch.tensor([-1e4, 1e4, -88.0, 88.5, 0.0, -103.0, 60.0, -1e30]).repeat(2)[
        : len(gate[:: max(count // 7, 1)])
    ]
    expected = function(gate.double()) * up.double()
    library.gated(gate.data_ptr(), up.data_ptr(), count, gate.data_ptr(), 1, count, activation)
    torch.testing.assert_close(gate.double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("d", [1, 7, 33, 4096])
@pytest.mark.parametrize("rows", [0, 1, 3, 50])
@pytest.mark.parametrize("threads", [1, 3])
def test_gated_products_of_rows_side_by_side(library: Library, d: int, rows: int, threads: int) -> None:
    both, y = torch.randn(rows, 2 * d), torch.full((rows + 1, d), 7.0)
    gate, up = both.chunk(2, dim=1)
    with torch_threads(threads):
        library.gated(gate.data_ptr(), up.data_ptr(), 2 * d, y.data_ptr(), rows, d, SILU)
    torch.testing.assert_close(y[:rows], nn.functional.silu(gate) * up, rtol=2e-6, atol=1e-6)
    assert bool((y[rows] == 7).all())


@pytest.mark.parametrize("activation", [SILU, GELU_TANH])
def test_nan_and_infinity_go_through_gated_products(library: Library, activation: int) -> None:
    gate = torch.tensor([float("nan"), float("inf"), 1.0, float("nan")] * 10)
    up, y = torch.ones(40), torch.zeros(40)
    library.gated(gate.data_ptr(), up.data_ptr(), 40, y.data_ptr(), 1, 40, activation)
    assert y.isnan().tolist() == gate.isnan().tolist()
    assert bool((y[1::4] == float("inf")).all())

"""patch_model: a patched model is the base bit for bit until a batch says otherwise, and shares its memory.

LoraGroup: layers that share an input are computed together, and each gives its own output however they are asked.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from adapters.adapter import Adapter
from adapters.batch import NO_SLOT, LoraBatch, LoraScope
from adapters.kernels import NativeLora, add_lora_reference, add_lora_segments
from adapters.kernels.library import Library, usable_targets
from adapters.layers import Computing, LoraGroup, LoraLinear, patch_model
from adapters.layout import as_linear, layout_of, shared_inputs, with_token_layers
from adapters.memory import MappedFiles
from adapters.packed import PackedLinear, can_pack
from adapters.products import NativeEmbedding, PlainProducts
from adapters.slots import LoraSlots
from adapters.token_layers import TokenLayers, output_of, pack_tokens, patch_tokens
from tests.adapters_support import HIDDEN, PLAIN, adapter_of, random_pair, resident_bytes_of, small_base
from tests.native_support import library_of

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [5, 6, 7, 8]])


def tiny_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3))
    else:
        model = BertModel(BertConfig(**SIZES), add_pooling_layer=False)
    return model.requires_grad_(False).eval()


def computing_of(name: str) -> Computing:
    """`torch`, `packed`, `reference`, or a target of the CPU kernels: for the base's products too, or the term only."""
    if name == "packed":
        return Computing(add_lora_segments, pack=True)
    if name in ("torch", "reference"):
        return Computing(add_lora_segments if name == "torch" else add_lora_reference)
    target, _, term_only = name.partition(", ")
    library = library_of(target)
    return Computing(NativeLora(library), None if term_only else library)


COMPUTING = ["reference", "torch", "packed", *(t + rest for t in usable_targets() for rest in ("", ", term only"))]


class Patched:
    """A tiny model before and after patching."""

    def __init__(self, kind: str, computing: str = "torch", grouped: bool = True) -> None:
        self.model = tiny_model(kind)
        self.body: nn.Module = self.model.base_model
        self.original = copy.deepcopy(self.model)
        self.pointers = {name: p.data_ptr() for name, p in self.model.named_parameters()}
        self.layout = layout_of(self.body, "model", 16, generates=kind == "llama")
        self.slots = LoraSlots(self.body, self.layout, 2)
        self.scope = LoraScope()
        with shared_inputs(self.body, self.layout.linears) as self.groups:
            output(self.model)
        patch_model(self.body, self.slots, self.scope, computing_of(computing), self.groups if grouped else ())

    def adapter(self, seed: int, bias: bool = False, dora: bool = False) -> Adapter:
        """LoRA on every layer, with every bias of the base where wished."""
        pairs = {
            name: random_pair(seed + i, shape.d_in, shape.d_out, 3, 0.2, bias and shape.has_bias)
            for i, (name, shape) in enumerate(self.layout.linears.items())
        }
        rng = torch.Generator().manual_seed(seed)
        for pair in pairs.values() if dora else ():
            pair.magnitude = torch.rand(len(pair.b), generator=rng) + 0.5
        biases = {name: torch.randn(d, generator=rng) for name, d in self.layout.norms.items()} if bias else {}
        return adapter_of(pairs, biases=biases)

    def merged(self, adapter: Adapter) -> PreTrainedModel:
        """The base with the adapter's weights added into its own."""
        model = copy.deepcopy(self.original)
        for name, pair in adapter.pairs.items():
            linear = as_linear(model.base_model.get_submodule(name))
            assert linear is not None
            linear.weight += pair.scaling * pair.b @ pair.a
            if pair.magnitude is not None:
                linear.weight *= (pair.magnitude / linear.weight.norm(dim=1))[:, None]
            if pair.bias is not None:
                linear.bias.copy_(pair.bias)
        for name, bias in adapter.biases.items():
            norm = model.base_model.get_submodule(name)
            assert isinstance(norm, nn.LayerNorm)
            norm.bias.copy_(bias)
        return model


@torch.no_grad()
def output(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    result = model(input_ids=ids)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize(
    "slots",
    [
        pytest.param(None, id="no-batch"),
        pytest.param([NO_SLOT] * IDS.numel(), id="base-only"),
        pytest.param([1] * IDS.numel(), id="empty-slot"),
    ],
)
def test_without_adapters_a_patched_model_is_the_base_bit_for_bit(kind: str, slots: list[int] | None) -> None:
    patched = Patched(kind)
    patched.slots.write(0, patched.adapter(seed=1))
    if slots is None:
        after = output(patched.model)
    else:
        with patched.scope.use(LoraBatch.of_slots(slots)):
            after = output(patched.model)
    assert torch.equal(after, output(patched.original))


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "alone"])
@pytest.mark.parametrize("computing", COMPUTING)
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_each_row_equals_the_model_with_its_adapter_merged(
    kind: str, computing: str, grouped: bool, dora: bool
) -> None:
    patched = Patched(kind, computing, grouped)
    adapters = [patched.adapter(seed=10, dora=dora), patched.adapter(seed=50, bias=True, dora=dora)]
    expected = [patched.merged(adapters[0]), patched.merged(adapters[1]), patched.original]
    for slot, adapter in enumerate(adapters):
        patched.slots.write(slot, adapter)
    with patched.scope.use(LoraBatch.of_slots([0] * 4 + [1] * 4 + [NO_SLOT] * 4)):
        mixed = output(patched.model)
    rows = [output(model)[row] for row, model in enumerate(expected)]
    assert (rows[0] - rows[2]).abs().max() > 0.1, "the same text must differ with and without the adapter"
    for row, alone in enumerate(rows):
        assert (mixed[row] - alone).abs().max() <= 1e-4 * alone.abs().max()


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_parameters_are_shared_not_copied(kind: str) -> None:
    patched = Patched(kind)
    after = {name.replace(".base.", "."): p.data_ptr() for name, p in patched.model.named_parameters()}
    assert after == patched.pointers


@pytest.mark.skipif(not can_pack(nn.Linear(2, 2)), reason="this processor's weights are not packed")
@pytest.mark.parametrize("rows", [1, 2, 31, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_is_the_plain_one(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(96, 40, bias=bias)
    x = torch.randn(1, rows, 96)
    expected = linear(x).detach()
    torch.testing.assert_close(PackedLinear(linear)(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(PackedLinear(linear)(x.transpose(0, 1)), expected.transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not can_pack(nn.Linear(2, 2)), reason="this processor's weights are not packed")
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_a_packed_model_holds_no_weights_of_its_layers(kind: str) -> None:
    patched = Patched(kind, "packed")
    with patched.scope.use(LoraBatch.of_slots([NO_SLOT] * IDS.numel())):
        torch.testing.assert_close(output(patched.model), output(patched.original), rtol=1e-4, atol=1e-4)
    weights = {name for name, _ in patched.body.named_parameters() if name.endswith(".base.weight")}
    assert not weights


@pytest.mark.parametrize("computing", ["packed", *usable_targets()])
@torch.no_grad()
def test_a_packed_head_gives_the_logits_of_the_plain_one(computing: str) -> None:
    patched = Patched("llama")
    before = output(patched.original)
    layers = with_packed_head(patched.model, computing_of(computing))
    assert layers.output is not None
    assert type(layers.output.layer.base) is not nn.Linear
    after = output(patched.model)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert layers.embedding is not None
    assert type(layers.embedding.base) is nn.Embedding


def with_packed_head(model: Any, computing: Computing) -> TokenLayers:
    """Embedding and head of a model patched and packed."""
    layout = with_token_layers(layout_of(model.model, "model", 16, generates=True), model, model.model)
    slots = LoraSlots(nn.Module(), replace(layout, linears={}, norms={}), 2, output=output_of(model, layout))
    layers = patch_tokens(model, model.model, slots, LoraScope(), computing)
    pack_tokens(layers, computing)
    return layers


class Scaled(nn.Embedding):
    """As Gemma's is."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@torch.no_grad()
def test_a_tied_embedding_is_read_from_the_packed_head(library: Library) -> None:
    model: Any = tiny_model("llama")
    model.lm_head.weight = model.get_input_embeddings().weight
    before = output(model)
    weight = weakref.ref(model.lm_head.weight)
    layers = with_packed_head(model, Computing(NativeLora(library), library))
    assert layers.embedding is not None
    assert type(layers.embedding.base) is NativeEmbedding
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-4)
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("quantize", ["", "int8"])
@torch.no_grad()
def test_an_embedding_that_a_packed_head_cannot_replace_stays(library: Library, quantize: str) -> None:
    model: Any = tiny_model("llama")
    embedding = nn.Embedding(40, 16) if quantize else Scaled(40, 16)
    model.set_input_embeddings(embedding)
    model.lm_head.weight = embedding.weight
    layers = with_packed_head(model, Computing(NativeLora(library), library, quantize=quantize))
    kept = model.get_input_embeddings() if layers.embedding is None else layers.embedding.base
    assert kept is embedding


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("computing", ["packed", *usable_targets()])
def test_packing_lets_go_of_the_checkpoint_layer_by_layer(
    computing: str, kind: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linears: list[Any] = [kind(512, 512) for _ in range(4)]
    body = nn.Sequential(*linears).requires_grad_(False)
    file = tmp_path / "model.safetensors"
    save_file(body.state_dict(), file)
    body.load_state_dict(load_file(file), assign=True)
    weights = [linear.weight for linear in linears]  # the file stays mapped
    saved = [weight.clone() for weight in weights]
    layout = layout_of(body, "", 512, generates=False)
    resident: list[int] = []
    leave = MappedFiles.leave

    def noted(files: MappedFiles, tensor: Tensor) -> None:
        leave(files, tensor)
        resident.append(resident_bytes_of(file))

    monkeypatch.setattr(MappedFiles, "leave", noted)
    patch_model(body, LoraSlots(body, layout, 1), LoraScope(), computing_of(computing))
    assert len(resident) == len(weights)
    assert resident[0] - resident[-1] >= 2.5 * weights[0].nbytes
    assert all(torch.equal(weight, before) for weight, before in zip(weights, saved, strict=True))


def test_a_head_that_shall_not_be_packed_stays() -> None:
    patched = Patched("llama")
    head = patched.model.get_output_embeddings()
    layers = with_packed_head(patched.model, computing_of("torch"))
    assert layers.output is not None
    assert layers.output.layer.base is head


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_a_model_computed_by_the_cpu_kernels_holds_no_weights_of_its_layers(library: Library, kind: str) -> None:
    patched = Patched(kind, next(t for t in usable_targets() if library_of(t) is library))
    names = {name for name, _ in patched.body.named_parameters()}
    assert names
    assert not any(name.startswith(layer) for layer in patched.layout.linears for name in names)
    with patched.scope.use(LoraBatch.of_slots([NO_SLOT] * IDS.numel())):
        torch.testing.assert_close(output(patched.model), output(patched.original), rtol=1e-4, atol=1e-4)


def test_a_conv1d_is_a_linear_layer_that_shares_its_memory() -> None:
    """Not any module of that name, nor one that may compute something else."""

    class Special(Conv1D):
        pass

    conv, x = Conv1D(5, 3), torch.randn(4, 3)
    linear = as_linear(conv)
    assert linear is not None
    assert (linear.in_features, linear.out_features) == (3, 5)
    assert linear.weight.data_ptr() == conv.weight.data_ptr()
    torch.testing.assert_close(linear(x), conv(x))
    assert as_linear(nn.Conv1d(3, 5, 1)) is None
    assert as_linear(Special(5, 3)) is None
    assert as_linear(type("Conv1D", (nn.Conv1d,), {})(3, 5, 1)) is None


def test_layers_that_read_the_same_tensor_are_found() -> None:
    groups = Patched("llama").groups
    assert groups == [
        group
        for layer in ("layers.0", "layers.1")
        for group in (
            [f"{layer}.self_attn.{part}_proj" for part in "qkv"],
            [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"],
        )
    ]


@torch.no_grad()
def test_a_layer_that_is_called_more_than_once_is_in_no_group() -> None:
    body, _ = small_base()
    with shared_inputs(body, ["plain", "biased"]) as groups:
        x = torch.randn(2, HIDDEN)
        body.plain(x), body.biased(x)
    assert groups == [["plain", "biased"]]
    with shared_inputs(body, ["plain", "biased"]) as groups:
        body.plain(x), body.biased(x), body.plain(x)
    assert groups == []
    with shared_inputs(body, ["plain", "biased"]) as groups:
        body.plain(x), body.biased(x.clone())
    assert groups == []
    assert not body.plain._forward_pre_hooks


def test_every_linear_layer_of_the_body_is_patched_and_nothing_else() -> None:
    patched = Patched("llama")
    kinds = {name: type(module) for name, module in patched.body.named_modules()}
    assert {name for name, kind in kinds.items() if kind is LoraLinear} == set(patched.layout.linears)
    assert len(patched.layout.linears) == 2 * 7
    assert {name for name, kind in kinds.items() if kind is nn.Linear} == {f"{n}.base" for n in patched.layout.linears}
    assert type(patched.model.get_output_embeddings()) is nn.Linear


def lora_linear() -> LoraLinear:
    body, layout = small_base()
    slots = LoraSlots(body, layout, 1)
    slots.write(0, adapter_of({PLAIN: random_pair(1, HIDDEN, 12, 2)}))
    group = LoraGroup(PlainProducts([body.plain]), [slots.weights[PLAIN]], LoraScope(), add_lora_segments)
    return LoraLinear(body.plain, group, 0)


def use(group: LoraGroup, batch: LoraBatch) -> AbstractContextManager[None]:
    assert isinstance(group.scope, LoraScope)
    return group.scope.use(batch)


@pytest.mark.parametrize("shape", [(4, HIDDEN), (1, 4, HIDDEN), (2, 2, HIDDEN), (4, 1, HIDDEN)])
def test_rows_are_counted_over_all_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer, x = lora_linear(), torch.randn(4, HIDDEN)
    with use(layer.group, LoraBatch.of_slots([0, NO_SLOT, 0, 0])):
        y = layer(x.view(shape))
        assert y.shape == (*shape[:-1], 12)
        assert torch.equal(y.view(4, 12), layer(x))


@pytest.mark.parametrize("rows", [0, 1, 3, 5])
def test_another_number_of_rows_than_the_batch_has_tokens_is_an_error(rows: int) -> None:
    layer = lora_linear()
    with (
        use(layer.group, LoraBatch.of_slots([0, 0, 0, NO_SLOT])),
        pytest.raises(RuntimeError, match=rf"{rows} rows in a batch of 4 tokens"),
    ):
        layer(torch.zeros(rows, HIDDEN))


def test_a_transposed_input_is_taken_as_it_reads() -> None:
    layer, x = lora_linear(), torch.randn(HIDDEN, 4).T
    assert not x.is_contiguous()
    with use(layer.group, LoraBatch.of_slots([0] * 4)):
        torch.testing.assert_close(layer(x), layer(x.contiguous()))


class Counted:
    """Products of the layers of `small_base`; notes the inputs."""

    fused = False

    def __init__(self) -> None:
        self.body, layout = small_base()
        slots = LoraSlots(self.body, layout, 1)
        pairs = {name: random_pair(1, HIDDEN, shape.d_out, 2) for name, shape in layout.linears.items()}
        slots.write(0, adapter_of(pairs))
        self.inputs: list[Tensor] = []
        self.group = LoraGroup(self, [*slots.weights.values()], LoraScope(), add_lora_segments)
        self.layers = [LoraLinear(None, self.group, index) for index in range(2)]

    def compute(self, x: Tensor, batch: LoraBatch | None) -> list[Tensor]:
        assert batch is None
        self.inputs.append(x)
        return [self.body.plain(x), self.body.biased(x)]

    def expected(self, index: int, x: Tensor) -> Tensor:
        """With the adapter on all rows but the last."""
        y = [self.body.plain, self.body.biased][index](x)
        batch = LoraBatch.of_slots([0] * (len(x) - 1) + [NO_SLOT])
        add_lora_reference([y], x, [self.group.weights[index]], batch)
        return y


@pytest.mark.parametrize(
    ("asked", "computed"),
    [
        pytest.param([(0, 0), (1, 0)], 1, id="in order"),
        pytest.param([(1, 0), (0, 0)], 1, id="in another order"),
        pytest.param([(0, 0), (1, 0), (0, 0), (1, 0)], 2, id="all of them twice"),
        pytest.param([(0, 0), (0, 0), (1, 0)], 2, id="one twice"),
        pytest.param([(0, 0), (0, 1), (1, 1)], 2, id="another input between"),
        pytest.param([(0, 0), (0, 1), (1, 0)], 3, id="back to the first input"),
        pytest.param([(0, 0), (1, 1), (0, 1), (1, 0)], 3, id="crossed"),
        pytest.param([(1, 2)], 1, id="one alone"),
    ],
)
def test_members_of_a_group_in_any_order(asked: list[tuple[int, int]], computed: int) -> None:
    """asked: (layer, input)."""
    counted, inputs = Counted(), [torch.randn(4, HIDDEN) for _ in range(3)]
    with use(counted.group, LoraBatch.of_slots([0, 0, 0, NO_SLOT])):
        for index, number in asked:
            y = counted.layers[index](inputs[number])
            torch.testing.assert_close(y, counted.expected(index, inputs[number]))
    assert len(counted.inputs) == computed


def test_a_group_keeps_nothing_once_all_members_were_asked() -> None:
    counted = Counted()
    x = torch.randn(4, HIDDEN)
    inputs = weakref.ref(x)
    outputs = [layer(x) for layer in counted.layers]
    assert [len(y) for y in outputs] == [4, 4]
    counted.inputs.clear()
    del x
    gc.collect()
    assert inputs() is None


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"),
        ("model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"),
        ("model.model.layers.0.self_attn.q_proj", None),
        ("layers.2.self_attn.q_proj", None),
        ("self_attn.q_proj", None),
        ("embed_tokens", None),
        ("lm_head", None),
        ("", None),
    ],
)
def test_a_layout_finds_a_layer_by_its_whole_name_only(name: str, found: str | None) -> None:
    layout = layout_of(tiny_model("llama").base_model, "model", 16, generates=True)
    assert layout.find(name) == found

"""merge: what `peft`'s add_weighted_adapter makes of the same adapters; what it does not take is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters.adapter import Adapter, Limits
from adapters.checkpoint import read_checkpoint
from adapters.errors import InvalidAdapter
from adapters.layout import BaseLayout, layout_of, with_token_layers
from adapters.merge import METHODS, Merging, merge
from tests.support import Spec, make_adapter, save_tiny_base

ALIKE = [
    Spec("a", "CAUSAL_LM", 4, ["q_proj", "up_proj"], options={"lora_alpha": 6}),
    Spec("b", "CAUSAL_LM", 4, ["q_proj", "o_proj"], options={"lora_alpha": 20}),
    Spec("c", "CAUSAL_LM", 4, ["q_proj", "up_proj", "o_proj"]),
]
WEIGHTS = [0.7, -0.4, 1.2]
UNLIKE = [
    Spec("larger", "CAUSAL_LM", 7, ["q_proj"], options={"rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
    Spec("tags", "TOKEN_CLS", 4, ["q_proj"], labels=3),
    Spec("dora", "CAUSAL_LM", 4, ["q_proj"], options={"use_dora": True}),
]


KNOWING_TOKENS = [
    Spec("words", "CAUSAL_LM", 4, ["q_proj", "embed_tokens"], options={"lora_alpha": 6}),
    Spec("logits", "CAUSAL_LM", 4, ["embed_tokens", "lm_head"]),
]
OWN_HEAD = Spec("own-head", "CAUSAL_LM", 4, ["q_proj"], options={"modules_to_save": ["lm_head"]})


class Case:
    """A base with adapters, and peft's model of them."""

    def __init__(self, folder: Path) -> None:
        location = save_tiny_base("tiny-llama", folder / "base")
        self.base = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
        self.layout: BaseLayout = with_token_layers(
            layout_of(self.base.model, "model", 64, True), self.base, self.base.model
        )
        specs = [*ALIKE, *UNLIKE, *KNOWING_TOKENS, OWN_HEAD]
        self.checkpoints = {spec.name: make_adapter(location, folder, spec) for spec in specs}

    def read(self, *names: str) -> list[Adapter]:
        return [self.read_from(self.checkpoints[name]) for name in names]

    def read_from(self, checkpoint: Path) -> Adapter:
        return read_checkpoint(checkpoint, self.layout, Limits())

    def deltas(self, names: list[str], weights: list[float], method: str) -> dict[str, Tensor]:
        """What peft's merged adapter adds to W, by layer."""
        model: Any = PeftModel.from_pretrained(self.base, self.checkpoints[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(self.checkpoints[name], adapter_name=name)
        model.add_weighted_adapter(names, weights, "merged", method, density=0.5)
        found = {
            layer: model.base_model.model.model.get_submodule(layer).get_delta_weight("merged").detach()
            for layer in self.layout.linears
            if "merged" in getattr(model.base_model.model.model.get_submodule(layer), "lora_A", {})
        }
        self.base = model.unload()
        return found


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("merge"))


@pytest.mark.parametrize("method", ["cat", "linear", "ties"])
def test_the_merged_adapter_changes_w_as_pefts_does(case: Case, method: str, tmp_path: Path) -> None:
    names = [spec.name for spec in ALIKE]
    merge(case.read(*names), WEIGHTS, case.layout, tmp_path / "merged", Merging(method))
    merged, expected = case.read_from(tmp_path / "merged"), case.deltas(names, WEIGHTS, method)
    assert merged.pairs.keys() == expected.keys()
    for layer, pair in merged.pairs.items():
        assert pair.scaling == 1
        torch.testing.assert_close(pair.b.float() @ pair.a.float(), expected[layer], rtol=1e-5, atol=1e-5)
    model: Any = PeftModel.from_pretrained(case.base, tmp_path / "merged")  # a checkpoint as good as any
    loaded = model.base_model.model.model.layers[1].self_attn.q_proj
    torch.testing.assert_close(
        loaded.get_delta_weight("default"), expected["layers.1.self_attn.q_proj"], rtol=1e-5, atol=1e-5
    )
    case.base = model.unload()


def test_concatenation_takes_any_ranks(case: Case, tmp_path: Path) -> None:
    adapters = case.read("a", "larger")
    merge(adapters, [0.5, 2.0], case.layout, tmp_path / "merged", Merging("cat"))
    merged = case.read_from(tmp_path / "merged")
    assert {len(merged.pairs[f"layers.{i}.self_attn.q_proj"].a) for i in (0, 2)} == {11}
    assert len(merged.pairs["layers.1.self_attn.q_proj"].a) == 6
    for layer, pair in merged.pairs.items():
        parts = [(a.pairs[layer], w) for a, w in zip(adapters, [0.5, 2.0], strict=True) if layer in a.pairs]
        expected = sum(w * p.scaling * p.b.float() @ p.a.float() for p, w in parts)
        torch.testing.assert_close(pair.b.float() @ pair.a.float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_choices_are_pefts_for_the_same_seed(case: Case, method: str, tmp_path: Path) -> None:
    """Of one layer, so that the order of layers does not matter."""
    names, layer = ["a", "c"], "layers.0.self_attn.q_proj"
    adapters = case.read(*names)
    only = BaseLayout({layer: case.layout.linears[layer]}, "model", 64, True)
    merge(adapters, [0.3, 0.9], only, tmp_path / "merged", Merging(method, density=0.6, seed=5))
    merged = read_checkpoint(tmp_path / "merged", only, Limits()).pairs[layer]
    pairs = [adapter.pairs[layer] for adapter in adapters]
    roots = torch.tensor([(w * pair.scaling) ** 0.5 for w, pair in zip([0.3, 0.9], pairs, strict=True)])
    torch.manual_seed(5)
    combine = getattr(merge_utils, method)
    torch.testing.assert_close(merged.a, combine([pair.a.float() for pair in pairs], roots, 0.6))
    torch.testing.assert_close(merged.b, combine([pair.b.float() for pair in pairs], roots, 0.6))


@pytest.mark.parametrize(
    ("names", "weights", "how", "fault"),
    [
        ([], [], Merging(), "0 adapters cannot be merged with 0 weights"),
        (["a"], [1.0, 2.0], Merging(), "1 adapters cannot be merged with 2 weights"),
        (["a"], [float("nan")], Merging(), "the weights must be finite"),
        (["a"], [1.0], Merging("svd"), "the method 'svd' is not supported, only cat"),
        (["a"], [1.0], Merging("ties", density=1.0), "the density must lie between 0 and 1, not 1.0"),
        (["a", "tags"], [1.0, 1.0], Merging(), "the adapters have different tasks"),
        (["tags"], [1.0], Merging(), "adapter 0 has a head, biases, magnitudes or tokens"),
        (["a", "dora"], [1.0, 1.0], Merging(), "adapter 1 has a head, biases, magnitudes or tokens"),
        (["a", "larger"], [1.0, 1.0], Merging("linear"), r"the ranks on .*q_proj' differ"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    case: Case, names: list[str], weights: list[float], how: Merging, fault: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidAdapter, match=fault):
        merge(case.read(*names), weights, case.layout, tmp_path / "merged", how)
    assert not (tmp_path / "merged").exists()


def test_every_method_is_tested() -> None:
    assert set(METHODS) == {"cat", "linear", "ties", "dare_linear", "dare_ties"}


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_lora_on_embeddings_and_heads_is_merged_as_pefts(case: Case, method: str, tmp_path: Path) -> None:
    names = [spec.name for spec in KNOWING_TOKENS]
    merge(case.read(*names), WEIGHTS[:2], case.layout, tmp_path / "merged", Merging(method))
    merged = case.read_from(tmp_path / "merged")
    model: Any = PeftModel.from_pretrained(case.base, case.checkpoints[names[0]], adapter_name=names[0])
    model.load_adapter(case.checkpoints[names[1]], adapter_name=names[1])
    model.add_weighted_adapter(names, WEIGHTS[:2], "merged", method)
    model.load_adapter(tmp_path / "merged", adapter_name="ours")
    inner = model.base_model.model
    for name, layer in (("embed_tokens", inner.model.embed_tokens), ("lm_head", inner.lm_head)):
        expected = layer.get_delta_weight("merged").detach()
        pair = merged.pairs[name]
        delta = pair.b.float() @ pair.a.float()
        torch.testing.assert_close(delta.T if name == "embed_tokens" else delta, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.get_delta_weight("ours").detach(), expected, rtol=1e-5, atol=1e-5)
    case.base = model.unload()


def test_a_whole_head_is_not_merged(case: Case, tmp_path: Path) -> None:
    """Nor is it by peft, where several adapters have one."""
    with pytest.raises(InvalidAdapter, match="adapter 1 has a head, biases, magnitudes or tokens"):
        merge(case.read("a", "own-head"), [1.0, 1.0], case.layout, tmp_path / "merged", Merging())

"""What a checkpoint has of the embedding and the language-model head: where it went, and why it is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters.adapter import Adapter, Limits
from adapters.checkpoint import read_checkpoint
from adapters.errors import InvalidAdapter
from adapters.layout import BaseLayout
from server.config import ServerConfig
from server.engine.base_model import load_base
from server.inspection import inspect
from tests.support import Spec, make_adapter, rewrite_tensors, save_tiny_base

ROOT = "base_model.model."
EMBEDDING, HEAD = f"{ROOT}model.embed_tokens", f"{ROOT}lm_head"
DELTA = "token_adapter.trainable_tokens_delta"
LORA, OWN = ["q_proj", "embed_tokens", "lm_head"], {"modules_to_save": ["embed_tokens", "lm_head"]}
SPECS = [
    Spec("plain", "CAUSAL_LM", 4, ["q_proj"]),
    Spec("lora", "CAUSAL_LM", 4, LORA),
    Spec("own", "CAUSAL_LM", 4, ["q_proj"], options=OWN),
    Spec("tokens", "CAUSAL_LM", 4, ["q_proj"], options={"trainable_token_indices": [9, 5]}),
    Spec("more", "CAUSAL_LM", 4, ["q_proj"], vocabulary=330),
    Spec("classes", "SEQ_CLS", 4, ["q_proj"], labels=3),
    Spec("tied", "CAUSAL_LM", 4, ["embed_tokens"], options={"ensure_weight_tying": True}),
    Spec("own-tied", "CAUSAL_LM", 4, ["q_proj"], options={**OWN, "ensure_weight_tying": True}),
]  # fmt: skip
Tensors = dict[str, Tensor]


class Workshop:
    """Checkpoints of a tied and an untied base, to copy and to spoil."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layouts: dict[str, BaseLayout] = {}
        self.good: dict[str, Path] = {}
        for kind in ("tiny-llama", "tiny-tied-llama"):
            location = save_tiny_base(kind, folder / kind)
            self.layouts[kind] = load_base(str(location)).layout
            for spec in SPECS:
                if ("tied" in spec.name) == (kind == "tiny-tied-llama"):
                    self.good[spec.name] = make_adapter(location, folder / "good", spec)

    def layout_for(self, name: str) -> BaseLayout:
        return self.layouts["tiny-tied-llama" if "tied" in name else "tiny-llama"]

    def read(self, name: str, **of_layout: Any) -> Adapter:
        return read_checkpoint(self.good[name], replace(self.layout_for(name), **of_layout), Limits())

    def reasons(
        self, name: str, folder: Path, change: Callable[[Tensors], object] | None = None, **config: Any
    ) -> tuple[str, ...]:
        """Why the checkpoint is refused with other tensors or another config."""
        copy = folder / name
        shutil.copytree(self.good[name], copy)
        if change is not None:
            rewrite_tensors(copy, change)
        file = copy / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        with pytest.raises(InvalidAdapter) as caught:
            read_checkpoint(copy, self.layout_for(name), Limits())
        return caught.value.reasons


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("tokens"))


def removed(key: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(key)


def added(key: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


REFUSED: list[tuple[str, Callable[[Tensors], object] | None, dict[str, Any], str]] = [
    ("lora", removed(f"{HEAD}.lora_A.weight"), {}, "'lm_head' lacks lora_A"),
    ("lora", removed(f"{EMBEDDING}.lora_embedding_B"), {}, "'model.embed_tokens' lacks lora_B"),
    ("lora", added(f"{EMBEDDING}.lora_A.weight", 4, 320), {}, "'model.embed_tokens' has lora_A of a linear layer"),
    ("lora", added(f"{HEAD}.lora_embedding_A", 320), {}, "'lm_head' has lora_embedding_A, which no layer of its kind"),
    ("lora", added(f"{EMBEDDING}.lora_embedding_A", 4, 319), {}, r"has shape \(4, 319\), this base needs \(4, 320\)"),
    ("lora", added(f"{HEAD}.base_layer.weight", 320, 63), {}, r"'lm_head' has shape \(320, 63\), .* \(tokens, 64\)"),
    ("lora", added(f"{HEAD}.base_layer.bias", 320), {}, "'lm_head' has a bias, but not in this base"),
    ("lora", None, {"target_modules": ["q_proj", "lm_head"]}, "'model.embed_tokens' is not among target_modules"),
    ("lora", None, {"target_modules": "all-linear"}, "'lm_head' is not among target_modules"),
    ("plain", None, {"target_modules": ["q_proj", "lm_head"]}, "'lm_head' is a target but its weights are missing"),
    ("plain", None, {"target_modules": ["q_proj", "wte"]}, "target_modules names 'wte', for which there are no"),
    ("lora", None, {"use_dora": True}, "use_dora on 'model.embed_tokens' is not supported"),
    ("lora", added(f"{HEAD}.base_layer.weight", 320, 64), {"use_dora": True}, "use_dora on 'lm_head' is not supported"),
    ("lora", None, {"lora_bias": True}, "lora_bias on 'model.embed_tokens' is not supported"),
    ("own", removed(f"{HEAD}.weight"), {}, "modules_to_save names 'lm_head', for which there are no weights"),
    ("own", added(f"{EMBEDDING}.weight", 330, 64), {}, "its embedding has 330 tokens, its language-model head 320"),
    ("own", added(f"{EMBEDDING}.modules_to_save.weight", 320, 64), {}, "'embed_tokens' has weights of its own twice"),
    ("own", None, {"trainable_token_indices": {"lm_head": [1]}}, "both modules_to_save and trainable_token_indices"),
    ("tokens", removed(f"{EMBEDDING}.{DELTA}"), {}, "names 'embed_tokens', for which there are no rows"),
    ("tokens", added(f"{EMBEDDING}.{DELTA}", 3, 64), {}, r"rows of 'embed_tokens' .* \(3, 64\), not \(2, 64\)"),
    ("tokens", added(f"{HEAD}.{DELTA}", 2, 64), {}, "'lm_head' has tokens' rows, which trainable_token_indices lacks"),
    ("tokens", None, {"trainable_token_indices": [9, 320]}, "has token 320, 'embed_tokens' has 320"),
    ("tokens", None, {"trainable_token_indices": [9, 9]}, "trainable_token_indices names a token twice"),
    ("tokens", None, {"trainable_token_indices": [9, -1]}, "must be a list of token ids"),
    ("tokens", None, {"trainable_token_indices": {"q_proj": [9, 5]}}, "'q_proj' is no embedding of this base"),
    ("lora", added(f"{EMBEDDING}.{DELTA}", 1, 64), {"trainable_token_indices": [3]}, "has both LoRA and tokens' rows"),
    ("classes", added(f"{HEAD}.weight", 320, 64), {}, "tensor 'base_model.model.lm_head.weight' has no place"),
    ("more", removed(f"{HEAD}.weight"), {}, "its embedding has 330 tokens, its language-model head 320"),
    ("tied", removed(f"{HEAD}.lora_A.weight"), {}, "'lm_head' lacks lora_A"),
    ("tied", lambda t: t[f"{HEAD}.lora_A.weight"].mul_(2), {}, "the LoRA on 'lm_head' is not that of the embedding"),
    ("tied", None, {"ensure_weight_tying": False}, "'lm_head' is not among target_modules"),
    ("own-tied", lambda t: t[f"{HEAD}.weight"].mul_(2), {}, "embedding and language-model head have other weights"),
    ("own-tied", removed(f"{HEAD}.weight"), {}, "the language-model head has no weights of its own"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "config", "reason"), REFUSED, ids=[each[-1][:60] for each in REFUSED])
def test_what_does_not_fit_is_refused(
    workshop: Workshop,
    tmp_path: Path,
    name: str,
    change: Callable[[Tensors], object] | None,
    config: dict[str, Any],
    reason: str,
) -> None:
    reasons = workshop.reasons(name, tmp_path, change, **config)
    assert any(re.search(reason, each) for each in reasons), reasons


def test_an_unchanged_layer_saved_with_its_lora_is_not_kept(workshop: Workshop) -> None:
    """PEFT saves it whole; where the base's weights are not known, it is."""
    adapter = workshop.read("lora")
    assert adapter.tokens is None
    assert {"embed_tokens", "lm_head"} <= adapter.pairs.keys()
    layout = workshop.layout_for("lora")
    assert layout.embedding is not None
    assert layout.output is not None
    unknown = workshop.read(
        "lora",
        embedding=replace(layout.embedding, digest=lambda: None),
        output=replace(layout.output, digest=lambda: None),
    )
    assert unknown.tokens is not None
    assert unknown.nbytes - adapter.nbytes == 2 * 320 * 64 * 4


def test_own_layers_take_their_room(workshop: Workshop) -> None:
    assert workshop.read("own").nbytes - workshop.read("plain").nbytes >= 2 * 320 * 64 * 4
    assert workshop.read("own").info.vocabulary_size == 0
    assert workshop.read("more").info.vocabulary_size == 330


def test_rows_are_held_in_ascending_order(workshop: Workshop) -> None:
    tokens = workshop.read("tokens").tokens
    assert tokens is not None
    assert tokens.embedding_rows is not None
    assert tokens.embedding_rows.ids == (5, 9)
    assert tokens.output_rows is None
    saved = load_file(workshop.good["tokens"] / "adapter_model.safetensors")[f"{EMBEDDING}.{DELTA}"]
    assert torch.equal(tokens.embedding_rows.rows, saved[[1, 0]])


def test_every_tensor_is_told(workshop: Workshop) -> None:
    assert workshop.read("own").coverage[f"{HEAD}.weight"] == "weight of its own lm_head"
    assert workshop.read("tokens").coverage[f"{EMBEDDING}.{DELTA}"] == "rows of tokens of model.embed_tokens"
    assert workshop.read("lora").coverage[f"{EMBEDDING}.lora_embedding_A"] == "lora_embedding_A of model.embed_tokens"


def test_a_base_whose_embedding_cannot_be_changed_refuses_by_name(workshop: Workshop) -> None:
    with pytest.raises(InvalidAdapter, match=r"no linear layer 'model.embed_tokens'"):
        workshop.read("lora", embedding=None)


@pytest.mark.parametrize(("name", "base"), [("lora", "tiny-llama"), ("tied", "tiny-tied-llama"), ("own", "tiny-llama")])
def test_inspect_tells_the_room_that_it_takes(workshop: Workshop, name: str, base: str) -> None:
    told = inspect(workshop.good[name], ServerConfig(base=str(workshop.folder / base), device="cpu"))
    assert told.report is not None
    assert told.report.host_bytes == workshop.read(name).nbytes


@pytest.mark.parametrize("missing", ["embedding", "output"])
def test_another_vocabulary_needs_both_layers(workshop: Workshop, tmp_path: Path, missing: str) -> None:
    copy = Path(shutil.copytree(workshop.good["more"], tmp_path / "more"))
    rewrite_tensors(copy, removed(f"{EMBEDDING if missing == 'embedding' else HEAD}.weight"))
    whole = workshop.layout_for("more")
    layout = replace(whole, embedding=None) if missing == "embedding" else replace(whole, output=None)
    with pytest.raises(InvalidAdapter, match="has 330 tokens, on this base adapters must have 320"):
        read_checkpoint(copy, layout, Limits())

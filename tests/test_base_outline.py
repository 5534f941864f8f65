"""What is told of a base without its weights is what the engine finds with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AlbertConfig, LlamaConfig, LlamaForCausalLM, WhisperConfig

from server.config import ServerConfig
from server.engine.base_model import UnsupportedBase, load_base
from server.engine.base_outline import read_outline
from server.engine.engine import Engine
from tests.bases import COMMON, DECODERS, ENCODER_DECODERS, ENCODERS, PADDED_ENCODERS, TinyBase, fsmt

ALBERT = TinyBase("ALBERT", lambda: AlbertConfig(**COMMON, embedding_size=16), False)
"""Its pooler is not all of its pooling."""
BERT = next(base for base in ENCODERS if base.name == "BERT")
WEIGHTS = "model.safetensors"


@pytest.mark.parametrize(
    "base", [*DECODERS, *ENCODERS, *PADDED_ENCODERS, *ENCODER_DECODERS, ALBERT], ids=lambda base: base.name
)
def test_the_layout_is_the_engines(base: TinyBase, tmp_path: Path) -> None:
    location = str(base.save(tmp_path))
    engine = Engine(ServerConfig(kv_cache_bytes=1 << 20, max_loras=2, max_lora_rank=4), load_base(location), "base")
    assert read_outline(location).layout == engine.base.layout


def test_weights_are_not_needed(tmp_path: Path) -> None:
    outline = read_outline(str(BERT.save(tmp_path)))
    assert outline.layout.heads["SEQ_CLS"].given
    (tmp_path / WEIGHTS).unlink()
    assert read_outline(str(tmp_path)) == outline


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pooler_that_was_not_saved_is_none(sharded: bool, tmp_path: Path) -> None:
    location = BERT.save(tmp_path)
    tensors = {name: tensor for name, tensor in load_file(location / WEIGHTS).items() if "pooler" not in name}
    save_file(tensors, location / WEIGHTS, {"format": "pt"})
    if sharded:
        (location / WEIGHTS).rename(location / "model-1.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
        (location / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    layout = read_outline(str(location)).layout
    assert not layout.heads["SEQ_CLS"].given
    assert layout.linears == load_base(str(location)).layout.linears


def test_the_largest_base_takes_no_memory(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, vocab_size=128256, dtype=torch.bfloat16, architectures=[LlamaForCausalLM.__name__],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    outline = read_outline(str(tmp_path))
    assert outline.saved_dtype == torch.bfloat16
    assert len(outline.layout.linears) == 126 * 7
    assert sum(linear.d_in * linear.d_out for linear in outline.layout.linears.values()) > 4e11


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (WhisperConfig(), "whisper is an encoder-decoder that generates no text from text"),
        (fsmt(), "a language-model head that is no linear layer"),
        (LlamaConfig(**COMMON, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
    ],
    ids=["speech", "head", "dynamic"],
)
def test_a_base_that_its_config_rules_out(config: Any, reason: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBase, match=reason):
        read_outline(str(tmp_path))

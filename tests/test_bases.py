"""Where bases come from: the embedded packages, the converted GGUF, and names that lead nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

from server.bases import BaseNotFound, load_tokenizer, resolve_base


def test_spaces_before_digits_tokenise_as_in_training(base_location: dict[str, str]) -> None:
    tokenizer = load_tokenizer(base_location["smollm2"])
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  123")["input_ids"]) == ["a", "ĠĠ", "1", "2", "3"]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [19556, 28, 905, 17]),
        ("a  123", [81, 256, 33, 34, 35]),
    ],
)
def test_known_token_ids(base_location: dict[str, str], text: str, ids: list[int]) -> None:
    assert load_tokenizer(base_location["smollm2"])(text)["input_ids"] == ids


def test_the_converted_base_keeps_its_embedding_under_its_own_name(base_location: dict[str, str]) -> None:
    """A model without a language-model head would else begin with a random embedding."""
    with safe_open(Path(base_location["smollm2"]) / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    whole: Any = AutoModelForCausalLM.from_pretrained(base_location["smollm2"])
    body: Any = AutoModel.from_pretrained(base_location["smollm2"])
    assert torch.equal(whole.get_input_embeddings().weight, body.get_input_embeddings().weight)
    assert torch.equal(whole.lm_head.weight, whole.get_input_embeddings().weight)


def test_embedded_bases_have_their_logical_names() -> None:
    assert resolve_base("smollm2").logical_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve_base("minilm").logical_name == "sentence-transformers/all-MiniLM-L6-v2"
    assert resolve_base("minilm").name == "minilm"


def test_a_directory_is_a_base(base_location: dict[str, str]) -> None:
    source = resolve_base(base_location["tiny-llama"])
    assert (source.location, source.name) == (base_location["tiny-llama"], "tiny-llama")


@pytest.mark.parametrize("base", ["./absent", "/absent/model", "~/absent-model", "a/b/c"])
def test_paths_that_lead_nowhere(base: str) -> None:
    with pytest.raises(BaseNotFound, match="does not exist"):
        resolve_base(base)


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match=r"without a config\.json"):
        resolve_base(str(tmp_path))


def test_a_hub_id_is_passed_on() -> None:
    source = resolve_base("HuggingFaceTB/SmolLM2-360M")
    assert (source.location, source.name) == ("HuggingFaceTB/SmolLM2-360M", "SmolLM2-360M")

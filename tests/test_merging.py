"""`multilora merge`: one checkpoint of several, served as peft serves its own merged adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from server.cli import main
from server.merging import weighted
from tests.support import Runner, Spec, make_adapter, random_ids

SPECS = (Spec("a", "CAUSAL_LM", 4, ["q_proj", "up_proj"]), Spec("b", "CAUSAL_LM", 6, ["q_proj", "o_proj"]))


@pytest.fixture
def adapters(base_location: dict[str, str], tmp_path: Path) -> list[Path]:
    return [make_adapter(base_location["tiny-llama"], tmp_path, spec) for spec in SPECS]


def merged(base: str, out: Path, *more: str) -> int:
    return main(["merge", *more, "--base", base, "--out", str(out)])


def test_the_merged_adapter_is_served_as_pefts(
    adapters: list[Path], base_location: dict[str, str], tmp_path: Path
) -> None:
    base, out = base_location["tiny-llama"], tmp_path / "both"
    assert merged(base, out, f"{adapters[0]}=0.7", f"{adapters[1]}=-0.3") == 0
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapters[0], adapter_name="a"
    )
    model.load_adapter(adapters[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "both", "cat")
    model.set_adapter("both")
    ids = random_ids(12, 3)
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([ids])).logits[0].argmax(-1)
        with model.disable_adapter():
            alone = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1)
    assert not torch.equal(expected, alone)
    runner = Runner(base)
    runner.load(out)
    sequences = [runner.submit("CAUSAL_LM", ids[:n], "both") for n in range(1, len(ids) + 1)]
    runner.drain()
    got = [runner.outputs[sequence.id][-1].token_id for sequence in sequences]
    assert got == expected.tolist()


@pytest.mark.parametrize(
    ("more", "status", "reason"),
    [
        (["{a}", "--method", "svd"], 1, "the method 'svd' is not supported, only cat, linear"),
        (["{a}", "{b}", "--method", "ties"], 1, "the ranks on 'layers.0.self_attn.q_proj' differ"),
        (["{a}", "absent"], 1, "absent: adapter_config.json is missing"),
        (["{a}=nan"], 1, "the weights must be finite"),
    ],
)
def test_what_cannot_be_merged_is_told(
    more: list[str], status: int, reason: str, adapters: list[Path], base_location: dict[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [word.format(a=adapters[0], b=adapters[1]) for word in more]
    assert merged(base_location["tiny-llama"], tmp_path / "both", *given) == status
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "both").exists()


def test_nothing_is_written_over(
    adapters: list[Path], base_location: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merged(base_location["tiny-llama"], adapters[1], str(adapters[0])) == 2
    assert "File exists" in capsys.readouterr().err


def test_weights_stand_after_the_last_sign() -> None:
    assert weighted("dir/a") == (Path("dir/a"), 1.0)
    assert weighted("dir/x=y/a=-0.5") == (Path("dir/x=y/a"), -0.5)
    with pytest.raises(ValueError, match="could not convert"):
        weighted("a=b")

"""`multilora inspect` says of a checkpoint what the server does with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.adapter import Limits
from adapters.checkpoint import read_checkpoint
from adapters.report import describe
from server.cli import main
from server.config import ServerConfig
from server.engine.base_outline import read_outline
from server.inspection import inspect
from tests.support import TINY_ADAPTERS, Live, Spec, make_adapter, rewrite_tensors

NAMES = [spec.name for spec in TINY_ADAPTERS]


def told(path: Path, base: str, **settings: Any) -> dict[str, Any]:
    return inspect(path, ServerConfig(base=base, **settings)).as_json()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_the_server_tells(live: Live, base_location: dict[str, str], tiny_adapters: Path, name: str) -> None:
    ours = told(tiny_adapters / name, base_location["tiny-llama"])
    theirs = httpx.get(f"{live.url}/v1/adapters/{name}").json()
    assert ours.pop("base") == "tiny-llama"
    assert json.loads(json.dumps(ours)) == {key: theirs[key] for key in ours}
    unsaid = {"base", "tier", "pinned", "requests", "last_used", "loaded_in_s", "versions"}
    assert theirs.keys() - ours.keys() == unsaid


def test_each_layer_has_its_own_rank_and_scaling(base_location: dict[str, str], tmp_path: Path) -> None:
    options = {"rank_pattern": {"k_proj": 6}, "alpha_pattern": {"v_proj": 4}, "lora_alpha": 12}
    checkpoint = make_adapter(
        base_location["tiny-llama"], tmp_path, Spec("mixed", "CAUSAL_LM", 8, ["k_proj", "v_proj"], options=options)
    )
    found = told(checkpoint, base_location["tiny-llama"])
    assert found["modules"] == {
        f"layers.{i}.self_attn.{name}": {"rank": rank, "scaling": scaling}
        for i in range(3)
        for name, rank, scaling in (("k_proj", 6, 2.0), ("v_proj", 8, 0.5))
    }
    assert list(found["modules"]) == sorted(found["modules"])
    assert len(found["coverage"]) == 12
    numbers = 3 * (6 * (64 + 32) + 8 * (64 + 32))
    assert numbers * 4 <= found["host_bytes"] < numbers * 4 + 12 * 64, "each part begins on a cache line"
    assert found["bytes"] > numbers * 4
    assert found["slot_bytes"] == 0


def test_a_slot_of_a_gpu_holds_a_copy(base_location: dict[str, str], tiny_adapters: Path) -> None:
    limits = Limits()
    adapter = read_checkpoint(tiny_adapters / "tag", read_outline(base_location["tiny-llama"]).layout, limits)
    assert describe(adapter, limits).slot_bytes == 0
    report = describe(adapter, replace(limits, pinned=True))
    assert report.slot_bytes == report.host_bytes == adapter.nbytes > 0


def test_every_reason_is_told(base_location: dict[str, str], tmp_path: Path) -> None:
    checkpoint = make_adapter(base_location["tiny-llama"], tmp_path, Spec("broken", "CAUSAL_LM", 8, "all-linear"))
    config = checkpoint / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_qalora": True}))
    rewrite_tensors(checkpoint, lambda t: t.update({key: tensor * float("nan") for key, tensor in t.items()}))
    found = told(checkpoint, base_location["tiny-llama"])
    assert found["state"] == "refused"
    assert "use_qalora is not supported" in found["reasons"]
    assert sum("NaN" in reason for reason in found["reasons"]) >= 42


def test_the_limits_are_the_servers(base_location: dict[str, str], tiny_adapters: Path) -> None:
    found = told(tiny_adapters / "tag", base_location["tiny-llama"], max_lora_rank=8)
    assert "rank 16 of 'model.layers.0.self_attn.q_proj' is over the limit 8" in found["reasons"]


def test_a_checkpoint_for_another_base(base_location: dict[str, str], tiny_adapters: Path) -> None:
    found = told(tiny_adapters / "chat-a", base_location["tiny-bert"])
    assert "the base has no linear layer 'model.layers.2.self_attn.v_proj'" in found["reasons"]


def test_on_the_command_line(
    base_location: dict[str, str], tiny_adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--base", base_location["tiny-llama"]]
    assert main(["inspect", str(tiny_adapters / "sort"), *base]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sort is served on tiny-llama as SEQ_CLS"
    assert "  labels        LABEL_0, LABEL_1, LABEL_2 (single_label_classification)" in lines
    assert "  layers.0.self_attn.q_proj  rank 8, scaling 2" in lines
    assert any(line.endswith("lora_A of model.layers.0.self_attn.q_proj") for line in lines)

    assert main(["inspect", str(tiny_adapters / "sort"), *base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(told(tiny_adapters / "sort", base[1])))

    shutil.copytree(tiny_adapters / "sort", tmp_path / "sort")
    (tmp_path / "sort" / "adapter_model.safetensors").unlink()
    assert main(["inspect", str(tmp_path / "sort"), *base]) == 1
    assert capsys.readouterr().out == ("sort is refused on tiny-llama:\n  adapter_model.safetensors is missing\n")
    assert main(["inspect", str(tmp_path / "sort"), *base, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["reasons"] == ["adapter_model.safetensors is missing"]

    assert main(["inspect", str(tiny_adapters / "sort"), "--base", "./absent"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["inspect", str(tiny_adapters / "sort"), *base, "--max-lora-rank", "0"]) == 2
    assert capsys.readouterr().err == "multilora: max_lora_rank must not be 0\n"

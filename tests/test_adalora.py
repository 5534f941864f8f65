"""AdaLoRA folded into LoRA: the same change of W, whatever rank was left; what does not fit is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.adalora import METHOD, fold
from adapters.config import parse_config
from adapters.errors import InvalidAdapter

ROOT = "base_model.model."
CONFIG: dict[str, Any] = {
    "peft_type": METHOD, "task_type": "CAUSAL_LM", "r": 8, "init_r": 6, "target_r": 3, "total_step": 10, "tinit": 1,
    "tfinal": 1, "deltaT": 1, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5, "lora_alpha": 30,
    "target_modules": ["q"], "rank_pattern": {"a.q.lora_E": [True, False, True, True, False, False]},
}  # fmt: skip


def tensors_of(module: str, rank: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"lora_A": (rank, 5), "lora_B": (7, rank), "lora_E": (rank, 1)}
    return {f"{ROOT}{module}.{part}": torch.randn(shape).to(dtype) for part, shape in shapes.items()}


@pytest.mark.parametrize("alpha", [30, 0.5, 0, -3])
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_factors_change_w_as_pefts_do(rank: int, alpha: float, dtype: torch.dtype) -> None:
    tensors = tensors_of("a.q", rank, dtype) | tensors_of("b.q", 2)
    described, folded = fold({**CONFIG, "lora_alpha": alpha}, tensors)
    config = parse_config(described)
    assert folded.keys() == {key for key in tensors if "lora_E" not in key}
    a, b, e = (tensors[f"{ROOT}a.q.lora_{part}"].float() for part in "ABE")
    scaling = (alpha if alpha > 0 else rank) / (CONFIG["init_r"] + 1e-5)
    got = config.scaling_of("a.q") * folded[f"{ROOT}a.q.lora_B"].float() @ folded[f"{ROOT}a.q.lora_A"]
    torch.testing.assert_close(got, scaling * b @ (a * e))
    assert config.rank_of("a.q") == len(folded[f"{ROOT}a.q.lora_A"]) == max(rank, 1)
    assert config.rank_of("b.q") == 2


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_factor_that_is_missing_is_told(part: str) -> None:
    tensors = tensors_of("a.q", 3)
    del tensors[f"{ROOT}a.q.{part}"]
    with pytest.raises(InvalidAdapter, match="lora_E' does not fit to its lora_A and lora_B"):
        fold(CONFIG, tensors)


@pytest.mark.parametrize("key", ["q.lora_A", "q.lora_A.default", "q.lora_A.weight"])
def test_a_pair_without_its_third_factor_is_told(key: str) -> None:
    """PEFT would leave that at its initial zeros."""
    with pytest.raises(InvalidAdapter, match="'q' lacks lora_E"):
        fold(CONFIG, {key: torch.ones(2, 4), key.replace("_A", "_B"): torch.ones(4, 2)})


@pytest.mark.parametrize("alpha", [10**400, float("nan"), True])
def test_an_alpha_beyond_any_float_is_told(alpha: float) -> None:
    with pytest.raises(InvalidAdapter, match="lora_alpha must be a finite number"):
        fold({**CONFIG, "lora_alpha": alpha}, {})


def test_every_fault_is_told_at_once() -> None:
    tensors = tensors_of("a.q", 3)
    tensors[f"{ROOT}a.q.lora_E"] = torch.ones(3)
    with pytest.raises(InvalidAdapter) as caught:
        fold({**CONFIG, "init_r": 0, "lora_alpha": "x", "use_rslora": True, "alpha_pattern": {"q": 3}}, tensors)
    for fault in ("init_r must be", "lora_alpha must be", "use_rslora has no", "alpha_pattern has no", "does not fit"):
        assert sum(fault in reason for reason in caught.value.reasons) == 1, fault
    assert len(caught.value.reasons) == 5

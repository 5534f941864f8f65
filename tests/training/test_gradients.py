"""The mathematics: with G = ∂L/∂W, ∂L/∂W1 = s·G W2 and ∂L/∂W2 = s·Gᵀ W1, where W1 = lora_B and W2 = lora_Aᵀ."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.support import parts, recipe_for, rows_for, write_rows

TASKS = ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION")


def model_and_loss(base: str, task: str, folder: Path) -> tuple[Any, Any]:
    """In fp64, with A and B at random, so that neither gradient is zero."""
    data = write_rows(folder / "data.jsonl", rows_for(task, 6))
    trained, examples, model = parts(recipe_for(base, task, data, folder / "out", eval_fraction=0, rank=3, alpha=5))
    model.double().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    return model, lambda: trained.loss(model, examples.learn)


@pytest.mark.parametrize("task", TASKS)
def test_autograd_agrees_with_the_formulas(task: str, base_location: dict[str, str], tmp_path: Path) -> None:
    model, loss = model_and_loss(base_location["tiny-llama"], task, tmp_path)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for layer in layers.values():
        layer.base_layer.weight.requires_grad_(True)
    loss().backward()
    assert len(layers) == 3 * 7
    for name, layer in layers.items():
        g, s = layer.base_layer.weight.grad, layer.scaling["default"]
        w1, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        assert s == pytest.approx(5 / 3)
        assert w1.grad.abs().max() > 0, name
        torch.testing.assert_close(w1.grad, s * g @ a.T)
        torch.testing.assert_close(a.grad.T, s * g.T @ w1)


def unit(direction: Iterable[Any]) -> list[Any]:
    """Of length 1, over all tensors together."""
    tensors = list(direction)
    length = sum(float((tensor**2).sum()) for tensor in tensors) ** 0.5
    return [tensor / length for tensor in tensors]


@pytest.mark.parametrize("task", TASKS)
def test_autograd_agrees_with_finite_differences(task: str, base_location: dict[str, str], tmp_path: Path) -> None:
    """Of everything that is learnt, heads included, along a direction between uphill and any."""
    model, loss = model_and_loss(base_location["tiny-llama"], task, tmp_path)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss().backward()
    gradients = [parameter.grad for parameter in learnt]
    directions = [a + b for a, b in zip(unit(gradients), unit(map(torch.randn_like, learnt)), strict=True)]
    slope = sum(float((parameter.grad * d).sum()) for parameter, d in zip(learnt, directions, strict=True))
    step = 1e-3  # norms and losses are computed in fp32, whatever the weights are

    def at(distance: float) -> float:
        with torch.no_grad():
            for parameter, d in zip(learnt, directions, strict=True):
                parameter.add_(distance * d)
            value = float(loss())
            for parameter, d in zip(learnt, directions, strict=True):
                parameter.sub_(distance * d)
        return value

    assert abs(slope) > 0.05
    assert (at(step) - at(-step)) / (2 * step) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_nothing_but_factors_and_heads_is_learnt(task: str, base_location: dict[str, str], tmp_path: Path) -> None:
    model, _ = model_and_loss(base_location["tiny-bert" if task != "CAUSAL_LM" else "tiny-llama"], task, tmp_path)
    learnt = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learnt
    assert all("lora_A" in name or "lora_B" in name or "modules_to_save" in name for name in learnt)
    assert any("modules_to_save" in name for name in learnt) == (task in ("SEQ_CLS", "TOKEN_CLS"))

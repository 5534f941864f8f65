"""The model that is trained: the frozen base with peft's LoRA and the task's head; what of it is saved.

Everything but A, B, the biases asked for and the head is constant.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from adapters.checkpoint import WEIGHTS_FILE
from adapters.config_fields import ALL_LINEAR
from server.bases import BaseSource
from server.engine.device import DTYPES
from server.training.examples import TrainingTask
from server.training.recipe import Recipe

LINEAR = (nn.Linear, Conv1D)


def build_model(
    recipe: Recipe, task: TrainingTask, source: BaseSource, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Any:
    """A PeftModel in fp32, or with the base in bf16 and what is learnt in fp32. Raises ValueError, as peft says it."""
    torch.manual_seed(recipe.seed)
    base = task.load(source.location, DTYPES[recipe.dtype])
    base.config.pad_token_id = tokenizer.pad_token_id
    if recipe.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    config = LoraConfig(
        task_type=recipe.task,
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.use_rslora,
        target_modules=_targets(base, recipe.target_modules),
        bias=recipe.bias,
        lora_dropout=recipe.dropout,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
    )
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 by an old name
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = source.logical_name
    for parameter in learnt(model).values():
        parameter.data = parameter.data.float()
    return model.to(device)


def _targets(base: Any, named: list[str]) -> list[str] | str:
    """`all-linear` as an expression for the linear layers of the body: peft would count a task's head among them."""
    linears = [name for name, module in base.base_model.named_modules() if isinstance(module, LINEAR)]
    kinds = sorted({name.rpartition(".")[2] for name in linears})
    if named == [ALL_LINEAR]:
        body = rf"{base.base_model_prefix}\." if base.base_model is not base else ""
        return rf"{body}.*\.({'|'.join(kinds)})"
    absent = [name for name in named if not any(f".{linear}".endswith(f".{name}") for linear in linears)]
    if absent:
        raise ValueError(f"the base has no linear layers {', '.join(absent)}, only {', '.join(kinds)}")
    return named


def learnt(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copy_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in parameters.items()}


@torch.no_grad()
def restore(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Set each parameter to its value; both have the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@torch.no_grad()
def round_to(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """To what a file of this dtype holds, so that what is measured is what is saved."""
    for parameter in parameters.values():
        parameter.copy_(parameter.to(dtype))


def save_adapter(model: Any, directory: Path, dtype: torch.dtype) -> None:
    """The PEFT checkpoint: adapter_config.json and adapter_model.safetensors."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / WEIGHTS_FILE).chmod(0o644)
    config = model.peft_config["default"]
    training, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(directory))
    config.inference_mode = training

"""HeadPlacement: the tensors of a checkpoint that are its task's head. Knows nothing of files or linear layers."""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.adapter import Head, Limits
from adapters.config import LoraConfig
from adapters.layout import BaseLayout

ROOT = "base_model.model."
HEAD_NAMES = ("score", "classifier")
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS")
UNUSED = "not used, nor is it by PEFT"


class HeadPlacement:
    """Collects a head's tensors, and makes the head of them."""

    def __init__(self, config: LoraConfig, layout: BaseLayout, limits: Limits) -> None:
        self.config = config
        self.layout = layout
        self.limits = limits
        self.reasons: list[str] = []
        self._tensors: dict[str, Tensor] = {}

    def take(self, key: str, tensor: Tensor) -> str | None:
        """Where the checkpoint's tensor `key` went; None when it is no part of a head."""
        if not self.config.modules_to_save:
            return None
        name = key.removeprefix(ROOT)
        original = name.replace(".original_module", "")
        name = name.replace(".modules_to_save.default", "").replace(".modules_to_save", "")
        if original != name and self.config.bias == "all" and self._is_of_head(original) and original.endswith(".bias"):
            return UNUSED  # with `bias: all` PEFT saves that of the module before it was replaced, too
        if not self._is_of_head(name):
            return None
        module, _, part = name.rpartition(".")
        if name in self._tensors and not self._is_saved_twice(name, tensor):
            self.reasons.append(f"the head has {name!r} twice")
        self._tensors[name] = tensor
        return f"{part} of the head {module}"

    def make(self, task_type: str) -> Head | None:
        """The head that `task_type` needs; None, with a reason, where there is none that fits."""
        unknown = [name for name in self.config.modules_to_save if name not in HEAD_NAMES]
        self.reasons += [f"modules_to_save {name!r} is not supported, only {HEAD_NAMES}" for name in unknown]
        names = sorted({key.rpartition(".")[0] for key in self._tensors})
        if task_type not in HEAD_TASKS:
            if names:
                self.reasons.append(f"a {task_type} adapter has no use for a head, but it has {names}")
            return None
        if task_type == "SEQ_CLS" and not self.layout.classifies:
            self.reasons.append("this base has no pooler with which SEQ_CLS adapters are served")
            return None
        if task_type == "TOKEN_CLS" and not self.layout.tags:
            self.reasons.append("TOKEN_CLS adapters of this base have more than a linear layer on its hidden states")
            return None
        if len(names) != 1 or f"{names[0]}.weight" not in self._tensors:
            self.reasons.append(f"a {task_type} adapter needs one head ({' or '.join(HEAD_NAMES)}), saved with it")
            return None
        return self._last_layer(names[0])

    def _last_layer(self, name: str) -> Head | None:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias")
        d = self.layout.hidden_size
        if weight.ndim != 2 or weight.shape[1] != d or not 1 <= len(weight) <= self.limits.max_labels:
            self.reasons.append(f"head {name!r} has shape {tuple(weight.shape)}, this base needs (labels, {d})")
            return None
        if bias is not None and tuple(bias.shape) != (len(weight),):
            self.reasons.append(f"the bias of head {name!r} has shape {tuple(bias.shape)}, not ({len(weight)},)")
        return Head(weight, bias)

    def _is_of_head(self, name: str) -> bool:
        module, _, part = name.rpartition(".")
        return module in HEAD_NAMES and part in ("weight", "bias") and module in self.config.modules_to_save

    def _is_saved_twice(self, name: str, tensor: Tensor) -> bool:
        """With `bias: all` PEFT saves a head's biases under two names."""
        return self.config.bias == "all" and name.endswith(".bias") and torch.equal(self._tensors[name], tensor)

"""HeadPlacement: the tensors of a checkpoint that are its task's head. Knows nothing of files or linear layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from adapters.adapter import Head, Limits
from adapters.config import LoraConfig
from adapters.layout import BaseLayout
from adapters.patterns import covers

ROOT = "base_model.model."
HEAD_NAMES = ("score", "classifier")
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS")
UNUSED = "not used, nor is it by PEFT"


class HeadPlacement:
    """Collects a head's tensors, and makes the head of them."""

    def __init__(self, config: LoraConfig, layout: BaseLayout, limits: Limits, task_type: str) -> None:
        self.config = config
        self.layout = layout
        self.limits = limits
        self.task_type = task_type
        self.reasons: list[str] = []
        self._form = layout.heads.get(task_type)
        self._lasts = (self._form.last,) if self._form else HEAD_NAMES
        self._inner = self._form.inner if self._form else {}
        self._tensors: dict[str, Tensor] = {}

    def take(self, key: str, tensor: Tensor) -> str | None:
        """Where the checkpoint's tensor `key` went; None when it is no part of a head."""
        if not self.config.modules_to_save:
            return None
        name = key.removeprefix(ROOT)
        if ".original_module." in name and self.config.bias == "all" and name.endswith(".bias"):
            return UNUSED  # of the module that was replaced
        name = name.replace(".modules_to_save.default", "").replace(".modules_to_save", "")
        module, _, part = name.rpartition(".")
        if name not in self._inner and not (module in self._lasts and part in ("weight", "bias")):
            return None
        if not any(covers(saved, module) for saved in self.config.modules_to_save):
            return None
        if name in self._tensors and not self._is_saved_twice(name, tensor):
            self.reasons.append(f"the head has {name!r} twice")
        self._tensors[name] = tensor
        return f"{part} of the head {module}"

    def make(self, others: Iterable[str] = ()) -> Head | None:
        """The task's head; None, with a reason, where one is needed and there is none that fits.

        others: modules that `modules_to_save` may name beside its parts.
        """
        self._check_modules(others)
        names = sorted({key.rpartition(".")[0] for key in self._tensors if key not in self._inner})
        if self.task_type not in HEAD_TASKS:
            if names:
                self.reasons.append(f"a {self.task_type} adapter has no use for a head, but it has {names}")
            return None
        if self.task_type in self.layout.unserved:
            self.reasons.append(self.layout.unserved[self.task_type])
            return None
        if len(names) != 1 or f"{names[0]}.weight" not in self._tensors:
            self.reasons.append(
                f"a {self.task_type} adapter needs one head ({' or '.join(self._lasts)}), saved with it"
            )
            return None
        inner = self._make_inner()
        weight, bias = self._tensors[f"{names[0]}.weight"], self._tensors.get(f"{names[0]}.bias")
        d = self.layout.hidden_size
        if weight.ndim != 2 or weight.shape[1] != d or not 1 <= len(weight) <= self.limits.max_labels:
            self.reasons.append(f"head {names[0]!r} has shape {tuple(weight.shape)}, this base needs (labels, {d})")
            return None
        if bias is not None and tuple(bias.shape) != (len(weight),):
            self.reasons.append(f"the bias of head {names[0]!r} has shape {tuple(bias.shape)}, not ({len(weight)},)")
        return Head(weight, bias, inner)

    def _make_inner(self) -> dict[str, Tensor]:
        """What stands before the last layer: all of it, or nothing where the base has it."""
        inner = {name: self._tensors[name] for name in self._inner if name in self._tensors}
        if inner or (self._form is not None and not self._form.given):
            missing = [name for name in self._inner if name not in inner]
            self.reasons += [f"the head lacks {name!r}: it must be saved (modules_to_save)" for name in missing]
        for name, tensor in inner.items():
            if tuple(tensor.shape) != self._inner[name]:
                self.reasons.append(f"{name!r} has shape {tuple(tensor.shape)}, this base needs {self._inner[name]}")
        return inner

    def _check_modules(self, others: Iterable[str]) -> None:
        """PEFT lists `score` and `classifier` by itself, whichever the model has."""
        modules = [*others, *self._lasts, *HEAD_NAMES, *(name.rpartition(".")[0] for name in self._inner)]
        for saved in self.config.modules_to_save:
            if not any(covers(saved, module) for module in modules):
                self.reasons.append(f"modules_to_save {saved!r} is not supported, only parts of a head and embeddings")

    def _is_saved_twice(self, name: str, tensor: Tensor) -> bool:
        """With `bias: all` PEFT saves a head's biases under two names."""
        return self.config.bias == "all" and name.endswith(".bias") and torch.equal(self._tensors[name], tensor)

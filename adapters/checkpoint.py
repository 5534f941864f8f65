"""Read a PEFT checkpoint directory, refuse what cannot be served exactly, and give it a digest.

Knows nothing of slots, devices or requests. safetensors only: no pickle is ever opened. The whole file is read at
once, so that what was validated and hashed is what is served, whatever happens to the file later.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from adapters.config import LoraConfig, parse_config
from adapters.errors import InvalidAdapter
from adapters.layout import BaseLayout, LinearShape

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LABELS_FILE = "labels.json"
MODEL_CONFIG_FILE = "config.json"
MAX_JSON_BYTES = 1 << 20
MAX_REASONS = 20

FP32_MAX = torch.finfo(torch.float32).max
ROOT = "base_model.model."
HEAD_NAMES = ("score", "classifier")
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
# The bits of the exponent: all set in infinities and NaN.
EXPONENTS = {
    torch.float16: (np.int16, 0x7C00),
    torch.bfloat16: (np.int16, 0x7F80),
    torch.float32: (np.int32, 0x7F800000),
}


@dataclass(frozen=True)
class Limits:
    """Bounds on what a checkpoint may hold."""

    max_lora_rank: int = 64
    max_adapter_bytes: int = 1 << 30
    max_labels: int = 10_000


@dataclass
class LoraPair:
    """LoRA on one linear layer: y += scaling · (x Aᵀ) Bᵀ, and the bias that replaces the base's."""

    a: Tensor  # [rank, d_in]
    b: Tensor  # [d_out, rank]
    scaling: float
    bias: Tensor | None = None  # [d_out]


@dataclass(frozen=True)
class Head:
    """A linear classifier: logits = h Wᵀ + bias."""

    weight: Tensor  # [num_labels, hidden_size]
    bias: Tensor | None  # [num_labels]
    name: str


@dataclass(frozen=True)
class Adapter:
    """One validated checkpoint in host memory, in the dtype in which it was saved."""

    digest: str
    config: LoraConfig
    task_type: str
    base_name: str | None
    pairs: Mapping[str, LoraPair]
    """By the module's name in the base's body."""
    head: Head | None
    labels: tuple[str, ...]
    problem_type: str
    num_bytes: int
    coverage: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> where it went."""
    loaded_in_s: float = 0.0

    @property
    def rank(self) -> int:
        """The largest rank on any module."""
        return max((pair.a.shape[0] for pair in self.pairs.values()), default=0)


def read_checkpoint(directory: Path, layout: BaseLayout, limits: Limits) -> Adapter:
    """Read the PEFT checkpoint in `directory` for the base described by `layout`.

    Raises InvalidAdapter with every reason that was found. Any thread; runs no parallel torch operation.
    """
    started = time.monotonic()
    config_bytes = _read(directory, CONFIG_FILE, MAX_JSON_BYTES)
    weights_bytes = _read(directory, WEIGHTS_FILE, limits.max_adapter_bytes)
    raw_config = _json(CONFIG_FILE, config_bytes)
    config = parse_config(raw_config)
    labels, problem_type = _read_labels(directory, limits)
    tensors = _load_tensors(weights_bytes)
    reasons = _bad_values(tensors)
    task_type = config.task_type or ("CAUSAL_LM" if layout.generates else "FEATURE_EXTRACTION")
    placed = _Placement(config, layout, limits, reasons)
    placed.place(tensors)
    head = placed.make_head(task_type)
    if head is not None:
        labels = _fit_labels(labels, head, reasons)
    if reasons:
        raise InvalidAdapter(_shorten(reasons))
    return Adapter(
        digest=_digest(raw_config, weights_bytes, labels, problem_type),
        config=config,
        task_type=task_type,
        base_name=raw_config.get("base_model_name_or_path"),
        pairs=placed.pairs,
        head=head,
        labels=labels,
        problem_type=problem_type or (PROBLEM_TYPES[2] if len(labels) == 1 else PROBLEM_TYPES[0]),
        num_bytes=len(weights_bytes),
        coverage=placed.coverage,
        loaded_in_s=time.monotonic() - started,
    )


class _Placement:
    """Sorts the tensors of one checkpoint to the base's modules; collects what does not fit."""

    def __init__(self, config: LoraConfig, layout: BaseLayout, limits: Limits, reasons: list[str]) -> None:
        self.config = config
        self.layout = layout
        self.limits = limits
        self.reasons = reasons
        self.pairs: dict[str, LoraPair] = {}
        self.head: dict[str, Tensor] = {}
        self.coverage: dict[str, str] = {}

    def place(self, tensors: Mapping[str, Tensor]) -> None:
        modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            module, part = _split_key(key)
            if part is not None:
                if part in modules[module]:
                    self.reasons.append(f"{module!r} has {part} twice")
                modules[module][part] = tensor
                self.coverage[key] = f"{part} of {module}"
            elif not self._place_in_head(key, tensor):
                self.reasons.append(f"tensor {key!r} has no place in this base")
        for module, parts in modules.items():
            self._place_module(module, parts)
        self._check_completeness(set(modules))

    def make_head(self, task_type: str) -> Head | None:
        """The head that `task_type` needs; None, with a reason, where there is none that fits."""
        unknown = [name for name in self.config.modules_to_save if name not in HEAD_NAMES]
        self.reasons += [f"modules_to_save {name!r} is not supported, only {HEAD_NAMES}" for name in unknown]
        names = sorted({key.rpartition(".")[0] for key in self.head})
        if task_type not in HEAD_TASKS:
            if names:
                self.reasons.append(f"a {task_type} adapter has no use for a head, but it has {names}")
            return None
        if len(names) != 1 or f"{names[0]}.weight" not in self.head:
            self.reasons.append(f"a {task_type} adapter needs one head ({' or '.join(HEAD_NAMES)}), saved with it")
            return None
        name = names[0]
        weight, bias = self.head[f"{name}.weight"], self.head.get(f"{name}.bias")
        d = self.layout.hidden_size
        if weight.ndim != 2 or weight.shape[1] != d or not 1 <= len(weight) <= self.limits.max_labels:
            self.reasons.append(f"head {name!r} has shape {tuple(weight.shape)}, this base needs (labels, {d})")
            return None
        if bias is not None and tuple(bias.shape) != (len(weight),):
            self.reasons.append(f"the bias of head {name!r} has shape {tuple(bias.shape)}, not ({len(weight)},)")
        return Head(weight, bias, name)

    def _place_in_head(self, key: str, tensor: Tensor) -> bool:
        name = key.removeprefix(ROOT).replace(".modules_to_save.default", "").replace(".modules_to_save", "")
        module, _, part = name.rpartition(".")
        if module not in HEAD_NAMES or part not in ("weight", "bias") or module not in self.config.modules_to_save:
            return False
        if name in self.head:
            self.reasons.append(f"the head has {name!r} twice")
        self.head[name] = tensor
        self.coverage[key] = f"{part} of the head {module}"
        return True

    def _place_module(self, module: str, parts: Mapping[str, Tensor]) -> None:
        name = self.layout.find(module)
        if name is None:
            self.reasons.append(f"the base has no linear layer {module!r}")
            return
        if name in self.pairs:
            self.reasons.append(f"{module!r} occurs twice")
            return
        if not self.config.is_target(module) and not self.config.is_target(name):
            self.reasons.append(f"{module!r} is not among target_modules")
            return
        missing = [part for part in ("lora_A", "lora_B") if part not in parts]
        if missing:
            self.reasons.append(f"{module!r} lacks {' and '.join(missing)}")
            return
        reasons = self._wrong_shapes(module, parts, self.layout.linears[name])
        self.reasons.extend(reasons)
        scaling = self.config.scaling_of(module)
        if not abs(scaling) < FP32_MAX:
            self.reasons.append(f"the scaling {scaling} of {module!r} is beyond fp32")
        if not reasons:
            self.pairs[name] = LoraPair(parts["lora_A"], parts["lora_B"], scaling, parts.get("bias"))

    def _wrong_shapes(self, module: str, parts: Mapping[str, Tensor], shape: LinearShape) -> list[str]:
        rank = self.config.rank_of(module)
        reasons = []
        if rank > self.limits.max_lora_rank:
            reasons.append(f"rank {rank} of {module!r} is over the limit {self.limits.max_lora_rank}")
        expected = {"lora_A": (rank, shape.d_in), "lora_B": (shape.d_out, rank), "bias": (shape.d_out,)}
        for part, tensor in parts.items():
            if tuple(tensor.shape) != expected[part]:
                reasons.append(
                    f"{part} of {module!r} has shape {tuple(tensor.shape)}, this base needs {expected[part]}"
                )
        if "bias" in parts and self.config.bias != "lora_only":
            reasons.append(f"{module!r} has a bias but the config says bias: {self.config.bias!r}")
        if "bias" in parts and not shape.has_bias:
            reasons.append(f"the base's {module!r} has no bias to replace")
        return reasons

    def _check_completeness(self, modules: set[str]) -> None:
        """A layer is covered in every block or in none, and every named target somewhere."""
        if not modules:
            self.reasons.append("it holds no LoRA weights")
        present = {self.layout.find(module) or module for module in modules}
        kinds = {_kind(name) for name in present}
        for name in self.layout.linears:
            full = f"{self.layout.prefix}.{name}"
            wanted = self.config.is_target(name) or self.config.is_target(full)
            if wanted and name not in present and _kind(name) in kinds:
                self.reasons.append(f"{name!r} is a target but its weights are missing")
        if isinstance(self.config.target_modules, tuple):
            for target in self.config.target_modules:
                if not any(module == target or module.endswith(f".{target}") for module in modules):
                    self.reasons.append(f"target_modules names {target!r}, for which there are no weights")


def _split_key(key: str) -> tuple[str, str | None]:
    """(module, `lora_A` | `lora_B` | `bias`), or (key, None) for anything else."""
    name = key.removeprefix(ROOT)
    match = re.fullmatch(r"(.+)\.(lora_[AB])(?:\.default)?\.weight", name)
    if match:
        return match[1], match[2]
    match = re.fullmatch(r"(.+?)(?:\.base_layer)?\.bias", name)
    if match and match[1].split(".")[-1] not in HEAD_NAMES:
        return match[1], "bias"
    return key, None


def _kind(module: str) -> str:
    return re.sub(r"\d+", "#", module)


def _read_labels(directory: Path, limits: Limits) -> tuple[tuple[str, ...], str | None]:
    """Labels and problem type from labels.json, else from a transformers config.json beside the adapter."""
    for file in (LABELS_FILE, MODEL_CONFIG_FILE):
        if not (directory / file).is_file():
            continue
        data = _json(file, _read(directory, file, MAX_JSON_BYTES))
        if not isinstance(data, dict | list):
            raise InvalidAdapter([f"{file} is neither a list nor an object"])
        if isinstance(data, list):
            data = {"labels": data}
        problem_type = data.get("problem_type")
        if problem_type is not None and problem_type not in PROBLEM_TYPES:
            raise InvalidAdapter([f"{file}: problem_type {problem_type!r}, known are {PROBLEM_TYPES}"])
        if file == LABELS_FILE and not data.keys() & {"labels", "id2label", "problem_type"}:
            raise InvalidAdapter([f"{file} has neither labels nor id2label"])
        labels = _label_list(file, data.get("labels", data.get("id2label")))
        if len(labels) > limits.max_labels:
            raise InvalidAdapter([f"{file} has {len(labels)} labels, over the limit {limits.max_labels}"])
        return labels, problem_type
    return (), None


def _label_list(file: str, labels: Any) -> tuple[str, ...]:
    """A list, or {"0": "first", …}, as a tuple in order."""
    if labels is None:
        return ()
    if isinstance(labels, dict):
        numbered = {int(key): value for key, value in labels.items() if re.fullmatch("[0-9]{1,9}", key)}
        if sorted(numbered) != list(range(len(labels))):
            raise InvalidAdapter([f"{file}: the labels are not numbered from 0 without gaps"])
        labels = [numbered[i] for i in range(len(numbered))]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise InvalidAdapter([f"{file}: the labels must be a list of strings"])
    if len(set(labels)) != len(labels):
        raise InvalidAdapter([f"{file}: a label occurs twice"])
    return tuple(labels)


def _fit_labels(labels: tuple[str, ...], head: Head, reasons: list[str]) -> tuple[str, ...]:
    if not labels:
        return tuple(f"LABEL_{i}" for i in range(len(head.weight)))
    if len(labels) != len(head.weight):
        reasons.append(f"there are {len(labels)} labels but the head has {len(head.weight)} outputs")
    return labels


def _read(directory: Path, file: str, limit: int) -> bytes:
    try:
        with (directory / file).open("rb") as handle:
            content = handle.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        found = [p.name for p in directory.glob("*.bin")] + [p.name for p in directory.glob("*.pt")]
        hint = f"; {found[0]} is a pickle, which is never read: save as safetensors" if found else ""
        raise InvalidAdapter([f"{file} is missing{hint if file == WEIGHTS_FILE else ''}"]) from None
    except OSError as error:
        raise InvalidAdapter([f"{file} cannot be read: {error.strerror}"]) from error
    if len(content) > limit:
        raise InvalidAdapter([f"{file} is larger than the limit of {limit} bytes"])
    return content


def _load_tensors(content: bytes) -> dict[str, Tensor]:
    try:
        return load_safetensors(content)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise InvalidAdapter([f"{WEIGHTS_FILE} is broken: {error}"]) from error


def _json(file: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter([f"{file} is not JSON: {error}"]) from error


def _bad_values(tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors of other dtypes than fp32, fp16, bf16, or with NaN or infinite elements (numpy: one thread)."""
    reasons = []
    for key, tensor in tensors.items():
        if tensor.dtype not in EXPONENTS:
            reasons.append(f"tensor {key!r} has dtype {tensor.dtype}, known are {[*map(str, EXPONENTS)]}")
            continue
        integer, mask = EXPONENTS[tensor.dtype]
        bits = tensor.contiguous().view(torch.int16 if integer is np.int16 else torch.int32).numpy()
        if bool(np.any((bits & integer(mask)) == integer(mask))):
            reasons.append(f"tensor {key!r} has NaN or infinite elements")
    return reasons


def _digest(config: Any, weights: bytes, labels: Iterable[str], problem_type: str | None) -> str:
    """sha256 over config, labels and weights, each with its length before it; hexadecimal."""
    described = json.dumps({"config": config, "labels": [*labels], "problem_type": problem_type}, sort_keys=True)
    result = hashlib.sha256()
    for part in (described.encode(), weights):
        result.update(len(part).to_bytes(8, "little"))
        result.update(part)
    return result.hexdigest()


def _shorten(reasons: list[str]) -> list[str]:
    rest = len(reasons) - MAX_REASONS
    return [*reasons[:MAX_REASONS], f"and {rest} more reasons"] if rest > 0 else reasons

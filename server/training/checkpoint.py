"""A run's checkpoint: one safetensors file with all that a run needs to go on as if nothing had happened."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKPOINT_FILE = "checkpoint.safetensors"


class InvalidCheckpoint(ValueError):
    """A checkpoint that cannot be read, or is of another run; the message says why."""


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Computed so far, without padding."""
    seconds: float = 0.0
    """Spent so far, evaluations included."""
    history: list[dict[str, float]] = field(default_factory=list)
    """step, loss and learning_rate of each step."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """step and metrics of each evaluation."""
    baseline: dict[str, float] = field(default_factory=dict)
    """What the base does without the adapter, where it was measured."""
    best: float | None = None
    """The key metric at its best."""
    best_step: int = 0
    worse: int = 0
    """Evaluations since then."""


@dataclass
class Checkpoint:
    """`progress`, and the tensors: what is learnt, the optimiser's moments, the best so far, the random generators."""

    progress: Progress
    identity: dict[str, Any]
    """What must be the same for the run to go on: the recipe, a digest of the examples."""
    tensors: dict[str, Tensor]


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """The old one stays until the new one is whole."""
    partial = directory / f"{CHECKPOINT_FILE}.partial"
    about = {"progress": json.dumps(asdict(checkpoint.progress)), "identity": json.dumps(checkpoint.identity)}
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, partial, metadata=about)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(directory / CHECKPOINT_FILE)


def read_checkpoint(directory: Path, identity: dict[str, Any]) -> Checkpoint | None:
    """None where there is none. Raises InvalidCheckpoint."""
    file = directory / CHECKPOINT_FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  -- no mapping
        progress, found = Progress(**json.loads(about["progress"])), json.loads(about["identity"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InvalidCheckpoint(f"{file} is broken ({error}); --overwrite begins again") from error
    differing = sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key))
    if differing:
        raise InvalidCheckpoint(f"{file} is of a run with another {', '.join(differing)}; --overwrite begins again")
    return Checkpoint(progress, found, tensors)


def random_state() -> dict[str, Tensor]:
    """Of torch's generators, which dropout uses."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])

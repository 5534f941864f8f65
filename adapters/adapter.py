"""Adapter: one validated checkpoint in host memory. Knows nothing of files, slots or names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from adapters.config import LoraConfig


@dataclass(frozen=True)
class Limits:
    """Bounds on what a checkpoint may hold, and how its factors are held."""

    max_lora_rank: int = 64
    max_adapter_bytes: int = 1 << 30
    max_labels: int = 10_000
    lora_dtype: str = "auto"
    """A name in arena.POOL_DTYPES."""
    pinned: bool = False
    """Whether the arena is page-locked, for a GPU to copy from."""


@dataclass
class LoraPair:
    """LoRA on one linear layer: y += scaling · ((x Aᵀ) Bᵀ + b_bias), with a bias in the place of the base's.

    With a magnitude m it is DoRA (dora.py), and has no b_bias.
    """

    a: Tensor  # [rank, d_in]
    b: Tensor  # [d_out, rank]; in an arena its transpose is what lies contiguous
    scaling: float
    bias: Tensor | None = None  # [d_out]
    b_bias: Tensor | None = None  # [d_out]
    magnitude: Tensor | None = None  # [d_out]
    divided: bool = False
    """Whether `magnitude` holds g = m / ‖W + scaling · B A‖ by now: done once, by the first slot on the CPU."""


@dataclass(frozen=True)
class Head:
    """A linear classifier: logits = h Wᵀ + bias, of what the layers before it make of hidden states."""

    weight: Tensor  # [num_labels, hidden_size]
    bias: Tensor | None  # [num_labels]
    inner: Mapping[str, Tensor] = field(default_factory=dict)
    """Those layers' parameters, as HeadForm.inner has them, where they are the adapter's own."""


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of one version without its weights."""

    digest: str
    task_type: str
    rank: int
    """The largest on any module."""
    labels: tuple[str, ...]
    problem_type: str
    num_bytes: int
    """Of the checkpoint's weights file."""


@dataclass(frozen=True)
class Adapter:
    """One validated checkpoint in host memory."""

    info: AdapterInfo
    config: LoraConfig
    pairs: Mapping[str, LoraPair]
    """By the module's name in the base's body."""
    head: Head | None
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    """[d] in the place of the bias of a norm, by the norm's name in the base's body."""
    coverage: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> where it went."""
    loaded_in_s: float = 0.0
    memory: Tensor | None = None
    """The arena in which `pairs`, `head` and `biases` lie (arena.py); None: they lie wherever they were made."""

    @property
    def nbytes(self) -> int:
        """Host memory that it takes."""
        return self.info.num_bytes if self.memory is None else self.memory.nbytes


def largest_rank(pairs: Mapping[str, LoraPair]) -> int:
    """The largest rank on any module."""
    return max((pair.a.shape[0] for pair in pairs.values()), default=0)

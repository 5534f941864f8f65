"""Adapter: one validated checkpoint in host memory. Knows nothing of files, slots or names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.config import LoraConfig

ExamineTokenizer = Callable[[Mapping[str, bytes], int, bool], bool]
"""Of a tokenizer's files, by name (none: the base's), the number of tokens that the adapter knows, and whether that is
another than the base's: whether the tokenizer is another than the base's. Raises InvalidAdapter for one that cannot be
served. Any thread."""


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
    matrix_dtype: torch.dtype = torch.float32
    """In which whole embeddings and language-model heads are held: the one in which the base computes."""
    examine_tokenizer: ExamineTokenizer | None = None
    """None: every tokenizer is taken for another than the base's, unseen."""


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
class TokenRows:
    """The rows of some tokens, in the place of those of an embedding's or a language-model head's weights."""

    ids: tuple[int, ...]
    """Ascending."""
    rows: Tensor  # [len(ids), d]


@dataclass(frozen=True)
class OwnTokens:
    """What an adapter has in the place of the base's embedding and language-model head.

    V may differ from the base's number of tokens; LoRA on these layers comes to what stands here.
    """

    embedding: Tensor | None = None  # [V, d]
    embedding_rows: TokenRows | None = None
    output: Tensor | None = None  # [V, d]; the same object as `embedding` where the adapter's are tied
    output_bias: Tensor | None = None  # [V]; only with `output`
    output_rows: TokenRows | None = None

    def placed(self, place: Callable[[Tensor], Tensor]) -> OwnTokens:
        """The same, every tensor where `place` says."""

        def each(part: Tensor | None) -> Tensor | None:
            return None if part is None else place(part)

        def rows(given: TokenRows | None) -> TokenRows | None:
            return None if given is None else TokenRows(given.ids, place(given.rows))

        return OwnTokens(
            each(self.embedding), rows(self.embedding_rows), each(self.output), each(self.output_bias),
            rows(self.output_rows),
        )  # fmt: skip


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
    vocabulary_size: int = 0
    """Tokens that it knows; 0: those of the base."""
    tokenizer: str = ""
    """Digest of its tokenizer's files; empty: its tokenizer is the base's."""


@dataclass(frozen=True)
class Adapter:
    """One validated checkpoint in host memory."""

    info: AdapterInfo
    config: LoraConfig
    pairs: Mapping[str, LoraPair]
    """By the module's name in the base's body; that of a language-model head is its name in the model.

    On an embedding d_in is the number of tokens: row t is that of token t, y += scaling · A[:, t]ᵀ Bᵀ.
    """
    head: Head | None
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    """[d] in the place of the bias of a norm, by the norm's name in the base's body."""
    tokens: OwnTokens | None = None
    coverage: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> where it went."""
    loaded_in_s: float = 0.0
    memory: Tensor | None = None
    """The arena in which `pairs`, `head`, `biases`, `tokens` lie (arena.py); None: they lie wherever they were made."""

    @property
    def nbytes(self) -> int:
        """Host memory that it takes."""
        return self.info.num_bytes if self.memory is None else self.memory.nbytes


def largest_rank(pairs: Mapping[str, LoraPair]) -> int:
    """The largest rank on any module."""
    return max((pair.a.shape[0] for pair in pairs.values()), default=0)

"""What the engine works on: sampling parameters, sequences, batches, outputs. Token ids only; no tensors, no text."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from adapters.layout import GENERATING
from adapters.version import AdapterVersion
from server.engine.grammar import Grammar
from server.engine.token_counts import TokenCounts

AS_MANY_AS_FIT = -1
"""Of `max_tokens`: what the context leaves."""
CAUSAL_LM = "CAUSAL_LM"
SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
SEQ_CLS = "SEQ_CLS"
TOKEN_CLS = "TOKEN_CLS"
FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; names and meaning as OpenAI's and vLLM's. Validated by the API's schemas."""

    max_tokens: int
    """0: nothing is generated, the prompt is only computed."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), each token once."""
    logprobs: int | None = None
    """How many alternatives to report with each token; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for the prompt's own tokens, but the first, which nothing precedes."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def cuts(self) -> bool:
        """Whether top-k or top-p leaves tokens out."""
        return self.top_k > 0 or self.top_p < 1.0

    @property
    def penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


class SequenceStatus(Enum):
    """Where a sequence stands; it ends in exactly one of the last three."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        return self not in (SequenceStatus.WAITING, SequenceStatus.RUNNING)


@dataclass(frozen=True)
class TokenLogprobs:
    """log p of the chosen token and of the likeliest ones, before temperature, biases and penalties."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Sequence:
    """One prompt and what has been generated after it. Changed by the engine's thread only."""

    id: int
    task: str
    prompt_ids: list[int]
    """Of SEQ_2_SEQ_LM: what the target begins with."""
    version: AdapterVersion | None
    """The adapter, held from submission to the end; None: the base model."""
    params: SamplingParams | None = None
    eos_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    """What its output is held to; this sequence's own."""
    priority: int = 0
    """Lower goes first, as vLLM's, as far as fairness between adapters allows."""
    owner: str = ""
    """On whose account it waits."""
    source_ids: list[int] = field(default_factory=list)
    """What the encoder reads; none but with SEQ_2_SEQ_LM."""
    forbidden: frozenset[int] = frozenset()
    """Tokens that its base never generates."""
    output_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of its tokens from the second on, as far as they were computed; only where its parameters want them."""
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed: int = 0
    """Tokens whose keys and values are in the cache; those of the source apart."""
    encoded: bool = False
    """Whether the source's keys and values are there."""
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    num_charged: int = 0
    """Prompt tokens that its adapter's virtual counter was charged with."""
    preemptions: int = 0
    admitted_at: float | None = None
    """When it began to run first, by the monotonic clock, in seconds."""
    adapter: str | None = field(init=False)
    """The version's digest, by which it is scheduled; None: the base model."""
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.adapter = self.version.digest if self.version else None
        self.rng = random.Random(self.params.seed if self.params else None)

    @cached_property
    def token_counts(self) -> TokenCounts:
        """Made when penalties ask for it."""
        return TokenCounts(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def given(self) -> list[int]:
        """Token ids that the caller gave."""
        return self.source_ids or self.prompt_ids

    @property
    def generates(self) -> bool:
        """Whether it runs many steps over a KV cache; other tasks need one step and no pages."""
        return self.task in GENERATING

    def num_places(self, num_tokens: int) -> int:
        """Tokens that its pages must have room for when `num_tokens` of its own are known: a page holds keys and values
        of as many of the source's beside them."""
        return max(num_tokens, len(self.source_ids))

    @property
    def scores(self) -> bool:
        """Whether what it computes next tells something of its prompt."""
        if self.params is None or self.params.prompt_logprobs is None:
            return False
        return len(self.prompt_logprobs) + 1 < len(self.prompt_ids)

    def source(self, start: int, end: int) -> list[int]:
        """Token ids start … end − 1 of what the encoder reads."""
        return self.source_ids[start:end]

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids start … end − 1 of prompt and output together."""
        n = len(self.prompt_ids)
        if end <= n:
            return self.prompt_ids[start:end]
        if start >= n:
            return self.output_ids[start - n : end - n]
        return self.prompt_ids[start:] + self.output_ids[: end - n]


@dataclass(frozen=True)
class ScheduledSequence:
    """Tokens start … start + count − 1 of a sequence, computed in this step with the adapter in `slot`."""

    sequence: Sequence
    start: int
    count: int
    slot: int
    encodes: bool = False
    """Whether its source goes through the encoder in this step, whole."""

    @property
    def num_source(self) -> int:
        """Tokens of the source that are computed."""
        return len(self.sequence.source_ids) if self.encodes else 0

    @property
    def completes(self) -> bool:
        """Whether this step computes the sequence's last known token, so that a result follows."""
        return self.start + self.count == self.sequence.num_tokens


@dataclass(frozen=True)
class Batch:
    """One step's work, ordered by slot so that each adapter's tokens stand together."""

    items: tuple[ScheduledSequence, ...]
    fresh_pages: tuple[int, ...] = ()
    """Pages that hold what an earlier sequence left there, to be cleared before the step."""

    @property
    def num_tokens(self) -> int:
        return sum(item.count + item.num_source for item in self.items)


NOT_FINITE = "the model gave values that are not finite for this input"


@dataclass(frozen=True)
class RowResult:
    """What the forward pass gave for one sequence: a token, or a task's values."""

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    values: Any = None
    """numpy fp32: logits [num_labels], logits [tokens, num_labels], or an embedding [hidden_size]."""
    error: str | None = None
    """Why there is no result."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """What this step told of the prompt."""


@dataclass(frozen=True)
class RequestOutput:
    """One sequence's news after a step."""

    sequence: Sequence
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    values: Any = None
    finish_reason: str | None = None
    """`stop` or `length` when generation ended, `done` for other tasks, `abort`, `error`; None: more follows."""
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the whole prompt, with its first news."""


@dataclass(frozen=True)
class StepRecord:
    """What one forward pass held, for tests and for a look from outside."""

    num_tokens: int
    tasks: tuple[str, ...]
    """Task of each sequence."""
    slots: tuple[int, ...]
    counts: tuple[int, ...]
    preempted: int

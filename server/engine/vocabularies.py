"""Rows of logits whose adapters know other numbers of tokens than the base: each is sampled among its own tokens.

Rows of one size go together, so that no row's sums depend on what its neighbours know. Engine's thread only.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from torch import Tensor

from adapters.kernels.library import Library
from server.engine.device import to_device
from server.engine.request import RowResult, Sequence, TokenLogprobs
from server.engine.sampler import sample
from server.engine.scoring import Scored, score


def sample_by_vocabulary(
    logits: Tensor, sequences: SequenceOf[Sequence], size: int | None, library: Library | None
) -> list[RowResult]:
    """As `sample`. logits: [n, V], of each row the first ones are its own. size: of the base's rows; None: of all."""
    if _are_the_bases(logits, sequences, size):
        return sample(logits, sequences, library)
    results: dict[int, RowResult] = {}
    for places, own in _parts(logits, [_size(sequence, size or logits.shape[-1]) for sequence in sequences]):
        results |= zip(places, sample(own, [sequences[place] for place in places], library), strict=True)
    return [results[place] for place in range(len(sequences))]


def score_by_vocabulary(
    logits: Tensor, wanted: SequenceOf[Scored], size: int | None
) -> dict[int, tuple[TokenLogprobs, ...]]:
    """As `score`; logits and size as above."""
    if _are_the_bases(logits, [each.sequence for each in wanted], size):
        return score(logits, wanted)
    scores: dict[int, tuple[TokenLogprobs, ...]] = {}
    owners = [i for i, each in enumerate(wanted) for _ in each.rows]
    for places, own in _parts(logits, [_size(wanted[i].sequence, size or logits.shape[-1]) for i in owners]):
        mine = dict.fromkeys(owners[place] for place in places)
        scores |= score(own, [wanted[i] for i in mine])
    return scores


def _are_the_bases(logits: Tensor, sequences: SequenceOf[Sequence], size: int | None) -> bool:
    """Whether no row's adapter has another number of tokens; all that most steps pay."""
    own = any(each.version is not None and each.version.info.vocabulary_size for each in sequences)
    return not own and logits.shape[-1] == (size or logits.shape[-1])


def _parts(logits: Tensor, sizes: list[int]) -> list[tuple[list[int], Tensor]]:
    """(rows, their logits) for each size; all of them without a copy where there is one."""
    parts = []
    for size in dict.fromkeys(sizes):
        places = [place for place, each in enumerate(sizes) if each == size]
        rows = logits
        if len(places) < len(sizes):
            rows = logits.index_select(0, *to_device(logits.device, [places]))
        parts.append((places, rows if size == logits.shape[-1] else rows[:, :size].contiguous()))
    return parts


def _size(sequence: Sequence, default: int) -> int:
    """How many tokens the sequence's adapter knows; default: those of the base."""
    version = sequence.version
    return (version.info.vocabulary_size if version is not None else 0) or default

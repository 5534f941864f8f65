"""Positions: how a base numbers the tokens of a sequence when nobody tells it. Learned from the base itself, at start.

Knows nothing of adapters or batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

SAME = 1e-5
"""So little may two passes of the same positions differ, relatively."""


@dataclass(frozen=True)
class Positions:
    """The position of a token: `first` + how many are counted before it."""

    first: int = 0
    skipped: int | None = None
    """A token id that is not counted, and always has the position `first` − 1; None: all are counted."""

    def of(self, tokens: Callable[[int, int], Sequence[int]], start: int, end: int) -> list[int]:
        """Of a sequence's tokens start … end − 1; tokens: its token ids between two places."""
        if self.skipped is None:
            return list(range(self.first + start, self.first + end))
        places, place = [], self.first
        for token in tokens(0, end):
            places.append(self.first - 1 if token == self.skipped else place)
            place += token != self.skipped
        return places[start:]


@torch.inference_mode()
def learn_positions(body: nn.Module, vocabulary_size: int, pad_id: int | None, device: torch.device) -> Positions:
    """The rule under which `body`, when told the positions, gives what it gives when it is not.

    Either all tokens are counted from 0, or, as fairseq has it, all but padding from the one after the padding's id.
    Where neither fits it is the closer one, and the self-test finds out. Engine's thread.
    """
    plain = Positions()
    if pad_id is None or not 0 <= pad_id < vocabulary_size or not _takes_positions(body):
        return plain
    others = [token for token in range(min(vocabulary_size, 5)) if token != pad_id]
    token_ids = [*others[:2], pad_id, *others[2:]]
    ids = torch.tensor([token_ids], device=device)
    own = body(input_ids=ids).last_hidden_state

    def difference(rule: Positions) -> float:
        places = rule.of(lambda start, end: token_ids[start:end], 0, len(token_ids))
        told = body(input_ids=ids, position_ids=torch.tensor([places], device=device)).last_hidden_state
        return float((told - own).abs().max())

    after_padding = Positions(pad_id + 1, pad_id)
    longest = getattr(body.config, "max_position_embeddings", 0)
    if difference(plain) <= SAME * float(own.abs().max()) or pad_id + len(token_ids) >= longest:
        return plain
    return min((plain, after_padding), key=difference)


def _takes_positions(body: nn.Module) -> bool:
    return "position_ids" in inspect.signature(body.forward).parameters

"""TokenCounts: how often each token of a sequence was generated, as penalties want it, kept up as it grows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Of one sequence. Engine's thread only."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.fromiter(self._places, np.int64, len(self._places))
        self._times = np.zeros(len(self._places), np.float32)
        self._counted = 0

    def after(self, output_ids: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Each token once, and how often it stands in `output_ids`, which begin with those of the call before; 0: it
        stands in the prompt alone. Both valid until the next call."""
        for token in output_ids[self._counted :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                self._ids, self._times = np.append(self._ids, token), np.append(self._times, np.float32(0))
            self._times[place] += 1
        self._counted = len(output_ids)
        return self._ids, self._times

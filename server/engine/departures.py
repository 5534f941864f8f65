"""Departures: how fast sequences end, so that one that finds no room is told when to come again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 60.0
MAX_NOTED = 4096
LONGEST_S = 60


class Departures:
    """The ends of the last minute. Event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=MAX_NOTED)

    def note(self) -> None:
        """One sequence ended."""
        self._times.append(self._clock())

    def seconds_until(self, count: int) -> int:
        """In how many whole seconds `count` more will have ended, at the rate of the last minute; 1 … LONGEST_S.

        LONGEST_S also where none ended in the last minute, and 1 where none has ended ever.
        """
        now = self._clock()
        if not self._times:
            return 1
        recent = [moment for moment in self._times if now - moment <= WINDOW_S]
        if not recent:
            return LONGEST_S
        rate = len(recent) / max(now - recent[0], 1e-3)
        return min(max(math.ceil(count / rate), 1), LONGEST_S)

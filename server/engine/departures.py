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
        if not self._times:
            return 1
        now = self._clock()
        while len(self._times) > 1 and now - self._times[0] > WINDOW_S:
            self._times.popleft()
        span = now - self._times[0]
        if span > WINDOW_S:
            return LONGEST_S
        rate = len(self._times) / max(span, 1e-3)
        return min(max(math.ceil(count / rate), 1), LONGEST_S)

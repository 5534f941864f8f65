"""A bar for a person, lines for a log: how far a run is, its loss, rate, tokens a second and the time left."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_EVERY_S = 10.0
"""Where nobody watches a bar."""
SMOOTHING = 0.95


class Bar:
    """On a terminal a bar; elsewhere a line every LINE_EVERY_S seconds. A context."""

    def __init__(self, total: int, done: int) -> None:
        self._tqdm = tqdm(total=total, initial=done, unit="step", disable=None, dynamic_ncols=True)
        self._total, self._done, self._first = total, done, done
        self._loss: float | None = None
        self._tokens = 0
        self._started = self._told = time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._tqdm.close()

    def advance(self, loss: float, rate: float, tokens: int) -> None:
        """One step is done."""
        self._done += 1
        self._tokens += tokens
        self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        now = time.monotonic()
        speed = self._tokens / (now - self._started)
        self._tqdm.set_postfix_str(f"loss {self._loss:.3f}, rate {rate:.1e}, {speed:.0f} tokens/s", refresh=False)
        self._tqdm.update()
        if self._tqdm.disable and (now - self._told > LINE_EVERY_S or self._done == self._total):
            self._told = now
            left = (now - self._started) / (self._done - self._first) * (self._total - self._done)
            logger.info(
                "step %d of %d, loss %.3f, rate %.1e, %.0f tokens/s, %.0f s left",
                self._done, self._total, self._loss, rate, speed, left,
            )  # fmt: skip

    def say(self, line: str) -> None:
        """Above the bar."""
        if self._tqdm.disable:
            logger.info("%s", line)
        else:
            self._tqdm.write(line)

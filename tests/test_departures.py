"""When a client that found no room shall come again."""

from __future__ import annotations

import pytest

from server.engine.departures import LONGEST_S, Departures


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("every_s", "count", "expected"), [(0.5, 1, 1), (0.5, 12, 6), (4.0, 1, 4), (4.0, 100, 60)])
def test_the_time_follows_from_the_rate(every_s: float, count: int, expected: int) -> None:
    clock = Clock()
    departures = Departures(clock)
    for _ in range(40):
        departures.note()
        clock.now += every_s
    assert departures.seconds_until(count) == expected


def test_without_ends_it_is_the_shortest_and_long_after_the_last_the_longest() -> None:
    clock = Clock()
    departures = Departures(clock)
    assert departures.seconds_until(5) == 1
    departures.note()
    clock.now += 61
    assert departures.seconds_until(5) == LONGEST_S


def test_only_the_last_minute_counts() -> None:
    clock = Clock()
    departures = Departures(clock)
    for step in [0.015625] * 1000 + [8.0] * 10:
        departures.note()
        clock.now += step
    assert departures.seconds_until(1) == 8

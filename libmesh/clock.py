"""The date, by a clock that nobody can set: it goes on while the machine sleeps, and otherwise never jumps."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

SLEPT = 1.0
"""Seconds of sleep that count; less is what lies between two readings of clocks."""


def seconds_asleep() -> float:
    """For how long this machine has slept since it was started; 0 where the system does not tell."""
    try:
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    except (AttributeError, OSError):  # not Linux
        return 0.0


class Clock:
    """Seconds since the epoch, from trio's clock and what `wall_clock` says once.

    Args:
        wall_clock: seconds since the epoch.
        asleep: as `seconds_asleep`.
    """

    def __init__(self, wall_clock: Callable[[], float], asleep: Callable[[], float] = seconds_asleep) -> None:
        self._read_asleep, self._asleep = asleep, asleep()
        self._base = wall_clock() - trio.current_time()

    def now(self) -> float:
        """The date, as of the last `woke`."""
        return self._base + trio.current_time()

    def woke(self) -> float:
        """For how many seconds the machine has slept since this was last asked. `now` has gone on by as many."""
        slept = self._read_asleep() - self._asleep
        if slept < SLEPT:
            return 0.0
        self._asleep += slept
        self._base += slept
        return slept

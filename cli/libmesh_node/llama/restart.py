"""When to start a llama.cpp program again, and when to give it up. Knows no clock and awaits nothing."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ready:
    """The program answers."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The program ended by itself. `reason` is in words, for people.

    `port_taken`: another process took the port between choosing it and listening on it.
    """

    reason: str
    port_taken: bool = False


@dataclass(frozen=True, slots=True)
class Wake:
    """The time that `deadline` named has come."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Start the program now."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Do not start it any more. `reason` is in words, and includes the last failure's."""

    reason: str


Event = Ready | Ended | Wake
Effect = Launch | GiveUp


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartConfig:
    """When to stop trying. All times in seconds.

    Attributes:
        first_delay: before the first restart. Each further failure doubles it.
        max_delay: the longest pause.
        failures: this many within `window` are a crash loop.
        window: long enough for five loads of a large model that crashes at the end of each.
        healthy_after: after answering for this long, earlier failures are forgotten.
    """

    first_delay: float = 0.5
    max_delay: float = 30.0
    failures: int = 5
    window: float = 600.0
    healthy_after: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.first_delay <= self.max_delay:
            raise ValueError(f"first_delay is {self.first_delay}; it must be above 0 and at most max_delay")
        if self.failures < 1:
            raise ValueError(f"failures is {self.failures}; it must be at least 1")


class RestartPolicy:
    """Decides after each end of the program.

    The caller launches the program once by itself; from then on `handle` says what to do.
    """

    def __init__(self, config: RestartConfig | None = None) -> None:
        self._config = config or RestartConfig()
        self._failures: deque[float] = deque(maxlen=self._config.failures)
        self._ready_since: float | None = None
        self._launch_at: float | None = None
        self._given_up = False

    def deadline(self) -> float | None:
        """When `Wake` is due; `None` while nothing is to come."""
        return self._launch_at

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take notice of `event`. Events after a `GiveUp` are ignored."""
        match event:
            case _ if self._given_up:
                return []
            case Ready():
                self._ready_since = now
                return []
            case Ended():
                return self._ended(event, now)
            case Wake():
                if self._launch_at is None or now < self._launch_at:
                    return []
                self._launch_at = None
                return [Launch()]

    def _ended(self, event: Ended, now: float) -> list[Effect]:
        if self._ready_since is not None and now - self._ready_since >= self._config.healthy_after:
            self._failures.clear()
        self._ready_since = self._launch_at = None
        self._failures.append(now)
        recent = sum(now - failure <= self._config.window for failure in self._failures)
        if recent >= self._config.failures:
            self._given_up = True
            return [
                GiveUp(
                    f"it failed {recent} times in {now - self._failures[0]:.0f} s; the last time {event.reason}"
                )
            ]
        if event.port_taken:  # another port will do; no reason to wait
            return [Launch()]
        delay = min(self._config.first_delay * 2.0 ** (recent - 1), self._config.max_delay)
        self._launch_at = now + delay
        return []

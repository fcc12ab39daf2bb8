"""Who may ask a server next, when several nodes would. Pure.

A place is what one request takes of the server. Where all are taken and one becomes free, it goes to the waiting peer that
has the fewest, and among equals to the one served longest ago (max-min fairness: D. Bertsekas, R. Gallager, "Data
Networks", 6.5.2). It is places that are shared and not requests, so one who asks for long answers gets no more than one
who asks for short ones.

A peer with less than its equal share never waits: its places are made on top. So nobody gains by taking places and leaving
them unused, and there are never more than twice the places, and one for each peer.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

USUAL = 5.0
"""Seconds that a place is held, as long as none has been measured."""

SMOOTHING = 0.2
"""Weight of a new measurement."""


class LineFull(Exception):
    """A peer has as many requests waiting as it may.

    Attributes:
        wait: seconds until one more of its requests would get a place, by the measured rate; at least 1.
    """

    def __init__(self, wait: int) -> None:
        super().__init__(f"too many requests wait; room in about {wait} s")
        self.wait = wait


@dataclass
class Turns(Generic[T]):
    """The places at one server, and a line of tickets for each peer that waits for one.

    Args:
        places: requests that the server is given at once.
        line: tickets of one peer that may wait; one more is refused with `LineFull`.
    """

    places: int
    line: int
    _held: Counter[str] = field(default_factory=Counter)
    _lines: dict[str, deque[T]] = field(default_factory=dict)
    _served: dict[str, int] = field(default_factory=dict)  # the number of each present peer's last turn
    _turn: int = 0
    _seconds: float = USUAL

    @property
    def held(self) -> int:
        """Places taken."""
        return self._held.total()

    @property
    def waiting(self) -> int:
        """Tickets in all lines."""
        return sum(map(len, self._lines.values()))

    def ask(self, peer: str, ticket: T) -> list[T]:
        """Join the line of `peer`; the tickets whose turn it is now, this one among them if there is a place for it.

        Raises `LineFull`.
        """
        if len(self._lines.get(peer, ())) >= self.line:
            raise LineFull(self._wait(peer))
        self._lines.setdefault(peer, deque()).append(ticket)
        return self._next()

    def leave(self, peer: str, ticket: T) -> list[T]:
        """Give up waiting; the tickets whose turn it is now. Not for one that had its turn: that is `done`."""
        line = self._lines[peer]
        line.remove(ticket)
        if not line:
            del self._lines[peer]
            self._forget(peer)
        return self._next()

    def done(self, peer: str, seconds: float | None = None) -> list[T]:
        """`peer` gives back a place that it used for `seconds`, or not at all; the tickets whose turn it is now."""
        self._held[peer] -= 1
        if not self._held[peer]:
            del self._held[peer]
            self._forget(peer)
        if seconds is not None:
            self._seconds += SMOOTHING * (seconds - self._seconds)
        return self._next()

    def _next(self) -> list[T]:
        found: list[T] = []
        while self._lines:
            able = list(self._lines)
            if self.held >= self.places:
                share = self._share()
                able = [peer for peer in able if self._held[peer] < share]
            if not able:
                break
            peer = able[0]
            if len(able) > 1:
                peer = min(able, key=lambda peer: (self._held[peer], self._served.get(peer, 0)))
            found.append(self._lines[peer].popleft())
            if not self._lines[peer]:
                del self._lines[peer]
            self._turn += 1
            self._held[peer] += 1
            self._served[peer] = self._turn
        return found

    def _share(self) -> int:
        return max(1, self.places // max(1, len(self._held.keys() | self._lines.keys())))

    def _forget(self, peer: str) -> None:
        if peer not in self._held and peer not in self._lines:
            self._served.pop(peer, None)

    def _wait(self, peer: str) -> int:
        return max(1, math.ceil((len(self._lines.get(peer, ())) + 1) * self._seconds / self._share()))

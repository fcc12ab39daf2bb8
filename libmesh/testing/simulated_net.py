"""The wires of the simulator: what delays, loses and forbids messages, and who floods what to whom."""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import count
from typing import Any

from libmesh.core.timers import INFINITY
from libmesh.peers import PeerId

HIGHEST_RETRY = 60.0
"""Seconds. Linux gives a connection up after some 15 retransmissions; those of the simulator end earlier, by its rules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What lies between any two peers. Every message draws its own luck.

    Attributes:
        latency: shortest and longest way, in seconds; uniform between them.
        loss: probability that a packet is lost, 0 to below 1.
        retransmit: seconds until a lost packet is sent again, doubling each time, as TCP does; what comes after it on
            the same connection waits, but not longer than until its own acknowledgement has told the sender of the loss
            (RACK, RFC 8985). `None`: what is lost is lost, as with datagrams, and nothing waits.
    """

    latency: tuple[float, float]
    loss: float = 0.0
    retransmit: float | None = 0.2

    @classmethod
    def lan(cls, *, loss: float = 0.0) -> Link:
        """A switch and two operating systems; Linux retransmits after 200 ms at the earliest."""
        return cls(latency=(0.0002, 0.003), loss=loss)

    @classmethod
    def wan(cls, *, loss: float = 0.0) -> Link:
        """From the same town to another continent."""
        return cls(latency=(0.01, 0.15), loss=loss, retransmit=0.4)

    def delay(self, rng: random.Random) -> float | None:
        """Seconds that one message takes; `None` if it never arrives."""
        low, high = self.latency
        taken = low + (high - low) * rng.random()
        if self.loss:
            wait = self.retransmit
            while rng.random() < self.loss:
                if wait is None:
                    return None
                taken += wait
                wait = min(2 * wait, HIGHEST_RETRY)
        return taken


@dataclass(slots=True)
class Traffic:
    """What was sent, counted where it was sent."""

    messages: int = 0
    size: int = 0


class Clock:
    """Virtual time: a heap of things to do. Things at the same time are done in the order in which they were planned."""

    def __init__(self, start: float) -> None:
        self.now = start
        self._planned: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = count()

    def at(self, time: float, act: Callable[..., None], *args: Any) -> None:
        """Do `act(*args)` at `time`, or now if that is over."""
        heapq.heappush(self._planned, (max(time, self.now), next(self._number), act, args))

    def after(self, seconds: float, act: Callable[..., None], *args: Any) -> None:
        """Do `act(*args)` in `seconds`."""
        self.at(self.now + seconds, act, *args)

    def run(self, until: float) -> None:
        """Let time pass up to `until`."""
        planned = self._planned
        while planned and planned[0][0] <= until:
            self.now, _, act, args = heapq.heappop(planned)
            act(*args)
        self.now = until


class Wires:
    """Carries messages between peers, in order on each connection, unless a partition lies between them."""

    def __init__(self, clock: Clock, link: Link, rng: random.Random) -> None:
        self.link = link
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)
        self._clock, self._rng = clock, rng
        self._sides: dict[PeerId, int] = {}
        self._former: tuple[float, dict[PeerId, int]] = (-INFINITY, {})
        self._last: dict[tuple[PeerId, PeerId], float] = {}

    def part(self, *groups: Collection[PeerId]) -> None:
        """Let nothing pass between the groups. Whoever is in none of them is in a group with the others like it."""
        self._former = (self._clock.now, self._sides)
        self._sides = {peer: number for number, group in enumerate(groups, 1) for peer in group}

    def heal(self) -> None:
        """Let everything pass again."""
        self.part()

    def parted(self, one: PeerId, other: PeerId, *, within: float = 0.0) -> bool:
        """Whether a partition lies between two peers, or lay `within` so many seconds."""
        if self._sides and self._sides.get(one, 0) != self._sides.get(other, 0):
            return True
        ended, sides = self._former
        return self._clock.now - ended < within and sides.get(one, 0) != sides.get(other, 0)

    def delay(self) -> float:
        """Seconds that one message takes when whoever sends it tries until it arrives."""
        while (taken := self.link.delay(self._rng)) is None:
            continue
        return taken

    def count(self, kind: str, size: int) -> None:
        """A message of `size` bytes was sent."""
        traffic = self.traffic[kind]
        traffic.messages += 1
        traffic.size += size

    def arrival(self, sender: PeerId, receiver: PeerId, kind: str, size: int) -> float | None:
        """Send a message: when it arrives; `None` if it is lost. Whatever parts the two is for the caller to see."""
        traffic = self.traffic[kind]
        traffic.messages += 1
        traffic.size += size
        taken = self.link.delay(self._rng)
        if taken is None:
            return None
        arrives = self._clock.now + taken
        if self.link.retransmit is not None:
            stalled = self._last.get((sender, receiver), 0.0)
            if stalled > arrives:
                arrives = min(stalled, arrives + 2 * self.link.latency[1])
            self._last[sender, receiver] = arrives
        return arrives

    def forget(self, one: PeerId, other: PeerId) -> None:
        """The connection between two peers is gone, and with it what waits on it."""
        self._last.pop((one, other), None)
        self._last.pop((other, one), None)

"""A machine of the paths, and a network in which every attempt ends as scripted, under virtual time."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from itertools import count

from libmesh.core.paths import Paths
from libmesh.core.paths_io import Effect, Ended, Event, PathIs, PathsConfig, Stop, Try, Wake, Wanted
from libmesh.core.ways import PUNCH
from libmesh.peers import PathKind, PeerId

ME, THEM, RELAY = PeerId("me"), PeerId("them"), PeerId("relay")
A, B, C = (f"/ip4/8.8.8.{n}/tcp/1" for n in (1, 2, 3))
R, S = (f"/ip4/9.9.9.{n}/tcp/1/p2p/{RELAY}{n}/p2p-circuit" for n in (1, 2))
HOME = "/ip4/192.168.1.7/tcp/1"
CONFIG = PathsConfig()
NEVER = 1e9

Script = dict[str, tuple[float, str | None]]
"""For each way: seconds until the attempt ends, and the reason if it fails."""


@dataclass
class World:
    """A machine, and a network in which every attempt ends as scripted."""

    script: Script
    seed: int = 1
    now: float = 0.0
    kind: PathKind | None = None
    tried: list[tuple[float, str]] = field(default_factory=list)
    stopped: list[tuple[float, str]] = field(default_factory=list)
    told: list[tuple[float, Effect]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = Paths(ME, CONFIG, rng=random.Random(self.seed))
        self._running: dict[str, int] = {}
        self._ends: list[tuple[float, int, str, str | None]] = []
        self._numbers = count()

    def tell(self, event: Event) -> None:
        for effect in self.machine.handle(event, self.now):
            match effect:
                case Try(_, way):
                    assert way not in self._running, "one attempt at a time at each way"
                    self.tried.append((round(self.now, 6), way))
                    delay, reason = self.script.get(way, (NEVER, None))
                    self._running[way] = number = next(self._numbers)
                    heapq.heappush(self._ends, (self.now + delay, number, way, reason))
                case Stop(_, way):
                    del self._running[way]
                    self.stopped.append((round(self.now, 6), way))
                case _:
                    self.told.append((round(self.now, 6), effect))

    def want(self, *addresses: str) -> None:
        self.tell(Wanted(THEM, addresses))

    def path(self, kind: PathKind | None, *, inbound: bool = False) -> None:
        self.kind = kind
        self.tell(PathIs(THEM, kind, inbound))

    def run(self, until: float) -> None:
        """Let time pass."""
        while True:
            deadline = self.machine.deadline()
            alarm = NEVER if deadline is None else max(deadline, self.now)
            end = self._ends[0][0] if self._ends else NEVER
            if min(alarm, end) > until:
                break
            if alarm < end:
                self.now = alarm
                self.tell(Wake())
                after = self.machine.deadline()
                assert after is None or after > self.now, "a wake-up moves the deadline"
            else:
                self.now, number, way, reason = heapq.heappop(self._ends)
                if self._running.get(way) == number:
                    self._end(way, reason)
        self.now = until

    def _end(self, way: str, reason: str | None) -> None:
        if reason is None:
            kind = (
                PathKind.PUNCHED
                if way == PUNCH
                else PathKind.RELAYED
                if "circuit" in way
                else PathKind.DIRECT
            )
            if self.kind is None or kind is not PathKind.RELAYED:
                self.path(kind)
        if way in self._running:
            del self._running[way]
            self.tell(Ended(THEM, way, reason))

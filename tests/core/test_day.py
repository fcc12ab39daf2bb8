"""A day of peers that come, are reached this way and that, and go, in virtual time: when the last has gone, nothing is left."""

from __future__ import annotations

import gc
import heapq
import random
from collections.abc import Callable
from functools import partial
from itertools import count

from libmesh.core import membership_io as members
from libmesh.core import reservations as places
from libmesh.core.paths import Paths
from libmesh.core.paths_io import (
    AddressesAre,
    Effect,
    Ended,
    HereChanged,
    PathIs,
    PathsConfig,
    Stop,
    Try,
    Unwanted,
    Wake,
    Wanted,
)
from libmesh.core.reservations import Reservations
from libmesh.peers import PathKind, PeerId
from tests.core.paths_world import A, B, C, R, S
from tests.members import membership, peer, record

DAY = 24 * 3600.0

COME_EVERY = 30.0
"""Seconds between two peers that come; each stays for ten times as long."""


def held_by(machine: object) -> int:
    """How many objects hang on a machine, apart from code, types and what is there once for all."""
    seen: set[int] = set()
    left = [machine]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | Callable | random.Random):  # type: ignore[arg-type]
            continue
        seen.add(id(one))
        left += gc.get_referents(one)
    return len(seen)


class Day:
    """Runs things at their times."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), what))

    def run(self, until: float, deadline: Callable[[], float | None], wake: Callable[[], None]) -> None:
        """Let time pass; `wake` at each `deadline`."""
        while True:
            alarm = deadline()
            at = min(until, self._due[0][0] if self._due else until, until if alarm is None else alarm)
            self.now = max(self.now, at)
            if alarm is not None and alarm <= self.now:
                wake()
                after = deadline()
                assert after is None or after > self.now, "a wake-up moves the deadline"
            elif self._due and self._due[0][0] <= self.now:
                heapq.heappop(self._due)[2]()
            else:
                return


def test_a_day_of_searches_for_paths_leaves_nothing() -> None:
    day = Day(1)
    machine = Paths(PeerId("me"), PathsConfig(), rng=day.rng)
    running: set[tuple[PeerId, str]] = set()
    empty, most, came = held_by(machine), 0, 0

    def take(effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Try(who, way):
                    running.add((who, way))
                    day.later(day.rng.uniform(0.01, 3), partial(end, who, way))
                case Stop(who, way):
                    running.discard((who, way))

    def tell(event: object) -> None:
        take(machine.handle(event, day.now))  # type: ignore[arg-type]

    def end(who: PeerId, way: str) -> None:
        if (who, way) not in running:
            return
        running.discard((who, way))
        good = day.rng.random() < (0.5 if "circuit" in way else 0.05)
        if good:
            tell(PathIs(who, PathKind.RELAYED if "circuit" in way else PathKind.DIRECT, inbound=False))
        tell(Ended(who, way, None if good else "refused"))

    def come() -> None:
        nonlocal most, came
        came += 1
        who, stays = PeerId(f"peer{came}"), day.rng.expovariate(1 / (10 * COME_EVERY))
        tell(Wanted(who, tuple(day.rng.sample([A, B, C, R, S], 3))))
        for _ in range(3):
            new = tuple(day.rng.sample([A, B, C, R, S], 2))
            day.later(day.rng.uniform(0, stays), partial(tell, AddressesAre(who, new)))
        day.later(stays, lambda: tell(PathIs(who, None, inbound=False)))
        day.later(stays, lambda: tell(Unwanted(who)))
        day.later(
            stays + 10, lambda: tell(PathIs(who, None, inbound=False))
        )  # what a late attempt still made
        if day.now < DAY:
            day.later(day.rng.expovariate(1 / COME_EVERY), come)
        if not came % 100:
            tell(HereChanged((day.rng.choice([A, B]),)))
            most = max(most, held_by(machine))

    come()
    day.run(2 * DAY, machine.deadline, lambda: tell(Wake()))
    assert came > 2000
    assert not running
    assert machine.deadline() is None
    assert held_by(machine) <= empty + 8  # the heap of alarms keeps a few that have rung
    assert most < empty + 4000


def test_a_day_of_members_that_come_once_leaves_no_more_than_their_tombstones_last() -> None:
    day = Day(1)
    machine = membership(1)
    machine.handle(members.Wake(), 0.0)
    weights: list[int] = []

    def tell(event: members.Event) -> None:
        machine.handle(event, day.now)

    def come(number: int) -> None:
        who, lowest = peer(number), day.rng.random() < 0.5
        tell(members.RecordHeard(record(number, incarnation=int(day.now * 1000) + 1), gossiped=lowest))
        tell(members.Connected(who))
        day.later(200, lambda: tell(members.Disconnected(who)))
        day.later(201, lambda: tell(members.DialFailed(who)))
        if day.now < DAY:
            day.later(10 * COME_EVERY, lambda: come(number + 1))
        if not (number - 2) % 12:
            weights.append(held_by(machine))

    come(2)
    day.run(DAY + 3 * 3600, machine.deadline, lambda: tell(members.Wake()))
    assert len(weights) >= 24
    assert max(weights[12:]) <= max(weights[4:12]) + 50, (
        "the second half of the day holds no more than the first"
    )
    assert machine.view(lambda _: None).peers == ()


def test_a_day_of_relays_that_come_and_go_leaves_nothing() -> None:
    day = Day(1)
    machine = Reservations(rng=day.rng)
    empty = held_by(machine)

    def tell(event: places.Event) -> None:
        for effect in machine.handle(event, day.now):
            if isinstance(effect, places.Ask):
                good = day.rng.random() < 0.5
                said = places.Reserved(effect.relay, 600.0) if good else places.Failed(effect.relay)
                day.later(day.rng.uniform(0.05, 5), partial(tell, said))
                day.later(day.rng.uniform(6, 600), partial(tell, places.Lost(effect.relay)))

    for turn in range(int(DAY / 600)):
        relays = tuple(PeerId(f"relay{turn + n}") for n in range(day.rng.randint(0, 5)))
        day.later(600.0 * turn, partial(tell, places.SetRelays(relays)))
    day.later(DAY, lambda: tell(places.SetRelays(())))
    day.run(DAY + 3600, machine.deadline, lambda: tell(places.Wake()))
    assert machine.held == ()
    assert machine.deadline() is None
    assert held_by(machine) <= empty + 2

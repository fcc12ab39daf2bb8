"""Which way to a peer is tried, and when: direct, then punched, then relayed; and back up again.

Theory of operation
-------------------
A *search* is what goes on for one peer. It has lanes, each a queue of ways that are begun one after the other, `stagger`
apart or as soon as the one before has failed (RFC 8305, "happy eyeballs"):

======== ============================= =========================================================================
lane     ways                          begins
======== ============================= =========================================================================
direct   its addresses, near ones      at once
         first (`ways`)
relay    its circuits                  `head_start` later, `near_start` or at once where the direct lane has little
                                       hope (`PathsConfig`), or as soon as that is at its end
punch    a hole punch                  while there is a relayed path: at once on the side that was dialled (DCUtR has
                                       it start, libp2p specs `relay/DCUtR`), `courtesy` later on the side that dialled
======== ============================= =========================================================================

The first connection of any kind ends the waiting. A direct or punched one ends the search. A relayed one ends the relay
lane only: what is under way in the direct lane may still do better, and the punch begins. If nothing did better, the next
*round* (all direct addresses and a punch) comes after a pause that doubles from `retry_min` to `retry_max`, or at once on
a hint: new addresses of the peer or of ours, a change of the network. Hints are cheap to cause, so rounds are never closer
together than `hint_gap`.

The driver does what the effects say and reports the end of every attempt; it reports each change of the best path, too,
however it came about. `now` is in seconds, from a clock that never jumps.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from libmesh.core.paths_io import (
    AddressesAre,
    Effect,
    Ended,
    Event,
    HereChanged,
    PathDoubted,
    PathIs,
    PathsConfig,
    Reached,
    Stop,
    Try,
    Unreachable,
    Unwanted,
    Wake,
    Wanted,
)
from libmesh.core.timers import INFINITY, Timers
from libmesh.core.ways import PUNCH, Ways, is_circuit, ways_to
from libmesh.peers import Attempt, PathKind, PeerId

MAX_REASONS = 32
"""Failed ways that are remembered of one peer; those that failed longest ago are forgotten first."""


@dataclass(slots=True)
class _Lane:
    """Ways in order, of which the next one begins at `next`."""

    todo: deque[str] = field(default_factory=deque)
    running: set[str] = field(default_factory=set)
    next: float = INFINITY

    @property
    def over(self) -> bool:
        return not self.todo and not self.running

    def begin(self, ways: Iterable[str], at: float) -> None:
        self.todo = deque(way for way in ways if way not in self.running)
        self.next = at if self.todo else INFINITY

    def ended(self, way: str, now: float) -> None:
        self.running.discard(way)
        if self.todo:
            self.next = min(self.next, now)


@dataclass(slots=True)
class _Search:
    """What goes on for one peer."""

    addresses: tuple[str, ...] = ()
    wanted: bool = False
    doubted: bool = False
    kind: PathKind | None = None
    direct: _Lane = field(default_factory=_Lane)
    relay: _Lane = field(default_factory=_Lane)
    punch: _Lane = field(default_factory=_Lane)
    rounds: int = 0  # of a relayed path, that came to nothing
    began: float = -INFINITY  # the last round
    again: float = INFINITY  # the next round
    reasons: dict[str, str] = field(default_factory=dict)
    former: dict[str, str] = field(default_factory=dict)  # of the round before, until this one is over

    @property
    def lanes(self) -> tuple[_Lane, _Lane, _Lane]:
        return self.direct, self.relay, self.punch

    @property
    def next(self) -> float:
        return min(self.again, *(lane.next for lane in self.lanes))

    @property
    def known(self) -> dict[str, str]:
        """Why each way failed when it last did, the newest last."""
        former = {way: reason for way, reason in self.former.items() if way not in self.reasons}
        return dict([*former.items(), *self.reasons.items()][-MAX_REASONS:])

    def forget_reasons(self, *, but_of_direct: bool = False) -> None:
        kept = {way: why for way, why in self.known.items() if way != PUNCH and not is_circuit(way)}
        self.former, self.reasons = {}, kept if but_of_direct else {}


class Paths:
    """The searches for paths of one node.

    Args:
        me: this node's id.
        config: the times.
        rng: draws the pauses.
    """

    def __init__(self, me: PeerId, config: PathsConfig, *, rng: random.Random) -> None:
        self._me, self._config, self._rng = me, config, rng
        self._mine: tuple[str, ...] = ()
        self._searches: dict[PeerId, _Search] = {}
        self._timers = Timers[PeerId]()

    def reasons(self, peer: PeerId) -> tuple[Attempt, ...]:
        """Why each way to `peer` that was tried since it last had a direct path failed, when it last did.

        While a round is under way, what the one before came to is told of the ways that have not failed in this one.
        """
        search = self._searches.get(peer)
        return () if search is None else _attempts(search.known)

    def deadline(self) -> float | None:
        """When `handle` wants to hear `Wake`; `None`: not before something else happens."""
        at = self._timers.next()
        return None if at == INFINITY else at

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in what happened; return what to do."""
        match event:
            case Wanted(peer, addresses):
                effects = self._want(peer, addresses, now)
            case Unwanted(peer):
                effects = self._unwant(peer)
            case Ended(peer, way, reason):
                effects = self._ended(peer, way, reason, now)
            case PathIs(peer, kind, inbound):
                effects = self._path_is(peer, kind, inbound, now)
            case PathDoubted(peer, addresses):
                effects = self._doubt(peer, addresses, now)
            case AddressesAre(peer, addresses):
                effects = self._addresses_are(peer, addresses, now)
            case HereChanged(addresses):
                effects = self._here_changed(addresses, now)
            case Wake():
                effects = [effect for peer in self._timers.pop_due(now) for effect in self._go_on(peer, now)]
        return effects

    # ── what happens ─────────────────────────────────────────────────────────────────────────────────────────────

    def _want(self, peer: PeerId, addresses: Sequence[str], now: float) -> list[Effect]:
        search = self._searches.setdefault(peer, _Search())
        search.addresses = tuple(addresses) or search.addresses
        if search.kind is not None:
            return [Reached(peer)]
        if not search.wanted:
            search.wanted = True
            search.forget_reasons()
            ways = ways_to(peer, search.addresses, me=self._me, mine=self._mine)
            search.direct.begin(ways.direct, now)
            search.relay.begin(ways.circuits, now + self._head_start(ways))
        return self._go_on(peer, now)

    def _head_start(self, ways: Ways) -> float:
        if ways.far:
            return self._config.head_start
        return self._config.near_start if ways.near else 0.0

    def _unwant(self, peer: PeerId) -> list[Effect]:
        search = self._searches.get(peer)
        if search is None or not search.wanted:
            return []
        search.wanted = False
        return self._give_up(peer, search) if search.kind is None else []

    def _ended(self, peer: PeerId, way: str, reason: str | None, now: float) -> list[Effect]:
        search = self._searches.get(peer)
        lane = next((lane for lane in search.lanes if way in lane.running), None) if search else None
        if search is None or lane is None:
            return []
        lane.ended(way, now)
        if reason is not None:
            _remember(search, way, reason)
        return self._go_on(peer, now)

    def _path_is(self, peer: PeerId, kind: PathKind | None, inbound: bool, now: float) -> list[Effect]:
        if kind is None:
            return self._lost(peer)
        search = self._searches.setdefault(peer, _Search())
        before, search.kind = None if search.doubted else search.kind, kind
        effects: list[Effect] = [Reached(peer)] if search.wanted else []
        search.wanted = search.doubted = False
        if kind is not PathKind.RELAYED:
            search.forget_reasons(but_of_direct=kind is PathKind.PUNCHED)
            search.rounds = 0
            return effects + self._stop(peer, search)
        effects += self._stop_lane(peer, search.relay)
        if before is not PathKind.RELAYED:
            search.rounds, search.again = 0, INFINITY
            search.began = now
            search.punch.begin([PUNCH], now if inbound else now + self._config.courtesy)
            if search.direct.over and (inbound or before is not None):
                ways = ways_to(peer, search.addresses, me=self._me, mine=self._mine)
                search.direct.begin(ways.direct, now)
        return effects + self._go_on(peer, now)

    def _lost(self, peer: PeerId) -> list[Effect]:
        search = self._searches.get(peer)
        if search is None:
            return []
        search.kind, search.doubted = None, False
        return [] if search.wanted else self._give_up(peer, search)

    def _doubt(self, peer: PeerId, addresses: tuple[str, ...], now: float) -> list[Effect]:
        search = self._searches.get(peer)
        if search is None or search.kind is None or search.doubted:
            return []
        search.addresses, search.doubted = addresses or search.addresses, True
        search.again = now
        return self._go_on(peer, now)

    def _addresses_are(self, peer: PeerId, addresses: tuple[str, ...], now: float) -> list[Effect]:
        search = self._searches.get(peer)
        if search is None or search.addresses == addresses:
            return []
        search.addresses = addresses
        return self._hint(peer, search, now)

    def _here_changed(self, addresses: tuple[str, ...], now: float) -> list[Effect]:
        self._mine = addresses
        return [effect for peer, search in self._searches.items() for effect in self._hint(peer, search, now)]

    def _hint(self, peer: PeerId, search: _Search, now: float) -> list[Effect]:
        """Something changed that may make a direct path possible: the next round comes at once."""
        if search.kind is not PathKind.RELAYED and not search.doubted:
            return []
        search.rounds = 0
        search.again = max(now, search.began + self._config.hint_gap)
        return self._go_on(peer, now)

    # ── what is done ─────────────────────────────────────────────────────────────────────────────────────────────

    def _go_on(self, peer: PeerId, now: float) -> list[Effect]:
        """Begin what is due for one peer, and set its alarm."""
        search = self._searches[peer]
        effects: list[Effect] = []
        if search.again <= now:
            effects += self._begin_round(peer, search, now)
        for lane in (search.direct, search.punch):
            effects += self._begin_next(peer, lane, now)
        if search.direct.over and search.relay.todo and not search.relay.running:
            search.relay.next = min(search.relay.next, now)
        effects += self._begin_next(peer, search.relay, now)
        if all(lane.over for lane in search.lanes):
            effects += self._at_the_end(peer, search, now)
        if peer in self._searches:
            self._timers.set(peer, search.next)
        return effects

    def _begin_next(self, peer: PeerId, lane: _Lane, now: float) -> list[Effect]:
        if lane.next > now:
            return []
        way = lane.todo.popleft()
        lane.running.add(way)
        lane.next = now + self._config.stagger if lane.todo else INFINITY
        return [Try(peer, way)]

    def _begin_round(self, peer: PeerId, search: _Search, now: float) -> list[Effect]:
        ways = ways_to(peer, search.addresses, me=self._me, mine=self._mine)
        effects: list[Effect] = []
        search.former, search.reasons = search.known, {}
        search.began, search.again = now, INFINITY
        if search.doubted:  # what is under way began before the path fell silent, maybe in another network
            effects = [effect for lane in search.lanes for effect in self._stop_lane(peer, lane)]
            search.relay.begin(ways.circuits, now)
        else:
            search.punch.begin([PUNCH], now)
        search.direct.begin(ways.direct, now)
        return effects

    def _at_the_end(self, peer: PeerId, search: _Search, now: float) -> list[Effect]:
        """Every way has been tried."""
        if search.wanted:
            attempts = _attempts(search.reasons)
            return [Unreachable(peer, attempts), *self._give_up(peer, search)]
        if search.doubted:
            search.again = min(search.again, now + self._config.doubt_gap)
            return []
        search.former.clear()
        if search.kind is PathKind.RELAYED and search.again == INFINITY:
            pause = min(self._config.retry_min * 2.0 ** min(search.rounds, 32), self._config.retry_max)
            search.rounds += 1
            search.again = now + pause * self._rng.uniform(0.75, 1.25)
        return []

    def _give_up(self, peer: PeerId, search: _Search) -> list[Effect]:
        effects = self._stop(peer, search)
        del self._searches[peer]
        return effects

    def _stop(self, peer: PeerId, search: _Search) -> list[Effect]:
        effects = [effect for lane in search.lanes for effect in self._stop_lane(peer, lane)]
        search.again = INFINITY
        self._timers.set(peer, INFINITY)
        return effects

    @staticmethod
    def _stop_lane(peer: PeerId, lane: _Lane) -> list[Effect]:
        effects: list[Effect] = [Stop(peer, way) for way in sorted(lane.running)]
        lane.todo.clear()
        lane.running.clear()
        lane.next = INFINITY
        return effects


def _attempts(reasons: dict[str, str]) -> tuple[Attempt, ...]:
    return tuple(Attempt(way=way, reason=reason) for way, reason in reasons.items())


def _remember(search: _Search, way: str, reason: str) -> None:
    search.reasons.pop(way, None)
    search.reasons[way] = reason
    if len(search.reasons) > MAX_REASONS:
        del search.reasons[next(iter(search.reasons))]

"""Who answers: probes in turn, through others where there is no direct answer, and at once where there is doubt.

The rules of SWIM (Das, Gupta, Motivala, "SWIM: Scalable Weakly-consistent Infection-style Process Group Membership
Protocol", 2002), with one change: what others say of a peer never counts against it. A hint from them only makes us
probe it ourselves, now instead of in its turn. So nobody can talk a peer dead.

One probe's life::

    turn, hint or doubt ─▶ Ping ──no answer in `timeout`──▶ PingThrough ──no answer in `indirect_timeout`──▶ Silent
                            └──────── Answered ────────▶ Heard ◀───────────── Answered ──────┘

One peer is probed per `interval`. SWIM's order alone, shuffled anew after each round, leaves a peer of ten unprobed
for four seconds once in a hundred times: everybody's luck adds up. So whoever watches has *wards*, and all together see to
it that everybody is somebody's first ward. Every other turn is the first ward's, every fourth the other's, and the rest go
round: they find what a ward's watcher cannot, because it is gone itself or has the only good line. A doubted peer is probed
again and again until it answers or is no longer watched.

Where nobody can be asked about a silent peer, as in a mesh of two, it is reached anew instead, at each unanswered probe:
a few losses in a row stop one TCP connection for longer than a death may go unnoticed, but not several, begun one after
the other.

Not everybody is connected to everybody in a large mesh. `Watch` says who can be asked directly, and who can be asked
about whom. A peer that cannot be asked directly is asked through others at once; one that nobody can be asked about
takes no turns, as a lost packet or two would make it look silent, and is only probed when doubted.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from libmesh.core.ranges import check_counts, check_numbers
from libmesh.peers import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class LivenessConfig:
    """Times in seconds, each greater than 0. The defaults are those of `lan`.

    Attributes:
        interval: between two probes. One small stream each; the load does not grow with the mesh. A machine that vanished
            is probed for the first time within two of these.
        timeout: for a direct answer. Three times the round-trip time, at least, plus what a busy process needs.
        indirect_timeout: for an answer through others; they need `timeout` themselves.
        helpers: how many others are asked. SWIM's k; with loss p on each leg, all fail with (1 - (1-p)⁴)ᵏ.
    """

    interval: float = 0.5
    timeout: float = 0.5
    indirect_timeout: float = 0.7
    helpers: int = 3

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the field, when a value cannot work."""
        check_numbers(self, "interval", "timeout", "indirect_timeout")
        check_counts(self, "helpers")

    @classmethod
    def lan(cls) -> LivenessConfig:
        """For round trips of some milliseconds. `timeout` outlasts the first retransmission of a lost packet (0.2 s).

        The second one comes after 0.6 s. With a fifth of all packets lost, one probe in twelve needs it, and goes through
        others meanwhile; to wait for it would be a tenth of the time in which a death must be known.
        """
        return cls()

    @classmethod
    def wan(cls) -> LivenessConfig:
        """For round trips of up to 300 ms. A helper needs up to two of them, and has `timeout` for its own."""
        return cls(interval=0.75, timeout=1.0, indirect_timeout=1.6)


@dataclass(frozen=True, slots=True)
class Watch:
    """Whom to watch from now on.

    Attributes:
        peers: all of them.
        doubted: those among them that are suspected already.
        asked: who can be asked directly; `None`: all of them.
        nearby: for each peer that takes turns, whom to ask about it; `None`: everybody about everybody.
        wards: who has more of our turns than others, the first one most; empty: all take turns alike.
    """

    peers: frozenset[PeerId]
    doubted: frozenset[PeerId] = frozenset()
    asked: frozenset[PeerId] | None = None
    nearby: Mapping[PeerId, Collection[PeerId]] | None = None
    wards: tuple[PeerId, ...] = ()


@dataclass(frozen=True, slots=True)
class Doubt:
    """Somebody hears nothing of `peer`: find out now."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Answered:
    """`peer` answered a probe, directly or through another."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Wake:
    """`deadline()` has come."""


Event = Watch | Doubt | Answered | Wake


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask `peer` whether it is there. Tell `Answered`, or nothing."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PingThrough:
    """Ask each of `helpers` whether `peer` is there. Tell `Answered` for the first yes, or nothing."""

    peer: PeerId
    helpers: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Reach:
    """Make another connection to `peer`, beside the one on which it is silent. Tell `Answered` if that succeeds, or nothing."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Silent:
    """`peer` answered neither us nor through others."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Heard:
    """`peer` is there."""

    peer: PeerId


Effect = Ping | PingThrough | Reach | Silent | Heard


_WARD_OF_TURN = (0, 1, 0, None)
"""Whose turn it is, of the wards; `None`: the round's."""


@dataclass(slots=True)
class _Probe:
    direct: bool
    ends: float


class Liveness:
    """The prober of one peer. Watches nobody until told.

    Args:
        config: the times.
        rng: orders the rounds and picks helpers; pass a seeded one to repeat a run.
    """

    def __init__(self, config: LivenessConfig | None = None, *, rng: random.Random) -> None:
        self.config = config or LivenessConfig()
        self._rng = rng
        self._watch = Watch(frozenset())
        self._watched: frozenset[PeerId] = frozenset()
        self._turns: frozenset[PeerId] = frozenset()
        self._doubted: set[PeerId] = set()
        self._round: list[PeerId] = []
        self._turn = 0
        self._probes: dict[PeerId, _Probe] = {}
        self._next_turn = float("-inf")

    def deadline(self) -> float | None:
        """When `handle(Wake(), …)` is next needed; later than the `now` of the last one. `None`: not before an event."""
        if not self._watched:
            return None
        return min([self._next_turn, *(probe.ends for probe in self._probes.values())])

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event and say what to do."""
        match event:
            case Watch():
                return self._change(event, now)
            case Doubt(peer):
                if peer not in self._watched:
                    return []
                return self._probe(peer, now)
            case Answered(peer):
                return self._answered(peer)
            case Wake():
                return self._wake(now)

    def _change(self, watch: Watch, now: float) -> list[Effect]:
        if not self._watched and watch.peers:
            self._next_turn = now + self.config.interval * self._rng.random()
        self._turns = watch.peers if watch.nearby is None else watch.peers & watch.nearby.keys()
        wards = tuple(peer for peer in watch.wards if peer in self._turns)
        self._watch, self._watched = replace(watch, wards=wards), watch.peers
        self._round = [peer for peer in self._round if peer in self._turns]
        for gone in self._probes.keys() - self._watched:
            del self._probes[gone]
        doubted = set(watch.doubted) & self._watched
        fresh = doubted - self._doubted
        self._doubted = doubted
        return [effect for peer in sorted(fresh) for effect in self._probe(peer, now)]

    def _answered(self, peer: PeerId) -> list[Effect]:
        if peer not in self._watched:
            return []
        self._probes.pop(peer, None)
        self._doubted.discard(peer)
        return [Heard(peer)]

    def _wake(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for peer, probe in list(self._probes.items()):
            if probe.ends <= now:
                effects += self._unanswered(peer, probe, now)
        if self._watched and self._next_turn <= now:
            self._next_turn = now + self.config.interval
            effects += self._take_turn(now)
        return effects

    def _take_turn(self, now: float) -> list[Effect]:
        self._turn = (self._turn + 1) % 4
        place = _WARD_OF_TURN[self._turn]
        if place is not None and len(self._watch.wards) > place:
            return self._probe(self._watch.wards[place], now)
        if not self._round:
            self._round = sorted(self._turns)
            self._rng.shuffle(self._round)
        return self._probe(self._round.pop(), now) if self._round else []

    def _probe(self, peer: PeerId, now: float) -> list[Effect]:
        if peer in self._probes:
            return []
        if not self._can_ask(peer) and (effects := self._probe_through(peer, now)):
            return effects
        self._probes[peer] = _Probe(direct=True, ends=now + self.config.timeout)
        return [Ping(peer)]

    def _probe_through(self, peer: PeerId, now: float) -> list[Effect]:
        helpers = self._helpers(peer)
        if not helpers:
            return []
        self._probes[peer] = _Probe(direct=False, ends=now + self.config.indirect_timeout)
        return [PingThrough(peer, helpers)]

    def _unanswered(self, peer: PeerId, probe: _Probe, now: float) -> list[Effect]:
        if probe.direct and (effects := self._probe_through(peer, now)):
            return effects
        del self._probes[peer]
        anew = [Reach(peer)] if probe.direct and self._can_ask(peer) else []
        again = self._probe(peer, now) if peer in self._doubted else []
        return [Silent(peer), *anew, *again]

    def _can_ask(self, peer: PeerId) -> bool:
        return self._watch.asked is None or peer in self._watch.asked

    def _helpers(self, peer: PeerId) -> tuple[PeerId, ...]:
        nearby = self._watch.nearby
        known = self._watched if nearby is None else set(nearby.get(peer, ())) & self._watched
        others = sorted(p for p in known - {peer} - self._doubted if self._can_ask(p))
        return tuple(self._rng.sample(others, min(self.config.helpers, len(others))))

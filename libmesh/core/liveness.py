"""Who answers: probes in turn, through others where there is no direct answer, and at once where there is doubt.

The rules of SWIM (Das, Gupta, Motivala, "SWIM: Scalable Weakly-consistent Infection-style Process Group Membership
Protocol", 2002), with one change: what others say of a peer never counts against it. A hint from them only makes us
probe it ourselves, now instead of in its turn. So nobody can talk a peer dead.

One probe's life::

    turn, hint or doubt ─▶ Ping ──no answer in `timeout`──▶ PingThrough ──no answer in `indirect_timeout`──▶ Silent
                            └──────── Answered ────────▶ Heard ◀───────────── Answered ──────┘

Peers are probed in a random order that is shuffled anew after each round (SWIM's round-robin), one per `interval`, so
that each is probed within a bounded time by everyone. A doubted peer is probed again and again until it answers or is
no longer watched.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from libmesh.peers import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class LivenessConfig:
    """Times in seconds, each greater than 0.

    Attributes:
        interval: between two probes of the round. One small stream each; the load does not grow with the mesh.
        timeout: for a direct answer. Three times the round-trip time, at least, plus what a busy process needs.
        indirect_timeout: for an answer through others; they need `timeout` themselves.
        helpers: how many others are asked. SWIM's k; with loss p on each leg, all fail with (1 - (1-p)⁴)ᵏ.
    """

    interval: float = 1.0
    timeout: float = 0.6
    indirect_timeout: float = 0.9
    helpers: int = 3

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than 0, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Watch:
    """These are the peers to watch from now on. `doubted` are those among them that are suspected already."""

    peers: frozenset[PeerId]
    doubted: frozenset[PeerId] = frozenset()


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
class Silent:
    """`peer` answered neither us nor through others."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Heard:
    """`peer` is there."""

    peer: PeerId


Effect = Ping | PingThrough | Silent | Heard


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
        self._watched: frozenset[PeerId] = frozenset()
        self._doubted: set[PeerId] = set()
        self._round: list[PeerId] = []
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
            case Watch(peers, doubted):
                return self._watch(peers, doubted, now)
            case Doubt(peer):
                if peer not in self._watched:
                    return []
                return self._probe(peer, now)
            case Answered(peer):
                return self._answered(peer)
            case Wake():
                return self._wake(now)

    def _watch(self, peers: Collection[PeerId], doubted: Collection[PeerId], now: float) -> list[Effect]:
        if not self._watched and peers:
            self._next_turn = now + self.config.interval * self._rng.random()
        self._watched = frozenset(peers)
        self._round = [peer for peer in self._round if peer in self._watched]
        for gone in self._probes.keys() - self._watched:
            del self._probes[gone]
        fresh = (set(doubted) & self._watched) - self._doubted
        self._doubted = set(doubted) & self._watched
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
        if not self._round:
            self._round = sorted(self._watched)
            self._rng.shuffle(self._round)
        return self._probe(self._round.pop(), now)

    def _probe(self, peer: PeerId, now: float) -> list[Effect]:
        if peer in self._probes:
            return []
        self._probes[peer] = _Probe(direct=True, ends=now + self.config.timeout)
        return [Ping(peer)]

    def _unanswered(self, peer: PeerId, probe: _Probe, now: float) -> list[Effect]:
        helpers = self._helpers(peer)
        if probe.direct and helpers:
            self._probes[peer] = _Probe(direct=False, ends=now + self.config.indirect_timeout)
            return [PingThrough(peer, helpers)]
        del self._probes[peer]
        again = self._probe(peer, now) if peer in self._doubted else []
        return [Silent(peer), *again]

    def _helpers(self, peer: PeerId) -> tuple[PeerId, ...]:
        others = sorted(self._watched - {peer} - self._doubted)
        return tuple(self._rng.sample(others, min(self.config.helpers, len(others))))

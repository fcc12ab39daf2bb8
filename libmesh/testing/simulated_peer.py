"""One peer of the simulator: the real machines, and what `driver`, `probing` and `admission` do for them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import TYPE_CHECKING, Any

from libmesh import wire
from libmesh.core import liveness
from libmesh.core import membership_io as io
from libmesh.core.announcement import Announcement, Record
from libmesh.core.credentials import Credential
from libmesh.core.liveness import Liveness
from libmesh.core.membership import Membership
from libmesh.core.summary import Digest, Part
from libmesh.core.timers import INFINITY
from libmesh.identity import SecretKey
from libmesh.peers import PeerId
from libmesh.syncing import HURRY

if TYPE_CHECKING:
    from libmesh.testing.simulator import Simulator

PATIENCE = 5.0
"""Seconds after which a probe's answer is not waited for any more; as in `probing`."""

SEEK_MIN, SEEK_MAX = 0.5, 30.0
"""Seconds between attempts to find the first peer, doubling; as in `admission`."""


class Lie(Flag):
    """What a lying peer does, besides taking part."""

    NONE = 0
    FORGE = auto()  # announces in others' names that they leave
    REPLAY = auto()  # repeats announcements that it once heard
    SUSPECT = auto()  # says that it hears nothing of others
    DIGEST = auto()  # tells everybody that all others are dead
    ALL = FORGE | REPLAY | SUSPECT | DIGEST


@dataclass(eq=False, slots=True)
class SimulatedPeer:
    """One peer. Change it through `Simulator` only; read it freely.

    Attributes:
        key, credential: who it is.
        running: its process runs. `reachable`: its machine is on.
        run: counts its starts; what was sent to a former run is lost.
        membership, prober: the machines of this run.
        connections: to whom there is an admitted connection.
        links: to whom it floods gossip.
        paused_until: nothing happens in it before.
        slowness: seconds by which everything that it does is late.
    """

    world: Simulator = field(repr=False)
    key: SecretKey
    credential: Credential
    rng: random.Random = field(repr=False)
    peer: PeerId = field(init=False)
    running: bool = False
    reachable: bool = True
    run: int = 0
    membership: Membership = field(init=False, repr=False)
    prober: Liveness = field(init=False, repr=False)
    connections: set[PeerId] = field(default_factory=set, repr=False)
    links: dict[PeerId, None] = field(default_factory=dict, repr=False)
    contacts: tuple[PeerId, ...] = ()
    paused_until: float = -INFINITY
    slowness: float = 0.0
    lies: Lie = Lie.NONE
    heard: list[Record] = field(default_factory=list, repr=False)
    _watched: Any = None
    _sync_at: float = INFINITY
    _soon: float = HURRY
    _wakes: float = INFINITY
    _probes: float = INFINITY

    def __post_init__(self) -> None:
        self.peer = self.key.peer

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, clock_error: float = 0.0, spoke: float = 0.0) -> None:
        """Begin a run, knowing nobody but `contacts`, having announced itself so many seconds ago."""
        world = self.world
        self.run += 1
        self.running = self.reachable = True
        self.paused_until = -INFINITY
        self._wakes = self._probes = INFINITY
        announcement = Announcement(
            peer=self.peer,
            credential=self.credential,
            incarnation=int((world.now + clock_error) * 1000),
            sequence=0,
            addresses=world.addresses,
        )
        self.membership = Membership(
            announcement,
            mesh_id=self.credential.mesh_id,
            seal=world.seal_for(self.key.seed),
            config=world.membership,
            authentic=world.authentic,
        )
        self.prober = Liveness(world.liveness, rng=self.rng)
        self._watched = self.membership.watched
        self.tell(io.Wake(), ago=spoke)
        self._later(world.sync_interval * self.rng.random(), self._sync_turn)
        self._later(0.0, self._seek, SEEK_MIN)

    def stop(self) -> None:
        """End the run as kill -9 does."""
        self.running = False
        self.connections.clear()
        self.links.clear()

    def awake(self, run: int, act: Any, *args: Any) -> bool:
        """Whether `run` still goes and can do something now. If it is paused, it does `act` afterwards."""
        if not self.running or self.run != run:
            return False
        if self.world.now < self.paused_until:
            self.world.clock.at(self.paused_until, act, *args)
            return False
        return True

    def _later(self, seconds: float, act: Any, *args: Any) -> None:
        self.world.clock.after(seconds, self._resume, self.run, act, args)

    def _resume(self, run: int, act: Any, args: tuple[Any, ...]) -> None:
        if self.awake(run, self._resume, run, act, args):
            act(*args)

    # ── the loop of `driver` ─────────────────────────────────────────────────────────────────────────────────────

    def tell(self, event: io.Event, *, ago: float = 0.0) -> None:
        """Pass an event to the membership machine, and do what it asks."""
        world, changed = self.world, False
        for effect in self.membership.handle(event, world.now - ago):
            match effect:
                case io.Changed(peer, before, state, reason):
                    changed = True
                    if before is not state:
                        world.changed(self, peer, before, state, reason)
                case io.Publish(said):
                    world.gossip.publish(self, said)
                case io.Question(peer):
                    self._probe(liveness.Doubt(peer))
                case io.Dial(peer, _):
                    world.dial(self, peer)
                case io.Drop(peer) | io.Release(peer):
                    world.disconnect(self, peer)
        if changed and (watched := self.membership.watched) != self._watched:
            self._watched = watched
            self._probe(liveness.Watch(*watched))
        deadline = self.membership.deadline()
        if deadline is not None and deadline < self._wakes:
            self._wakes = deadline
            world.clock.at(deadline, self._wake, self.run, deadline)

    def _wake(self, run: int, planned: float) -> None:
        if self._wakes == planned and self.awake(run, self._wake, run, planned):
            self._wakes = INFINITY
            deadline = self.membership.deadline()
            if deadline is not None and deadline <= self.world.now:
                self.tell(io.Wake())
            elif deadline is not None:
                self._wakes = deadline
                self.world.clock.at(deadline, self._wake, run, deadline)

    def hear(self, said: Record | io.Suspicion) -> None:
        """Gossip came in."""
        if isinstance(said, io.Suspicion):
            self.tell(io.SuspicionHeard(said))
            return
        if self.lies and len(self.heard) < 1000:
            self.heard.append(said)
        self.tell(io.RecordHeard(said, gossiped=True))

    def _seek(self, delay: float) -> None:
        if not self.connections and self.contacts:
            for contact in self.contacts:
                self.world.dial(self, contact)
            delay = min(2 * delay, SEEK_MAX)
        else:
            delay = SEEK_MIN
        self._later(delay, self._seek, delay)

    def _sync_turn(self) -> None:
        if self.connections:
            self.world.sync(self, self.rng.choice(sorted(self.connections)))
        self._sync_at = self.world.now + self.world.sync_interval * self.rng.uniform(0.8, 1.2)
        self._later(self._sync_at - self.world.now, self._sync_if_due, self._sync_at)

    def _sync_if_due(self, planned: float) -> None:
        if planned == self._sync_at:
            self._sync_turn()

    def compared(self, *, differed: bool) -> None:
        """A comparison that it began found a difference or none: hurry with the next one, or not."""
        if not differed:
            self._soon = HURRY
        elif self._soon < self.world.sync_interval:
            self._sync_at = self.world.now + self._soon * self.rng.uniform(0.8, 1.2)
            self._soon *= 2
            self._later(self._sync_at - self.world.now, self._sync_if_due, self._sync_at)

    def digest(self, part: Part | None = None) -> Digest:
        """What it says that it knows, of a part or of all."""
        true = self.membership.digest(part)
        if Lie.DIGEST not in self.lies:
            return true
        others = frozenset(true.ages) - {self.peer}
        return Digest({p: (i + 5 if p in others else i, s) for p, (i, s) in true.ages.items()}, others, part)

    # ── the loop of `probing` ────────────────────────────────────────────────────────────────────────────────────

    def _probe(self, event: liveness.Event) -> None:
        world = self.world
        for effect in self.prober.handle(event, world.now):
            match effect:
                case liveness.Ping(peer):
                    world.probe(self, peer, None)
                case liveness.PingThrough(peer, helpers):
                    for helper in helpers:
                        world.probe(self, helper, peer)
                case liveness.Silent(peer):
                    self.tell(io.PeerSilent(peer))
                case liveness.Heard(peer):
                    self.tell(io.PeerHeard(peer))
        deadline = self.prober.deadline()
        if deadline is not None and deadline < self._probes:
            self._probes = deadline
            world.clock.at(deadline, self._turn, self.run, deadline)

    def _turn(self, run: int, planned: float) -> None:
        if self._probes == planned and self.awake(run, self._turn, run, planned):
            self._probes = INFINITY
            deadline = self.prober.deadline()
            if deadline is not None and deadline <= self.world.now:
                self._probe(liveness.Wake())
            elif deadline is not None:
                self._probes = deadline
                self.world.clock.at(deadline, self._turn, run, deadline)

    def answered(self, peer: PeerId, asked_at: float) -> None:
        """A probe's answer came in."""
        if self.world.now - asked_at <= PATIENCE:
            self._probe(liveness.Answered(peer))

    # ── lies ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def lie(self, every: float) -> None:
        """Tell lies about somebody, and again `every` so many seconds."""
        others = [peer for peer in self.membership.digest().ages if peer != self.peer]
        if others:
            victim = self.rng.choice(sorted(others))
            age = self.membership.digest().ages[victim]
            if Lie.SUSPECT in self.lies:
                self.world.gossip.publish(self, io.Suspicion(victim, *age))
            if Lie.FORGE in self.lies:
                self.world.gossip.publish(self, self._forgery(victim, age[0]))
            if Lie.REPLAY in self.lies and self.heard:
                self.world.gossip.publish(self, self.rng.choice(self.heard))
        self._later(every, self.lie, every)

    def _forgery(self, victim: PeerId, incarnation: int) -> Record:
        credential = self.membership.credential_of(victim) or self.credential
        return wire.seal(
            Announcement(
                peer=victim, credential=credential, incarnation=incarnation + 1, sequence=0, leaving=True
            ),
            self.key.seed,
        )

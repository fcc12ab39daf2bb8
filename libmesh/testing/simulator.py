"""A whole mesh in one process and in virtual time, from the machines that real nodes run.

    world = Simulator(seed=7)
    world.settle(30)                                    # thirty peers that know each other
    victim = world.peer(3)
    world.kill(victim)
    took = world.run_until(lambda: world.gone(victim), limit=10)
    assert took is not None and not world.false_deaths

Each peer runs the very `Membership` and `Liveness` machines of the library, wired as `driver` and `probing` wire them;
the network under them is modelled (`simulated_net`, `simulated_connections`, `simulated_gossip`): latency, loss with
retransmission, dials that are refused or time out, hellos, digest exchanges, probes, gossip over some links only. The
same seed gives the same run, to the last event; print `world` to see the seed.

What can be done to a mesh: `join`, `leave`, `kill`, `vanish`, `restart` (with a clock that went back, too), `pause`,
`part` and `heal`, `slow`, `corrupt`. What can be asked: `gone`, `known`, `agreed`, `deaths`, `false_deaths`,
`suspicions`, `traffic`.

What is not modelled: CPU time, the bandwidth of links, NAT, relays, streams of services, the pings of the muxer, second
connections in place of silent ones, and the control messages of gossipsub. A pause is shorter than the five seconds
after which connections end.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from libmesh import wire
from libmesh.core import announcement
from libmesh.core import membership_io as io
from libmesh.core.announcement import Announcement, Record, Seal
from libmesh.core.credentials import Authority, Revoked
from libmesh.core.liveness import LivenessConfig
from libmesh.core.membership_io import MembershipConfig
from libmesh.identity import SecretKey
from libmesh.peers import MeshId, PeerId, PeerState
from libmesh.testing.simulated_connections import Connections
from libmesh.testing.simulated_gossip import Gossip
from libmesh.testing.simulated_net import Clock, Link, Traffic, Wires
from libmesh.testing.simulated_peer import Lie, SimulatedPeer

__all__ = ["Death", "Lie", "Link", "SimulatedPeer", "Simulator", "Traffic"]

START = 1_800_000_000.0
"""Seconds since the epoch, at which every simulation begins."""

AFTERMATH = 5.0
"""Seconds after a partition in which it still explains a death."""

FAREWELL = 0.3
"""Seconds that a leaving peer stays to let its goodbye out; as in `MeshConfig`."""


@dataclass(frozen=True, slots=True)
class Death:
    """`observer` took `subject` for dead at `time`.

    `true`: it was not running, or cut off from the observer then or within `AFTERMATH` before.
    """

    time: float
    observer: PeerId
    subject: PeerId
    true: bool


class Simulator:
    """A simulated mesh, empty at first.

    Args:
        seed: of everything that is left to chance, keys included.
        link: what lies between any two peers.
        membership, liveness: times of the machines; those of a LAN by default.
        degree: links over which a peer floods gossip.
        sync_interval: seconds between a peer's digest exchanges.
    """

    def __init__(
        self,
        *,
        seed: int,
        link: Link | None = None,
        membership: MembershipConfig | None = None,
        liveness: LivenessConfig | None = None,
        degree: int = 8,
        sync_interval: float = 10.0,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.membership = membership or MembershipConfig.lan()
        self.liveness = liveness or LivenessConfig.lan()
        self.sync_interval = sync_interval
        self.addresses = ("/ip4/192.0.2.1/tcp/4001",)
        self.clock = Clock(START)
        self.wires = Wires(self.clock, link or Link.lan(), self.rng)
        self.connections = Connections(self)
        self.gossip = Gossip(self, degree)
        self.peers: dict[PeerId, SimulatedPeer] = {}
        self.deaths: list[Death] = []
        self.suspicions = 0
        self._authority = Authority.of_mesh(self.rng.randbytes(32))
        self._verdicts: dict[int, tuple[Record, bool]] = {}
        self._opinions: defaultdict[PeerId, Counter[PeerState | None]] = defaultdict(Counter)
        self._running = 0
        self._last_known: dict[PeerId, tuple[PeerId, ...]] = {}

    def __repr__(self) -> str:
        return f"<Simulator seed={self.seed} peers={len(self.peers)} running={self._running} now={self.now - START:.3f}>"

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def now(self) -> float:
        """Seconds since the epoch."""
        return self.clock.now

    def run(self, seconds: float) -> None:
        """Let so much virtual time pass."""
        self.clock.run(self.now + seconds)

    def run_until(self, condition: Callable[[], bool], *, limit: float, step: float = 0.05) -> float | None:
        """Let time pass until `condition()`, asked every `step` seconds: the seconds that took, or `None` at `limit`."""
        began = self.now
        while not condition():
            if self.now - began >= limit:
                return None
            self.run(step)
        return self.now - began

    # ── the population ───────────────────────────────────────────────────────────────────────────────────────────

    def peer(self, number: int) -> PeerId:
        """The peer that came as this number, from 0."""
        return list(self.peers)[number]

    @property
    def running(self) -> list[SimulatedPeer]:
        """The peers whose processes run."""
        return [peer for peer in self.peers.values() if peer.running]

    def join(self, *, contacts: int = 3, spoke: float = 0.0) -> PeerId:
        """A new peer starts, with an invite that names up to so many random peers of the mesh.

        `spoke`: how many seconds ago it announced itself, if it is to have been there all the time.
        """
        key = SecretKey(self.rng.randbytes(32))
        peer = SimulatedPeer(
            self, key, self._authority.admit(key.public), random.Random(self.rng.getrandbits(64))
        )
        present = [p.peer for p in self.running]
        peer.contacts = tuple(self.rng.sample(present, min(contacts, len(present))))
        self.peers[peer.peer] = peer
        self._running += 1
        peer.start(spoke=spoke)
        return peer.peer

    def settle(self, count: int) -> list[PeerId]:
        """Add so many peers that know each other and are connected already. Costs no virtual time and no traffic.

        They announced themselves at different times, so that their repeats come evenly from the beginning.
        """
        before = {kind: Traffic(t.messages, t.size) for kind, t in self.wires.traffic.items()}
        crowd = max(1.0, (len(self.peers) + count) / self.membership.full_mesh)
        spoke = [self.membership.refresh * crowd * self.rng.random() for _ in range(count)]
        added = [self.join(contacts=0, spoke=ago) for ago in spoke]
        everybody = self.running
        self.rng.shuffle(everybody)
        records = [peer.membership.me for peer in everybody]
        for peer in everybody:
            for record in records:
                self._learn(peer, record)
        for peer in everybody:
            for other in sorted(p.peer for p in everybody if peer.membership.wanted(p.peer)):
                if other not in peer.connections:
                    self.connections.connect_at_once(peer, self.peers[other])
        self.wires.traffic.clear()
        self.wires.traffic.update(before)
        return added

    def _learn(self, peer: SimulatedPeer, record: Record) -> None:
        """Hear a record as by gossip; dials that it asks for fail, for `settle` connects who is still wanted at the end."""
        for effect in peer.membership.handle(io.RecordHeard(record, gossiped=True), self.now):
            match effect:
                case io.Changed(subject, before, state, _):
                    self._count(subject, before, state)
                case io.Dial(target, _):
                    peer.membership.handle(io.DialFailed(target), self.now)

    def leave(self, peer: PeerId) -> None:
        """A peer says goodbye and ends."""
        self.peers[peer].tell(io.Leave())
        self.clock.after(FAREWELL, self._end_run, peer, self.peers[peer].run)

    def _end_run(self, peer: PeerId, run: int) -> None:
        if self.peers[peer].running and self.peers[peer].run == run:
            self.kill(peer)

    # ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────

    def kill(self, peer: PeerId) -> None:
        """The process ends at once; its operating system closes its connections and refuses new ones."""
        self._stop(self.peers[peer])
        self.connections.process_gone(peer)

    def vanish(self, peer: PeerId) -> None:
        """The machine loses its power or its cable: nothing comes from it any more, not even a refusal."""
        self.peers[peer].reachable = False
        self._stop(self.peers[peer])
        self.connections.stalled(peer)

    def restart(self, peer: PeerId, *, clock_error: float = 0.0) -> None:
        """A stopped peer starts again, its clock wrong by so many seconds, with whom it knew before as contacts."""
        stopped = self.peers[peer]
        if stopped.running:
            raise ValueError(f"{peer} is running")
        self.connections.process_gone(peer)
        known = self._last_known.get(peer, ())
        stopped.contacts = tuple(self.rng.sample(known, min(8, len(known))))
        self._running += 1
        stopped.start(clock_error)

    def pause(self, peer: PeerId, seconds: float) -> None:
        """Stop the process as SIGSTOP does, and let it go on so many seconds later."""
        self.peers[peer].paused_until = self.now + seconds

    def slow(self, peer: PeerId, seconds: float) -> None:
        """From now on, everything that comes to this peer waits so long before it looks at it."""
        self.peers[peer].slowness = seconds

    def corrupt(self, peer: PeerId, lies: Lie = Lie.ALL, *, every: float = 1.0) -> None:
        """From now on, this peer lies in these ways, about somebody every so many seconds."""
        self.peers[peer].lies = lies
        self.peers[peer].lie(every)

    def part(self, *groups: Collection[PeerId]) -> None:
        """Let nothing pass between these groups. Whoever is in none of them is in a group with the others like it."""
        self.wires.part(*groups)
        for peer in sorted(self.peers):
            others = {other for other in self.peers if peer < other and self.wires.parted(peer, other)}
            self.connections.stalled(peer, others)

    def heal(self) -> None:
        """Let everything pass again."""
        self.wires.heal()

    def _stop(self, peer: SimulatedPeer) -> None:
        if not peer.running:
            raise ValueError(f"{peer.peer} is not running")
        known = sorted(peer.membership.digest().ages)
        for subject in known:
            self._opinions[subject][peer.membership.state_of(subject)] -= 1
        self._last_known[peer.peer] = tuple(p for p in known if peer.membership.believes(p))
        self._running -= 1
        peer.stop()

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def traffic(self) -> dict[str, Traffic]:
        """What was sent so far, by kind: gossip, digest, probe, hello."""
        return dict(self.wires.traffic)

    @property
    def false_deaths(self) -> list[Death]:
        """Peers that were taken for dead and were not."""
        return [death for death in self.deaths if not death.true]

    def opinions(self, subject: PeerId) -> dict[PeerState, int]:
        """How many running peers believe what of `subject`; those who do not know it are not counted."""
        return {state: n for state, n in self._opinions[subject].items() if n and state is not None}

    def known(self, subject: PeerId) -> bool:
        """Whether all other running peers take `subject` to be alive."""
        others = self._running - self.peers[subject].running
        return self._opinions[subject][PeerState.ALIVE] == others

    def gone(self, subject: PeerId) -> bool:
        """Whether no running peer believes that `subject` might be there."""
        opinions = self._opinions[subject]
        return opinions[PeerState.ALIVE] == 0 and opinions[PeerState.SUSPECT] == 0

    def agreed(self) -> bool:
        """Whether everybody is right about everybody: who runs is known to all, who does not is gone."""
        return all(self.known(p.peer) if p.running else self.gone(p.peer) for p in self.peers.values())

    # ── what the peers of a simulation use ───────────────────────────────────────────────────────────────────────

    def changed(
        self,
        observer: SimulatedPeer,
        subject: PeerId,
        before: PeerState | None,
        state: PeerState | None,
        reason: str,
    ) -> None:
        """An observer changed its mind."""
        self._count(subject, before, state)
        if state is PeerState.SUSPECT:
            self.suspicions += 1
        if state is PeerState.DEAD:
            other = self.peers.get(subject)
            parted = self.wires.parted(observer.peer, subject, within=AFTERMATH)
            true = other is None or not other.running or parted
            self.deaths.append(Death(self.now, observer.peer, subject, true))

    def _count(self, subject: PeerId, before: PeerState | None, state: PeerState | None) -> None:
        opinions = self._opinions[subject]
        if before is not None:
            opinions[before] -= 1
        opinions[state] += 1

    def dial(self, dialler: SimulatedPeer, target: PeerId) -> None:
        """Do what `Dial` asks."""
        self.connections.dial(dialler, target)

    def disconnect(self, peer: SimulatedPeer, other: PeerId) -> None:
        """Do what `Drop` and `Release` ask."""
        self.connections.close(peer.peer, other)

    def sync(self, peer: SimulatedPeer, other: PeerId) -> None:
        """Compare what is known. Who lies in digests shows them at once."""
        if Lie.DIGEST in peer.lies:
            self.connections.exchange(peer, self.peers[other], hello=False)
        else:
            self.connections.compare(peer, self.peers[other])

    def probe(self, asker: SimulatedPeer, peer: PeerId, target: PeerId | None) -> None:
        """Do what `Ping` and `PingThrough` ask."""
        self.connections.probe(asker, peer, target)

    def seal_for(self, seed: bytes) -> Seal:
        """What signs a peer's announcements."""

        def seal(said: Announcement) -> Record:
            return wire.seal(said, seed)

        return seal

    def authentic(
        self, record: Record, *, mesh_id: MeshId, now_unix: float, revoked: Revoked | None = None
    ) -> bool:
        """As `announcement.authentic`, once for each record: credentials of simulations have no end."""
        known = self._verdicts.get(id(record))
        if known is None or known[0] is not record:
            verdict = announcement.authentic(record, mesh_id=mesh_id, now_unix=now_unix, revoked=revoked)
            known = self._verdicts[id(record)] = (record, verdict)
        return known[1]

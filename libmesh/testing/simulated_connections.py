"""Connections of the simulator: dials, hellos, digest exchanges and probes, with the steps and sizes of the real ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from libmesh import wire
from libmesh.core import membership_io as io
from libmesh.core.announcement import Record
from libmesh.core.summary import BUCKETS, CUT, Digest, Part, Summary
from libmesh.peers import PeerId

if TYPE_CHECKING:
    from libmesh.testing.simulated_peer import SimulatedPeer
    from libmesh.testing.simulator import Simulator

SYN_PAUSES = (1.0, 2.0, 4.0)
"""Seconds between Linux's attempts to connect to a machine that does not answer, as many as `DIAL_LIMIT` leaves room for."""

DIAL_LIMIT = 10.0
"""Seconds that a dial may take; as in `net/tcp`."""

HANDSHAKE_TRIPS = 8
"""Ways there and back, four each, before digests are exchanged: TCP, Noise and muxer, the hello's stream, the hello."""

HANDSHAKE_SIZE = 2400
PROBE_SIZE = 260
"""Bytes of one way of a probe: stream, protocol names, frames, 16 + 2 bytes for each of Noise, TCP and IP headers."""

SUMMARY_SIZE = PROBE_SIZE + 20

KEEPALIVE = (5.0, 15.0)
"""Seconds until a silent connection ends: a ping every 10, and 5 for its answer; as in `yamux_frames`."""

HELD_BACK = 0.4
"""Seconds until TCP sends again what a partition held back; doubling."""


class Connections:
    """All connections of a simulated mesh."""

    def __init__(self, world: Simulator) -> None:
        self._world = world
        self._open: defaultdict[PeerId, set[PeerId]] = defaultdict(set)
        self._entry_size = 0.0

    # ── beginnings and ends ──────────────────────────────────────────────────────────────────────────────────────

    def dial(self, dialler: SimulatedPeer, target: PeerId) -> None:
        """Try to connect, as `Dial` asks."""
        if target in self._world.peers:
            self._attempt(dialler, dialler.run, target, self._world.now, 0)

    def _attempt(self, dialler: SimulatedPeer, run: int, target: PeerId, began: float, tries: int) -> None:
        world, other = self._world, self._world.peers[target]
        if not dialler.awake(run, self._attempt, dialler, run, target, began, tries):
            return
        if target in self._open[dialler.peer]:
            return
        if not other.reachable or world.wires.parted(dialler.peer, target):
            if tries < len(SYN_PAUSES):
                world.clock.after(SYN_PAUSES[tries], self._attempt, dialler, run, target, began, tries + 1)
            else:
                world.clock.at(began + DIAL_LIMIT, self._dial_failed, dialler, run, target)
        elif not other.running:
            world.clock.after(2 * world.wires.delay(), self._dial_failed, dialler, run, target)
        else:
            world.wires.count("hello", HANDSHAKE_SIZE)
            taken = sum(world.wires.delay() for _ in range(HANDSHAKE_TRIPS))
            world.clock.after(taken, self._greet, dialler, run, other, other.run, began)

    def _greet(
        self, dialler: SimulatedPeer, run: int, other: SimulatedPeer, their_run: int, began: float
    ) -> None:
        world = self._world
        if not dialler.awake(run, self._greet, dialler, run, other, their_run, began):
            return
        if other.peer in self._open[dialler.peer]:
            return
        if other.run != their_run or not other.running or world.wires.parted(dialler.peer, other.peer):
            self._dial_failed(dialler, run, other.peer)
        elif other.paused_until > began + DIAL_LIMIT:
            world.clock.at(began + DIAL_LIMIT, self._dial_failed, dialler, run, other.peer)
        elif other.paused_until > world.now:
            world.clock.at(other.paused_until, self._greet, dialler, run, other, their_run, began)
        else:
            self._open[dialler.peer].add(other.peer)
            self._open[other.peer].add(dialler.peer)
            self.exchange(dialler, other, hello=True)

    def _dial_failed(self, dialler: SimulatedPeer, run: int, target: PeerId) -> None:
        if dialler.awake(run, self._dial_failed, dialler, run, target) and target not in dialler.connections:
            dialler.tell(io.DialFailed(target))

    def connect_at_once(self, one: SimulatedPeer, other: SimulatedPeer) -> None:
        """Be connected, without any of the steps and costs."""
        self._open[one.peer].add(other.peer)
        self._open[other.peer].add(one.peer)
        self._admit(one, other)
        self._admit(other, one)

    def close(self, one: PeerId, other: PeerId) -> None:
        """End a connection from both sides."""
        if other in self._open[one]:
            self._open[one].discard(other)
            self._open[other].discard(one)
            self._world.wires.forget(one, other)
            self._world.clock.after(
                0.0, self._ended, self._world.peers[one], self._world.peers[one].run, other
            )
            self._ended_after(self._world.wires.delay(), other, one)

    def process_gone(self, peer: PeerId) -> None:
        """A process ended; its operating system closes what it had."""
        for other in sorted(self._open.pop(peer, ())):
            self._open[other].discard(peer)
            self._world.wires.forget(peer, other)
            self._ended_after(self._world.wires.delay(), other, peer)

    def stalled(self, peer: PeerId, others: set[PeerId] | None = None) -> None:
        """Nothing comes through between a peer and these others (all): what is connected ends when pings tell."""
        for other in sorted(self._open[peer] if others is None else self._open[peer] & others):
            after = self._world.rng.uniform(*KEEPALIVE)
            self._world.clock.after(after, self._give_up, peer, self._world.peers[peer].run, other)

    def _give_up(self, peer: PeerId, run: int, other: PeerId) -> None:
        one = self._world.peers[peer]
        cut = not one.running or one.run != run or self._world.wires.parted(peer, other)
        if cut and other in self._open[peer]:
            self.close(peer, other)

    def _ended_after(self, seconds: float, peer: PeerId, other: PeerId) -> None:
        end = self._world.peers[peer]
        self._world.clock.after(seconds, self._ended, end, end.run, other)

    def _ended(self, peer: SimulatedPeer, run: int, other: PeerId) -> None:
        if not peer.awake(run, self._ended, peer, run, other) or other in self._open[peer.peer]:
            return
        if other not in peer.connections:
            peer.tell(io.DialFailed(other))
            return
        peer.connections.discard(other)
        self._world.gossip.disconnected(peer, other)
        peer.tell(io.Disconnected(other))

    # ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _send(
        self,
        sender: SimulatedPeer,
        receiver: SimulatedPeer,
        kind: str,
        size: int,
        act: Callable[..., None],
        *args: Any,
        wait: float = HELD_BACK,
    ) -> None:
        world = self._world
        if receiver.peer not in self._open[sender.peer]:
            return
        if world.wires.parted(sender.peer, receiver.peer):
            world.clock.after(
                wait, lambda: self._send(sender, receiver, kind, size, act, *args, wait=2 * wait)
            )
            return
        arrives = world.wires.arrival(sender.peer, receiver.peer, kind, size)
        if arrives is None and kind != "probe":
            arrives = world.now + world.wires.delay()
        if arrives is not None:
            late = arrives + receiver.slowness
            world.clock.at(late, self._arrive, receiver, receiver.run, sender.peer, act, args)

    def _arrive(
        self,
        receiver: SimulatedPeer,
        run: int,
        sender: PeerId,
        act: Callable[..., None],
        args: tuple[Any, ...],
    ) -> None:
        if receiver.awake(run, self._arrive, receiver, run, sender, act, args) and (
            sender in self._open[receiver.peer]
        ):
            act(*args)

    # ── hello and anti-entropy: the steps of `hello.exchange` ────────────────────────────────────────────────────

    def compare(self, opener: SimulatedPeer, other: SimulatedPeer) -> None:
        """Exchange fingerprints, then digests of what differs."""
        mine = opener.membership.summary()
        self._send(opener, other, "digest", SUMMARY_SIZE, self._summary_came, other, opener, mine)

    def _summary_came(self, peer: SimulatedPeer, opener: SimulatedPeer, theirs: Summary) -> None:
        mine = peer.membership.summary()
        same = mine.fingerprint == theirs.fingerprint
        size = SUMMARY_SIZE + (0 if same else (BUCKETS + 1) * CUT)
        self._send(peer, opener, "digest", size, self._compared, opener, peer, mine)

    def _compared(self, opener: SimulatedPeer, peer: SimulatedPeer, theirs: Summary) -> None:
        part = opener.membership.summary().difference(theirs)
        opener.compared(differed=bool(part.buckets))
        if part.buckets:
            self.exchange(opener, peer, hello=False, part=part)

    def exchange(
        self, opener: SimulatedPeer, other: SimulatedPeer, *, hello: bool, part: Part | None = None
    ) -> None:
        """Exchange digests, then what each lacks; with `hello`, admit each other."""
        digest = opener.digest(part)
        self._send(
            opener, other, "digest", self._size(digest), self._digest_came, other, opener, digest, hello
        )

    def _digest_came(self, peer: SimulatedPeer, opener: SimulatedPeer, digest: Digest, hello: bool) -> None:
        peer.tell(io.DigestHeard(digest))
        mine, lacking = peer.digest(digest.part), peer.membership.newer_than(digest)
        size = self._size(mine) + _records_size(lacking)
        self._send(peer, opener, "digest", size, self._reply_came, opener, peer, mine, lacking, hello)

    def _reply_came(
        self, opener: SimulatedPeer, peer: SimulatedPeer, digest: Digest, records: list[Record], hello: bool
    ) -> None:
        opener.tell(io.DigestHeard(digest))
        lacking = opener.membership.newer_than(digest)
        if hello:
            self._admit(opener, peer)
        _hear(opener, records)
        self._send(
            opener, peer, "digest", _records_size(lacking), self._records_came, peer, opener, lacking, hello
        )

    def _records_came(
        self, peer: SimulatedPeer, opener: SimulatedPeer, records: list[Record], hello: bool
    ) -> None:
        if hello:
            self._admit(peer, opener)
        _hear(peer, records)

    def _admit(self, peer: SimulatedPeer, other: SimulatedPeer) -> None:
        peer.connections.add(other.peer)
        if peer.peer in other.connections:
            self._world.gossip.connected(peer, other)
        peer.tell(io.Connected(other.peer))

    def _size(self, digest: Digest) -> int:
        if not self._entry_size:
            sample = dict(list(digest.ages.items())[:8])
            self._entry_size = len(wire.encode_digest(Digest(sample))) / max(1, len(sample))
        return int(len(digest.ages) * self._entry_size) + PROBE_SIZE

    # ── probes: the steps of `probing` ───────────────────────────────────────────────────────────────────────────

    def probe(self, asker: SimulatedPeer, peer: PeerId, target: PeerId | None) -> None:
        """Ask `peer` whether it, or `target`, is there."""
        if peer in asker.connections:
            other, now = self._world.peers[peer], self._world.now
            self._send(asker, other, "probe", PROBE_SIZE, self._asked, other, asker, target, now)

    def _asked(self, peer: SimulatedPeer, asker: SimulatedPeer, target: PeerId | None, began: float) -> None:
        if target is None:
            self._send(peer, asker, "probe", PROBE_SIZE, asker.answered, peer.peer, began)
        elif target in peer.connections:
            other, now = self._world.peers[target], self._world.now
            self._send(peer, other, "probe", PROBE_SIZE, self._asked_for, other, peer, asker, began, now)
        else:
            self._world.wires.count("probe", PROBE_SIZE)

    def _asked_for(
        self, target: SimulatedPeer, helper: SimulatedPeer, asker: SimulatedPeer, began: float, asked: float
    ) -> None:
        self._send(target, helper, "probe", PROBE_SIZE, self._pass_on, target, helper, asker, began, asked)

    def _pass_on(
        self, target: SimulatedPeer, helper: SimulatedPeer, asker: SimulatedPeer, began: float, asked: float
    ) -> None:
        if self._world.now - asked <= self._world.liveness.timeout:
            self._send(helper, asker, "probe", PROBE_SIZE, asker.answered, target.peer, began)
        else:
            self._world.wires.count("probe", PROBE_SIZE)


def _records_size(records: list[Record]) -> int:
    return sum(len(record.body) + 72 for record in records) + 8


def _hear(peer: SimulatedPeer, records: list[Record]) -> None:
    for record in records:
        peer.tell(io.RecordHeard(record, gossiped=False))

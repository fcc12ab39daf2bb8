"""Gossipsub as far as it matters here: messages flood over some of the connections, and each peer hears each once.

Modelled: eager push over `degree` links or more, grafted as connections come and repaired at the next heartbeat.
Left out, so that the real one loses less: IHAVE and IWANT, which fetch within seconds what eager push missed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from libmesh import wire
from libmesh.core.announcement import Record
from libmesh.core.credentials import Revocation
from libmesh.core.membership_io import Suspicion
from libmesh.core.timers import INFINITY
from libmesh.peers import PeerId

if TYPE_CHECKING:
    from libmesh.testing.simulated_peer import SimulatedPeer
    from libmesh.testing.simulator import Simulator

ENVELOPE = 260
"""Bytes around a gossip message: author, number, topic, author's key and signature (strict signing), and framing."""

DEGREE_LOW = 6
HEARTBEAT = 1.0


@dataclass(slots=True)
class _Message:
    said: Record | Suspicion
    size: int
    best: dict[PeerId, float]
    """When the quickest copy on its way arrives. Later ones are paid for, but need not be acted out."""
    heard: set[PeerId] = field(default_factory=set)


class Gossip:
    """Who floods what to whom.

    Args:
        world: whose peers.
        degree: links that a peer tries to have.
    """

    def __init__(self, world: Simulator, degree: int) -> None:
        self._world, self._degree = world, degree

    def publish(self, peer: SimulatedPeer, said: Record | Revocation | Suspicion) -> None:
        """`peer` tells everybody."""
        if isinstance(said, Revocation):
            raise ValueError("revocations are not simulated")
        message = _Message(said, len(wire.encode_gossip(said)) + ENVELOPE, {peer.peer: self._world.now})
        message.heard.add(peer.peer)
        self._forward(peer, message, None)

    def connected(self, one: SimulatedPeer, other: SimulatedPeer) -> None:
        """There is a connection between two peers; either may want gossip on it."""
        if len(one.links) < self._degree or len(other.links) < self._degree:
            one.links[other.peer] = other.links[one.peer] = None

    def disconnected(self, peer: SimulatedPeer, gone: PeerId) -> None:
        """A connection of `peer` ended."""
        if gone in peer.links:
            del peer.links[gone]
            if len(peer.links) < DEGREE_LOW:
                self._world.clock.after(HEARTBEAT * peer.rng.random(), self._repair, peer, peer.run)

    def _repair(self, peer: SimulatedPeer, run: int) -> None:
        if not peer.awake(run, self._repair, peer, run) or len(peer.links) >= DEGREE_LOW:
            return
        spare = sorted(p for p in peer.connections if p not in peer.links)
        for chosen in peer.rng.sample(spare, min(len(spare), self._degree - len(peer.links))):
            other = self._world.peers[chosen]
            if other.running and peer.peer in other.connections:
                peer.links[chosen] = other.links[peer.peer] = None

    def _forward(self, peer: SimulatedPeer, message: _Message, source: PeerId | None) -> None:
        world, best = self._world, message.best
        for link in peer.links:
            if link == source or world.wires.parted(peer.peer, link):
                continue
            arrives = world.wires.arrival(peer.peer, link, "gossip", message.size)
            if arrives is not None and arrives < best.get(link, INFINITY):
                best[link] = arrives
                other = world.peers[link]
                world.clock.at(arrives + other.slowness, self._arrive, other, other.run, message, peer.peer)

    def _arrive(self, peer: SimulatedPeer, run: int, message: _Message, source: PeerId) -> None:
        if not peer.awake(run, self._arrive, peer, run, message, source) or peer.peer in message.heard:
            return
        message.heard.add(peer.peer)
        self._forward(peer, message, source)
        peer.hear(message.said)

"""The nouns that every room shares: peers, scopes, services, paths and views of the mesh.

Plain frozen values. Nothing here does I/O, reads a clock or knows a wire format.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NewType

PeerId = NewType("PeerId", str)
"""A libp2p peer id in its base58 text form (libp2p specs, `peer-ids`). Only Ed25519 keys are used, so the
public key can be read back from the id itself."""

MeshId = NewType("MeshId", str)
"""32 lower-case hex digits: the first 16 bytes of SHA-256 over the mesh's Ed25519 public key."""


class Scope(IntEnum):
    """What a member may do. Each scope includes the ones below it.

    The order is the authority: a link in a chain can never give more than its parent has.
    """

    CLIENT = 1  # use the services that others offer
    WORKER = 2  # also be lent work: run another member's computation, reach worker services
    INVITE = 3  # also let others in, with this scope or a lower one


class PathKind(Enum):
    """How bytes reach a peer."""

    DIRECT = "direct"
    PUNCHED = "punched"
    RELAYED = "relayed"


class PeerState(Enum):
    """What is believed of a peer. `LEFT` said goodbye, `DEAD` fell silent."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A way to a peer that was tried and failed.

    Attributes:
        way: the multiaddr that was dialled, or `punch` for a hole punch.
        reason: what went wrong, in a few words.
    """

    way: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """The way in use to a peer.

    Attributes:
        kind: direct, punched or relayed.
        address: the remote multiaddr as text, without the peer id; of a circuit up to and including `/p2p-circuit`.
            Empty if unknown.
        rtt: smoothed round-trip time in seconds; `None` until measured.
        since_unix: when this way came into use, in seconds since the epoch by this node's clock; 0 if unknown.
        attempts: why each better way that was tried last failed, best first; empty for the best kind.
    """

    kind: PathKind
    address: str
    rtt: float | None = None
    since_unix: float = 0.0
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayView:
    """What a node knows of one relay that it may be reached through.

    Attributes:
        address: the relay's multiaddr: the one in use, else the first that is known.
        held: there is a place at it now.
        rtt: smoothed round-trip time in seconds; `None` until measured, and while not connected.
        failure: why there is no place, in words; empty if there is one, or if none was asked for.
    """

    relay: PeerId
    address: str
    held: bool
    rtt: float | None = None
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaching:
    """What a node knows of how others reach it, at one instant.

    Attributes:
        standing: whether others reach it from afar without help: `public`, `private` or `unknown`.
        nat: what its router does with ports: `none`, `keeps ports`, `changes ports` or `unknown`.
        observed: IPs that others saw it come from, the most often named first.
        addresses: multiaddr, where it comes from (`announced`, `own`, `mapped` or `seen`) and whether it can be reached
            (`None`: not known).
        mapping: the protocol that a router forwards our port by; empty if none does.
        mapping_failure: why none does, in words.
        relays: those that it may be reached through, best first, 16 at most; it holds places at two of them.
    """

    standing: str = "unknown"
    nat: str = "unknown"
    observed: tuple[str, ...] = ()
    addresses: tuple[tuple[str, str, bool | None], ...] = ()
    mapping: str = ""
    mapping_failure: str = ""
    relays: tuple[RelayView, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A name that a peer offers streams to, and the scope a member needs to open one.

    `name` is 1 to 255 bytes of UTF-8, without control characters.
    """

    name: str
    scope: Scope = Scope.CLIENT


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerView:
    """What this node knows of one other peer.

    Attributes:
        scope: what the peer's credential allows it.
        services: sorted by name.
        attributes: the application's own bytes, exactly as the peer announced them.
        addresses: multiaddrs as text that the peer says it can be reached at, without `/p2p/…`.
        path: `None` while there is no connection.
        since_unix: when `state` last changed, in seconds since the epoch, by this node's clock.
        incarnation: grows with each restart of the peer.
    """

    peer: PeerId
    scope: Scope
    state: PeerState
    services: tuple[Service, ...]
    attributes: bytes
    addresses: tuple[str, ...]
    path: Path | None
    since_unix: float
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """An immutable picture of the mesh.

    `peers` is sorted by peer id and never contains this node. `followers` are those connected to this node that announce
    nothing and only use the mesh, sorted too; those of other nodes are known to these alone.
    """

    mesh_id: MeshId
    me: PeerId
    scope: Scope
    peers: tuple[PeerView, ...]
    followers: tuple[PeerView, ...] = ()

    def get(self, peer: PeerId) -> PeerView | None:
        """The entry of `peer`, or `None`."""
        return next((entry for entry in self.peers if entry.peer == peer), None)

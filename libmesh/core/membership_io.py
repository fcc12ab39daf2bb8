"""What the membership machine is given: its times; what it is told, and what it asks for: its events and effects."""

from __future__ import annotations

from dataclasses import dataclass

from libmesh.core.announcement import Record
from libmesh.core.credentials import Credential, Revocation
from libmesh.core.ranges import check_counts, check_numbers
from libmesh.core.summary import Digest
from libmesh.peers import PeerId, PeerState, Service


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipConfig:
    """The machine's times, in seconds, and sizes; each greater than 0. The defaults are those of `lan`.

    Attributes:
        refresh: how often an unchanged announcement is repeated. Probes tell who is there and digests what was missed,
            so this is only a last resort; each costs every peer a message, and gossipsub's cost 4 ms of CPU. In a mesh
            of n times `full_mesh` it is n times as seldom, so that what a peer hears does not grow with the mesh.
        suspicion: how long a suspect without a connection has to come back: a process killed, or one that lost its
            network for a moment. Longer forgives longer moments; it is most of what the news of a death takes.
        stall: the same for a suspect that answers no probe on a connection which is still open: a process stopped, a
            machine gone, or TCP waiting ever longer to send again what was lost. Longer forgives longer stalls; with
            a probe's turn and two timeouts it is what the news takes of a machine that lost its power. It counts from
            when we first wondered, but goes on for a quarter of itself after our own attempts have failed.
        alone: the same in a mesh of two, where nobody can be asked. Losses in a row on one connection stop it for 6 s and
            more, and happen; but other connections are made beside a silent one (`liveness.Reach`), and one that comes
            about is an answer. It should leave time for several, each of which may lose a packet and take a second longer.
        tombstone: how long the dead are remembered, and dialled now and then.
        coalesce: changes of one's own announcement within this time go out as one.
        refute_every: between two refutations of others' suspicions of us. Bounds what a liar can make us say.
        hush: what many learn at once, a suspicion or what a healed partition brings, each tells the others after a part
            of this time that differs from peer to peer, unless somebody was quicker. It should be some times as long as
            gossip takes to get everywhere.
        refute: how long a peer that others suspect has to speak for itself, before those who are not connected to it
            try to reach it. It should be longer than gossip takes there and back; or else one false suspicion makes
            a thousand peers dial one.
        reach: how long such an attempt may take before it counts as silence.
        dial_first: how long the peer with the higher id leaves the first dial to the other.
        dial_min, dial_max: back-off between attempts to reach a peer, doubling. The dead are dialled every `dial_max`
            or so, too, so that a parted mesh heals; not more than eight of them in that time, whoever they are.
        full_mesh: up to how many peers, us included, all are connected to all. Every peer then probes every other
            itself and gossip takes one hop; each connection costs some 200 KiB and a ping every ten seconds.
        connections: how many neighbours a peer has beyond that (`plan`), at least 4. Twelve halves on rings: a peer is
            watched by half of them, and gossip reaches a thousand peers in three hops.
        spare: how long a connection that nobody planned is kept before asking whether it is still of use.
        followed: how many neighbours a peer has that only follows, at least 4.
        seek: how often one of the `lost` is tried; a mesh parted for longer than `tombstone` finds itself in that time,
            divided by the number of peers.
    """

    refresh: float = 300.0
    suspicion: float = 2.5
    stall: float = 2.5
    alone: float = 3.5
    tombstone: float = 600.0
    coalesce: float = 0.1
    refute_every: float = 0.5
    hush: float = 0.3
    refute: float = 0.6
    reach: float = 1.2
    dial_first: float = 0.5
    dial_min: float = 0.5
    dial_max: float = 5.0
    full_mesh: int = 32
    connections: int = 24
    spare: float = 30.0
    followed: int = 4
    seek: float = 30.0

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the field, when a value cannot work."""
        check_numbers(self, *self.__slots__)
        check_counts(self, "full_mesh")
        check_counts(self, "connections", "followed", least=4)

    def respite(self, *, connected: bool, alone: bool) -> float:
        """How long a suspect has, with or without a connection, and with nobody else who could be asked about it."""
        return (self.alone if alone else self.stall) if connected else self.suspicion

    @classmethod
    def lan(cls) -> MembershipConfig:
        """For round trips of some milliseconds: a peer that was killed, or whose machine vanished, is known within 5 s."""
        return cls()

    @classmethod
    def wan(cls) -> MembershipConfig:
        """For round trips of up to 300 ms and gossip that takes a second to get everywhere: within 15 s.

        A lost packet's second and third retransmission come after 0.6 s and 1.4 s; suspicion must outlast them both
        ways.
        """
        return cls(
            suspicion=4.0,
            stall=4.5,
            alone=11.0,
            hush=1.0,
            refute=1.5,
            reach=2.5,
            dial_first=1.0,
            coalesce=0.3,
        )


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Somebody hears nothing of `peer`, whose newest announcement they hold is `(incarnation, sequence)`."""

    peer: PeerId
    incarnation: int
    sequence: int


@dataclass(frozen=True, slots=True)
class RecordHeard:
    """A record came in. `gossiped`: by a topic that everybody else hears, too."""

    record: Record
    gossiped: bool


@dataclass(frozen=True, slots=True)
class RevocationHeard:
    """A revocation came in, or was made here. `gossiped` as for records."""

    revocation: Revocation
    gossiped: bool


@dataclass(frozen=True, slots=True)
class SuspicionHeard:
    """A hint from another peer."""

    suspicion: Suspicion


@dataclass(frozen=True, slots=True)
class DigestHeard:
    """What another peer knows, as it told us on a connection."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class PeerSilent:
    """`peer` answered no probe, neither ours nor others' on our behalf."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerHeard:
    """`peer` answered a probe."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Connected:
    """There is a connection, and both hellos were accepted."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The last connection is gone."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class DialFailed:
    """The outcome of a `Dial` that did not end in `Connected`."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class SelfChanged:
    """What this node says of itself is now this."""

    services: tuple[Service, ...]
    addresses: tuple[str, ...]
    attributes: bytes


@dataclass(frozen=True, slots=True)
class Renewed:
    """This node is a member by `credential` from now on, which is good and its own."""

    credential: Credential


@dataclass(frozen=True, slots=True)
class ContactNamed:
    """Somebody said that `peer` is of this mesh and can be reached at `addresses`: an invite, or what we kept."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TakePart:
    """This node has followed so far, and announces itself from now on."""


@dataclass(frozen=True, slots=True)
class Leave:
    """This node goes. Nothing is announced after that."""


@dataclass(frozen=True, slots=True)
class Slept:
    """This machine slept: `now` is `seconds` later than it would be, and nobody could speak for itself meanwhile."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Wake:
    """`deadline()` has come."""


Event = (
    RecordHeard
    | RevocationHeard
    | SuspicionHeard
    | DigestHeard
    | PeerSilent
    | PeerHeard
    | Connected
    | Disconnected
    | DialFailed
    | SelfChanged
    | Renewed
    | ContactNamed
    | TakePart
    | Leave
    | Slept
    | Wake
)


@dataclass(frozen=True, slots=True)
class Publish:
    """Tell everybody."""

    said: Record | Revocation | Suspicion


@dataclass(frozen=True, slots=True)
class Question:
    """Others doubt that `peer` is there: probe it now."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Revoked:
    """A link was taken back that was not before. Keep it: it holds for ever."""

    revocation: Revocation


@dataclass(frozen=True, slots=True)
class Dial:
    """Try to connect to `peer` at `addresses`, and say hello."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the connection to a peer that is no longer a member."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Release:
    """The machine does not need the connection to `peer`: close it, if no stream on it is in use."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Changed:
    """The view changed. `state` is the peer's new one, `before` the old one, `None` if it was or is unknown."""

    peer: PeerId
    before: PeerState | None
    state: PeerState | None
    reason: str


Effect = Publish | Dial | Drop | Question | Revoked | Release | Changed

"""What the membership machine is told, and what it asks for: its events and effects."""

from __future__ import annotations

from dataclasses import dataclass

from libmesh.core.announcement import Record
from libmesh.core.credentials import Revocation
from libmesh.core.roster import Digest
from libmesh.peers import PeerId, PeerState, Service


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
class Leave:
    """This node goes. Nothing is announced after that."""


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
    | Leave
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
class Changed:
    """The view changed. `state` is the peer's new one, `before` the old one, `None` if it was or is unknown."""

    peer: PeerId
    before: PeerState | None
    state: PeerState | None
    reason: str


Effect = Publish | Dial | Drop | Question | Revoked | Changed

"""What the membership machine is told, and what it asks for: its events and effects."""

from __future__ import annotations

from dataclasses import dataclass

from libmesh.core.announcement import Record
from libmesh.peers import PeerId, PeerState, Service


@dataclass(frozen=True, slots=True)
class RecordHeard:
    """A record came in. `gossiped`: by a topic that everybody else hears, too."""

    record: Record
    gossiped: bool


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


Event = RecordHeard | Connected | Disconnected | DialFailed | SelfChanged | Leave | Wake


@dataclass(frozen=True, slots=True)
class Publish:
    """Tell everybody."""

    record: Record


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


Effect = Publish | Dial | Drop | Changed

"""What the machine of the paths is told, what it asks for, and its times. See `paths`."""

from __future__ import annotations

from dataclasses import dataclass

from libmesh.core.ranges import check_numbers
from libmesh.peers import Attempt, PathKind, PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class PathsConfig:
    """Times of the search for paths, in seconds.

    Attributes:
        stagger: between attempts of one lane. RFC 8305 recommends 0.25 and at least 0.1; addresses of a mesh are mostly
            near, where a connection takes a millisecond.
        head_start: of the direct lane before the relay lane. A direct connection takes some three round trips; at 40 ms
            it is there before a circuit is asked for, and where none is possible the circuit is up within a second.
        near_start: the same where all of the peer's addresses seem to be on a network of ours: either one answers within
            milliseconds or it is another network with the same numbers.
        courtesy: how long the side that dialled leaves the punch to the other one.
        retry_min, retry_max: pause between rounds of a relayed path, doubling, each a quarter more or less by lot, so
            that a relay's peers do not all try at the same time.
        hint_gap: least time between the beginnings of two rounds.
        doubt_gap: between two rounds in search of a path in place of a silent one, which ends or speaks within seconds.
    """

    stagger: float = 0.2
    head_start: float = 0.3
    near_start: float = 0.1
    courtesy: float = 2.0
    retry_min: float = 5.0
    retry_max: float = 300.0
    hint_gap: float = 1.0
    doubt_gap: float = 1.0

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the field, when a value cannot work."""
        check_numbers(self, *self.__slots__)
        if self.retry_min > self.retry_max:
            raise ValueError(f"retry_min is {self.retry_min}, more than retry_max, {self.retry_max}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Somebody waits for a connection to `peer`, which may be reached at `addresses`. Harmless to repeat."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unwanted:
    """Nobody waits for a connection to `peer` any more."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Ended:
    """The attempt at `way` is over: `reason` says why it failed, `None` that it made a connection."""

    peer: PeerId
    way: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class PathIs:
    """The best path to `peer` is of this kind now; `None`: the last connection is gone.

    `inbound`: the peer made the connection.
    """

    peer: PeerId
    kind: PathKind | None
    inbound: bool


@dataclass(frozen=True, slots=True)
class PathDoubted:
    """The best path to `peer`, which may be reached at `addresses`, is silent. `PathIs` tells how that ended."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AddressesAre:
    """`peer` says that it has these addresses."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HereChanged:
    """Our own addresses are these, or the network that we are in has changed."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wake:
    """`deadline()` has come."""


Event = Wanted | Unwanted | Ended | PathIs | PathDoubted | AddressesAre | HereChanged | Wake


@dataclass(frozen=True, slots=True)
class Try:
    """Begin an attempt: dial `way`, or punch a hole. Not while one at this way is under way."""

    peer: PeerId
    way: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Give an attempt up; nothing needs to be reported of it."""

    peer: PeerId
    way: str


@dataclass(frozen=True, slots=True)
class Reached:
    """There is a connection to a peer that was wanted."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Unreachable:
    """All ways to a peer that was wanted have failed, for these reasons."""

    peer: PeerId
    attempts: tuple[Attempt, ...]


Effect = Try | Stop | Reached | Unreachable

"""The peer table's rows, and the pictures that are taken of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from libmesh.core.announcement import Announcement, Record
from libmesh.core.credentials import CLOCK_TOLERANCE
from libmesh.peers import MeshId, Path, PeerId, PeerState, PeerView, View


@dataclass(slots=True)
class Entry:
    """What is known of one other peer. `since`, `next_dial` and `state_ends` are times."""

    record: Record
    state: PeerState
    since: float
    connected: bool
    dialling: bool = False
    failures: int = 0
    next_dial: float = 0.0
    state_ends: float = field(default=float("inf"))

    @property
    def believed(self) -> bool:
        """It may be there."""
        return self.state in (PeerState.ALIVE, PeerState.SUSPECT)

    @property
    def ends(self) -> float:
        """When its membership ends, in seconds since the epoch; infinite if never."""
        end = self.announcement.credential.not_after_unix
        return float("inf") if end is None else end + CLOCK_TOLERANCE

    @property
    def announcement(self) -> Announcement:
        """What it says of itself."""
        return self.record.announcement


@dataclass(frozen=True, slots=True)
class Digest:
    """The age of each record that somebody holds, and whom they take for dead."""

    ages: Mapping[PeerId, tuple[int, int]]
    dead: frozenset[PeerId] = frozenset()


def digest_of(me: Record, peers: Mapping[PeerId, Entry]) -> Digest:
    """What is known of each peer and of `me`."""
    ages = {peer: entry.announcement.age for peer, entry in peers.items()}
    dead = frozenset(peer for peer, entry in peers.items() if entry.state is PeerState.DEAD)
    return Digest(ages | {me.announcement.peer: me.announcement.age}, dead)


def newer_than(me: Record, peers: Mapping[PeerId, Entry], digest: Digest) -> list[Record]:
    """The records that somebody with `digest` lacks. The dead are not told of; goodbyes are."""
    records = [me, *(entry.record for entry in peers.values() if entry.state is not PeerState.DEAD)]
    return [r for r in records if digest.ages.get(r.announcement.peer, (-1, -1)) < r.announcement.age]


def view_of(
    me: Record, peers: Mapping[PeerId, Entry], mesh_id: MeshId, path_of: Callable[[PeerId], Path | None]
) -> View:
    """A picture of the table."""
    return View(
        mesh_id=mesh_id,
        me=me.announcement.peer,
        scope=me.announcement.credential.scope,
        peers=tuple(
            PeerView(
                peer=peer,
                scope=entry.announcement.credential.scope,
                state=entry.state,
                services=entry.announcement.services,
                attributes=entry.announcement.attributes,
                addresses=entry.announcement.addresses,
                path=path_of(peer) if entry.connected else None,
                since_unix=entry.since,
                incarnation=entry.announcement.incarnation,
            )
            for peer, entry in sorted(peers.items())
        ),
    )

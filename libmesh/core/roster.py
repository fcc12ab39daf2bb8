"""The peer table: its rows, who of them is alive, and the pictures that are taken of it, each kept until it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from libmesh.core.announcement import Announcement, Record
from libmesh.core.credentials import Revocation
from libmesh.core.plan import Plan
from libmesh.core.summary import Digest, Prints, Row, Summary, bucket_of, fingerprint_of_revocations
from libmesh.core.timers import INFINITY, Timers
from libmesh.peers import MeshId, Path, PeerId, PeerState, PeerView, View


@dataclass(slots=True)
class Entry:
    """What is known of one other peer. A mesh of a thousand has a million of these among its peers: keep it small.

    Attributes:
        since: when `state` last changed.
        failures: dials that failed in a row.
        next_dial: not before then.
        state_ends: when `state` becomes another by itself.
        tell_at: when we tell others of our suspicion, or pass on a record that did not come by gossip.
        told_at: when somebody told of a suspicion of this very record.
        doubted_at: since when we have wondered whether it is there; infinite if we do not.
        reach_by: when an attempt to reach it counts as failed.
        spare_at: when to ask whether a connection that nobody planned is still needed.
        picture: what `view` shows of it while it is not connected, once it was asked for.
    """

    record: Record
    state: PeerState
    since: float
    connected: bool = False
    dialling: bool = False
    failures: int = 0
    next_dial: float = 0.0
    state_ends: float = INFINITY
    told_at: float = -INFINITY
    tell_at: float = INFINITY
    doubted_at: float = INFINITY
    reach_by: float = INFINITY
    spare_at: float = INFINITY
    picture: PeerView | None = field(default=None, repr=False)

    @property
    def believed(self) -> bool:
        """It may be there."""
        return self.state is PeerState.ALIVE or self.state is PeerState.SUSPECT

    @property
    def ends(self) -> float:
        """When its membership ends, in seconds since the epoch; infinite if never."""
        return self.record.announcement.credential.taken_until_unix

    @property
    def announcement(self) -> Announcement:
        """What it says of itself."""
        return self.record.announcement

    def superseded_by(self, new: Announcement) -> bool:
        """Whether `new` counts: it is newer, and, if the peer is dead or left, of a later life."""
        if self.believed:
            return new.age > self.announcement.age
        return new.incarnation > self.announcement.incarnation

    def forget_doubt(self) -> None:
        """It is there, or it is not: nothing is left to find out."""
        self.told_at, self.tell_at, self.doubted_at, self.reach_by = -INFINITY, INFINITY, INFINITY, INFINITY


Watched = tuple[
    frozenset[PeerId],
    frozenset[PeerId],
    frozenset[PeerId],
    Mapping[PeerId, tuple[PeerId, ...]] | None,
    tuple[PeerId, ...],
]
"""The arguments of `liveness.Watch`."""


class Roster:
    """The rows of all other peers, and the plan of connections among those that are believed in.

    Args:
        me: this peer.
        full_mesh: up to how many peers, us included, all are connected to all.
        connections: how many neighbours the plan has beyond that.
    """

    def __init__(self, me: PeerId, full_mesh: int, connections: int) -> None:
        self.entries: dict[PeerId, Entry] = {}
        self.timers: Timers[PeerId] = Timers()
        self.dead: set[PeerId] = set()
        self._me, self._full_mesh = me, full_mesh
        self._believed: set[PeerId] = set()
        self._connected: set[PeerId] = set()
        self._plan = Plan(me, connections)
        self._digest: Digest | None = None
        self._prints = Prints()
        self._prints.touch(me)
        self._watched: Watched | None = None
        self._order: list[PeerId] | None = None

    # ── changes ──────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, peer: PeerId, entry: Entry) -> list[PeerId]:
        """A new row. Like `set_state`, tells whose connection is wanted now or not wanted any more."""
        self.entries[peer] = entry
        self._order = None
        if peer in self._connected:
            entry.connected = True
        return self.set_state(peer, entry, entry.state, entry.since)

    def remove(self, peer: PeerId) -> None:
        """Forget a row that is not believed in."""
        self._order = self._digest = None
        self._prints.remove(peer)
        self.timers.set(peer, INFINITY)
        self.dead.discard(peer)
        del self.entries[peer]

    def set_record(self, entry: Entry, record: Record) -> None:
        """A newer announcement."""
        entry.record, entry.picture, self._digest = record, None, None
        self._prints.touch(record.announcement.peer)

    def set_connected(self, peer: PeerId, connected: bool) -> Entry | None:
        """A connection came or went; the row of the peer, if there is one."""
        (self._connected.add if connected else self._connected.discard)(peer)
        self._watched = None
        entry = self.entries.get(peer)
        if entry is not None:
            entry.connected, entry.spare_at = connected, INFINITY
        return entry

    def set_state(self, peer: PeerId, entry: Entry, state: PeerState, now: float) -> list[PeerId]:
        """A row's state changed. Those whose connection is wanted now or not wanted any more."""
        entry.state, entry.since, entry.picture, entry.state_ends = state, now, None, INFINITY
        entry.reach_by = INFINITY
        if state is not PeerState.SUSPECT:
            entry.forget_doubt()
        self._digest = self._watched = None
        self._prints.touch(peer)
        (self.dead.add if state is PeerState.DEAD else self.dead.discard)(peer)
        if entry.believed == (peer in self._believed):
            return []
        was_full = self.full
        if entry.believed:
            self._believed.add(peer)
            changed = self._plan.add(peer)
        else:
            self._believed.discard(peer)
            changed = self._plan.remove(peer, self._believed)
        return list(self._believed) if was_full != self.full else changed

    def my_record_changed(self) -> None:
        """Forget what was computed with our former record."""
        self._digest = None
        self._prints.touch(self._me)

    def widen(self, full_mesh: int, connections: int) -> list[PeerId]:
        """Plan anew, with these bounds. All whose connection may be wanted now or not wanted any more."""
        self._full_mesh, self._plan = full_mesh, Plan(self._me, connections)
        for peer in self._believed:
            self._plan.add(peer)
        self._watched = None
        self.my_record_changed()
        return list(self._believed)

    def postpone(self, seconds: float) -> None:
        """Nothing counted for that long: whoever was in doubt has as much time left as before."""
        for entry in self.entries.values():
            if entry.believed:
                entry.state_ends += seconds
                entry.told_at, entry.tell_at = entry.told_at + seconds, entry.tell_at + seconds
                entry.doubted_at, entry.reach_by = entry.doubted_at + seconds, entry.reach_by + seconds

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def full(self) -> bool:
        """Whether everybody is connected to everybody."""
        return len(self._believed) < self._full_mesh

    @property
    def crowd(self) -> float:
        """How many times as many peers there are as a full mesh has; at least 1."""
        return max(1.0, (len(self._believed) + 1) / self._full_mesh)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to ask about a peer but that peer itself."""
        return len(self._believed) <= 1

    def wanted(self, peer: PeerId) -> bool:
        """Whether there should be a connection to a peer that is believed in."""
        return peer in self._plan or (self.full and peer in self._believed)

    def believes(self, peer: PeerId) -> bool:
        """Whether `peer` may be there."""
        return peer in self._believed

    def watches(self, peer: PeerId) -> bool:
        """Whether `peer` is probed."""
        return peer in self._believed and (self.full or peer in self._connected)

    @property
    def watched(self) -> Watched:
        """Whom to probe, the suspects among them, who can be asked, whom about whom (`None`: anybody), and our wards."""
        if self._watched is None:
            self._watched = self._watch()
        return self._watched

    def _watch(self) -> Watched:
        asked = frozenset(self._connected & self._believed)
        if self.full:
            peers, nearby = frozenset(self._believed), None
        else:
            line, reach = self._plan.near, self._plan.reach
            peers = asked
            nearby = {
                peer: tuple(
                    p for p in line[max(0, place - reach) : place + reach + 1] if p in asked and p != peer
                )
                for place, peer in enumerate(line)
                if peer in asked
            }
        doubted = frozenset(p for p in peers if self.entries[p].state is PeerState.SUSPECT)
        return peers, doubted, asked, nearby, self._plan.beside

    def digest(self, me: Record | None) -> Digest:
        """What is known of each peer and of `me`."""
        if self._digest is None:
            ages = {peer: entry.record.announcement.age for peer, entry in self.entries.items()}
            if me is not None:
                ages[me.announcement.peer] = me.announcement.age
            self._digest = Digest(ages, frozenset(self.dead))
        return self._digest

    def summary(self, me: Record | None, revocations: Iterable[Revocation]) -> Summary:
        """The fingerprints of what `digest` tells, and of these revocations."""
        if me is None:
            self._prints.remove(self._me)
        ages, dead = self.digest(me).ages, self.dead

        def row_of(peer: PeerId) -> Row:
            return peer, ages[peer], peer in dead

        return Summary(self._prints.all(row_of), fingerprint_of_revocations(revocations))

    def newer_than(self, me: Record | None, digest: Digest) -> list[Record]:
        """The records that somebody with `digest` lacks. The dead are not told of; goodbyes are."""
        if digest.ages == self.digest(me).ages:
            return []
        records = [entry.record for entry in self.entries.values() if entry.state is not PeerState.DEAD]
        records = records if me is None else [me, *records]
        if (part := digest.part) is not None:
            records = [r for r in records if bucket_of(r.announcement.peer) in part.buckets]
        known = digest.ages
        return [r for r in records if known.get(r.announcement.peer, (-1, -1)) < r.announcement.age]

    def view(self, me: Record, mesh_id: MeshId, path_of: Callable[[PeerId], Path | None]) -> View:
        """A picture of the table. Only the rows of connected peers and of changed ones are drawn anew."""
        if self._order is None:
            self._order = sorted(self.entries)
        return View(
            mesh_id=mesh_id,
            me=me.announcement.peer,
            scope=me.announcement.credential.scope,
            peers=tuple(self._picture(peer, self.entries[peer], path_of) for peer in self._order),
        )

    @staticmethod
    def _picture(peer: PeerId, entry: Entry, path_of: Callable[[PeerId], Path | None]) -> PeerView:
        if entry.picture is not None and not entry.connected:
            return entry.picture
        said = entry.record.announcement
        picture = PeerView(
            peer=peer,
            scope=said.credential.scope,
            state=entry.state,
            services=said.services,
            attributes=said.attributes,
            addresses=said.addresses,
            path=path_of(peer) if entry.connected else None,
            since_unix=entry.since,
            incarnation=said.incarnation,
        )
        entry.picture = None if entry.connected else picture
        return picture

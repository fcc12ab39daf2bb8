"""Who is in the mesh: each peer's newest announcement, and whether it is believed to be alive.

Theory of operation
-------------------
Every peer signs announcements of itself. Of two announcements of one peer the one with the higher
`(incarnation, sequence)` holds, so it does not matter by which way, how often or in which order they come. A peer
raises its sequence with each change and every `refresh` seconds, and its incarnation with each restart.

======== ================== =================================================================================
state    meaning            how it is left
======== ================== =================================================================================
ALIVE    as far as we know  connection lost, or no probe answered → SUSPECT
SUSPECT  may be gone        connected, heard, or a newer announcement → ALIVE; `suspicion` over → DEAD
DEAD     fell silent        a higher incarnation → ALIVE; `tombstone` over → forgotten
LEFT     said goodbye       a higher incarnation → ALIVE; `tombstone` over → forgotten
======== ================== =================================================================================

Only the peer itself can announce, change or end itself: every announcement carries its own signature and its chain
of credentials, both checked here. What others say of a peer changes nothing but when we probe it (`liveness`). Whoever
suspects a peer says so; the peer, if it is there, raises its incarnation, as in SWIM. A peer that was taken for dead
learns it from the digest at its next connection, and raises its incarnation, too.

The machine wants a connection to every peer that it believes in. It asks for one with `Dial` and hears the outcome
as `Connected` or `DialFailed`. Of two peers that learn of each other at once, the one with the lower id dials first.

The driver calls `handle` for everything that happens and again at `deadline()`. `now` is seconds since the epoch,
from a clock that never jumps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from libmesh.core import roster
from libmesh.core.announcement import Announcement, Record, Seal, authentic
from libmesh.core.credentials import Credential, Revocation
from libmesh.core.credentials import Revoked as RevokedLinks
from libmesh.core.membership_io import (
    Changed,
    Connected,
    Dial,
    DialFailed,
    DigestHeard,
    Disconnected,
    Drop,
    Effect,
    Event,
    Leave,
    MembershipConfig,
    PeerHeard,
    PeerSilent,
    Publish,
    Question,
    RecordHeard,
    RevocationHeard,
    Revoked,
    SelfChanged,
    Suspicion,
    SuspicionHeard,
    Wake,
)
from libmesh.core.roster import Digest, Entry
from libmesh.peers import MeshId, Path, PeerId, PeerState, Service, View

MAX_PEERS = 4096
"""Peers remembered, the dead included. Announcements of further ones are ignored until tombstones end."""


class Membership:
    """The peer table of one mesh, as one of its peers sees it.

    Args:
        me: this node's first announcement; its sequence counts up from there.
        mesh_id: the mesh. Announcements whose credentials are for another one are ignored.
        seal: signs our own announcements.
        config: the times.
    """

    def __init__(
        self, me: Announcement, *, mesh_id: MeshId, seal: Seal, config: MembershipConfig | None = None
    ) -> None:
        self.mesh_id = mesh_id
        self.config = config or MembershipConfig()
        self.revoked = RevokedLinks()
        self._seal = seal
        self._me = seal(me)
        self._pending: Announcement | None = None
        self._announced_at = float("-inf")
        self._peers: dict[PeerId, Entry] = {}
        self._connected: set[PeerId] = set()
        self._left = False

    # ── the two calls of every machine ───────────────────────────────────────────────────────────────────────────

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event and say what to do. Never raises because of what a peer sent."""
        match event:
            case RecordHeard(record, gossiped):
                return self._heard(record, gossiped, now)
            case RevocationHeard(revocation, gossiped):
                return self._revoke(revocation, gossiped, now)
            case SuspicionHeard(suspicion):
                return self._doubt(suspicion, now)
            case DigestHeard(digest):
                return self._hear_digest(digest, now)
            case PeerSilent(peer):
                return self._silent(peer, "it answers no probe", now)
            case PeerHeard(peer):
                return self._believe(peer, "it answered a probe", now)
            case Connected(peer):
                return self._connect(peer, now)
            case Disconnected(peer):
                return self._disconnect(peer, now)
            case DialFailed(peer):
                return self._dial_failed(peer, now)
            case SelfChanged(services, addresses, attributes):
                return self._self_changed(services, addresses, attributes, now)
            case Leave():
                return self._leave()
            case Wake():
                return self._wake(now)

    def deadline(self) -> float | None:
        """When `handle(Wake(), …)` is next needed; always later than the `now` of the last one."""
        if self._left:
            return None
        times = [self._announce_due]
        for peer, entry in self._peers.items():
            times.append(entry.state_ends)
            if entry.believed:
                times.append(entry.ends)
            if self._wants_dial(peer, entry):
                times.append(entry.next_dial)
        return min(times)

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def me(self) -> Record:
        """This node's own newest record."""
        return self._me

    @property
    def watched(self) -> tuple[frozenset[PeerId], frozenset[PeerId]]:
        """The peers that should be probed, and those among them that are suspected."""
        believed = frozenset(peer for peer, entry in self._peers.items() if entry.believed)
        return believed, frozenset(p for p in believed if self._peers[p].state is PeerState.SUSPECT)

    def digest(self) -> Digest:
        """What is known of each peer, this node included."""
        return roster.digest_of(self._me, self._peers)

    def newer_than(self, digest: Digest) -> list[Record]:
        """The records that somebody with `digest` lacks. The dead are not told of; goodbyes are."""
        return roster.newer_than(self._me, self._peers, digest)

    def credential_of(self, peer: PeerId) -> Credential | None:
        """What a peer has announced as its proof of membership; `None` if it is not known."""
        entry = self._peers.get(peer)
        return entry.announcement.credential if entry else None

    def addresses_of(self, peer: PeerId) -> tuple[str, ...]:
        """Where a peer says that it can be reached; empty if unknown."""
        entry = self._peers.get(peer)
        return entry.announcement.addresses if entry else ()

    def view(self, path_of: Callable[[PeerId], Path | None]) -> View:
        """A picture of the mesh now. The forgotten are not in it, the dead and the left are."""
        return roster.view_of(self._me, self._peers, self.mesh_id, path_of)

    # ── our own announcement ─────────────────────────────────────────────────────────────────────────────────────

    def _self_changed(
        self, services: Iterable[Service], addresses: tuple[str, ...], attributes: bytes, now: float
    ) -> list[Effect]:
        wanted = replace(
            self._pending or self._me.announcement,
            services=tuple(sorted(services, key=lambda service: service.name)),
            addresses=addresses,
            attributes=attributes,
        )
        if self._left or wanted == (self._pending or self._me.announcement):
            return []
        self._pending = wanted
        return self._announce_if_due(now)

    @property
    def _announce_due(self) -> float:
        return self._announced_at + (self.config.refresh if self._pending is None else self.config.coalesce)

    def _announce_if_due(self, now: float) -> list[Effect]:
        if now < self._announce_due:
            return []
        base = self._pending or self._me.announcement
        self._pending = None
        self._me = self._seal(replace(base, sequence=self._me.announcement.sequence + 1))
        self._announced_at = now
        return [Publish(self._me)]

    def _leave(self) -> list[Effect]:
        if self._left:
            return []
        self._left = True
        mine = self._me.announcement
        self._me = self._seal(
            replace(mine, sequence=mine.sequence + 1, leaving=True, services=(), attributes=b"")
        )
        return [Publish(self._me)]

    # ── what others announce ─────────────────────────────────────────────────────────────────────────────────────

    def _heard(self, record: Record, gossiped: bool, now: float) -> list[Effect]:
        new = record.announcement
        if new.peer == self._me.announcement.peer:
            return self._outlive(new.incarnation, now) if new.age > self._me.announcement.age else []
        entry = self._peers.get(new.peer)
        if entry is not None and not self._supersedes(new, entry):
            return []
        if (entry is None and len(self._peers) >= MAX_PEERS) or not authentic(
            record, mesh_id=self.mesh_id, now_unix=now, revoked=self.revoked
        ):
            return []
        if entry is None:
            before = None
            entry = self._peers[new.peer] = Entry(
                record, PeerState.ALIVE, now, new.peer in self._connected, next_dial=now
            )
            if new.peer < self._me.announcement.peer:
                entry.next_dial = now + self.config.dial_first
        else:
            before = entry.state
            if new.addresses != entry.announcement.addresses:
                entry.next_dial = min(entry.next_dial, now)
            entry.record = record
        effects: list[Effect] = [] if gossiped else [Publish(record)]
        if new.leaving:
            self._set_state(entry, PeerState.LEFT, now)
            return [*effects, Changed(new.peer, before, PeerState.LEFT, "left")]
        if entry.state is not PeerState.ALIVE:
            self._set_state(entry, PeerState.ALIVE, now)
        reason = "joined" if before is None else "announced"
        return [*effects, Changed(new.peer, before, entry.state, reason), *self._dials(now)]

    def _outlive(self, incarnation: int, now: float) -> list[Effect]:
        """Speak with a higher incarnation than `incarnation`: it is what others believe of us, and it is wrong."""
        mine = self._me.announcement
        if self._left or incarnation < mine.incarnation:
            return []
        self._me = self._seal(
            replace(self._pending or mine, incarnation=incarnation + 1, sequence=mine.sequence + 1)
        )
        self._pending = None
        self._announced_at = now
        return [Publish(self._me)]

    def _hear_digest(self, digest: Digest, now: float) -> list[Effect]:
        """Somebody holds us for dead, or remembers an earlier run of ours that got further than this one."""
        mine = self._me.announcement
        age = digest.ages.get(mine.peer)
        if age is None or not (age > mine.age or mine.peer in digest.dead):
            return []
        return self._outlive(age[0], now)

    @staticmethod
    def _supersedes(new: Announcement, entry: Entry) -> bool:
        if entry.believed:
            return new.age > entry.announcement.age
        return new.incarnation > entry.announcement.incarnation

    # ── connections ──────────────────────────────────────────────────────────────────────────────────────────────

    def _connect(self, peer: PeerId, now: float) -> list[Effect]:
        self._connected.add(peer)
        entry = self._peers.get(peer)
        if entry is None:
            return []
        entry.connected, entry.dialling, entry.failures = True, False, 0
        return self._believe(peer, "connected", now) or [Changed(peer, entry.state, entry.state, "connected")]

    def _disconnect(self, peer: PeerId, now: float) -> list[Effect]:
        self._connected.discard(peer)
        entry = self._peers.get(peer)
        if entry is None or not entry.connected:
            return []
        entry.connected, entry.next_dial, entry.failures = False, now, 0
        return [*self._silent(peer, "connection lost", now), *self._dials(now)]

    # ── belief ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _silent(self, peer: PeerId, reason: str, now: float) -> list[Effect]:
        entry = self._peers.get(peer)
        if entry is None or entry.state is not PeerState.ALIVE:
            return []
        self._set_state(entry, PeerState.SUSPECT, now)
        told = entry.announcement
        suspicion = Suspicion(peer, told.incarnation, told.sequence)
        return [Publish(suspicion), Changed(peer, PeerState.ALIVE, PeerState.SUSPECT, reason)]

    def _believe(self, peer: PeerId, reason: str, now: float) -> list[Effect]:
        entry = self._peers.get(peer)
        if entry is None or entry.state is not PeerState.SUSPECT or self._ended(entry, now):
            return []
        before = entry.state
        self._set_state(entry, PeerState.ALIVE, now)
        return [Changed(peer, before, PeerState.ALIVE, reason)]

    def _doubt(self, suspicion: Suspicion, now: float) -> list[Effect]:
        doubted = (suspicion.incarnation, suspicion.sequence)
        mine = self._me.announcement
        if suspicion.peer == mine.peer:
            return self._outlive(suspicion.incarnation, now) if doubted >= mine.age else []
        entry = self._peers.get(suspicion.peer)
        if entry is None or entry.state is not PeerState.ALIVE or doubted < entry.announcement.age:
            return []
        return [Question(suspicion.peer)]

    def _revoke(self, revocation: Revocation, gossiped: bool, now: float) -> list[Effect]:
        if not revocation.is_valid(self.mesh_id) or not self.revoked.add(revocation):
            return []
        effects: list[Effect] = (
            [Revoked(revocation)] if gossiped else [Revoked(revocation), Publish(revocation)]
        )
        for peer, entry in self._peers.items():
            if entry.believed and self.revoked.covers(entry.announcement.credential):
                effects += self._expel(peer, entry, "its membership was revoked", now)
        return effects

    def _expel(self, peer: PeerId, entry: Entry, reason: str, now: float) -> list[Effect]:
        before = entry.state
        self._set_state(entry, PeerState.DEAD, now)
        return [Drop(peer, reason), Changed(peer, before, PeerState.DEAD, reason)]

    def _ended(self, entry: Entry, now: float) -> bool:
        return now >= entry.ends or self.revoked.covers(entry.announcement.credential)

    def _dial_failed(self, peer: PeerId, now: float) -> list[Effect]:
        entry = self._peers.get(peer)
        if entry is None or not entry.dialling:
            return []
        entry.dialling = False
        entry.failures += 1
        delay = self.config.dial_min * 2.0 ** min(entry.failures - 1, 16)
        entry.next_dial = now + min(delay, self.config.dial_max)
        return []

    def _wants_dial(self, peer: PeerId, entry: Entry) -> bool:
        return (
            not self._left
            and not entry.connected
            and not entry.dialling
            and entry.state is not PeerState.LEFT
            and not self.revoked.covers(entry.announcement.credential)
            and bool(entry.announcement.addresses)
        )

    def _dials(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for peer, entry in self._peers.items():
            if self._wants_dial(peer, entry) and entry.next_dial <= now:
                entry.dialling = True
                effects.append(Dial(peer, entry.announcement.addresses))
        return effects

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _wake(self, now: float) -> list[Effect]:
        if self._left:
            return []
        effects: list[Effect] = []
        for peer, entry in list(self._peers.items()):
            effects += self._age(peer, entry, now)
        return [*effects, *self._announce_if_due(now), *self._dials(now)]

    def _age(self, peer: PeerId, entry: Entry, now: float) -> list[Effect]:
        before = entry.state
        if entry.believed and now >= entry.ends:
            return self._expel(peer, entry, "its membership expired", now)
        if now < entry.state_ends:
            return []
        if before is PeerState.SUSPECT:
            self._set_state(entry, PeerState.DEAD, now)
            return [Changed(peer, before, PeerState.DEAD, "no answer")]
        del self._peers[peer]
        return [Changed(peer, before, None, "forgotten")]

    def _set_state(self, entry: Entry, state: PeerState, now: float) -> None:
        entry.state, entry.since = state, now
        lasts = {PeerState.ALIVE: float("inf"), PeerState.SUSPECT: self.config.suspicion}
        entry.state_ends = now + lasts.get(state, self.config.tombstone)

"""Who is in the mesh: each peer's newest announcement, and whether it is believed to be alive.

Theory of operation
-------------------
Every peer signs announcements of itself. Of two announcements of one peer the one with the higher
`(incarnation, sequence)` holds, so it does not matter by which way, how often or in which order they come. A peer
raises its sequence with each change and every `refresh` seconds, and its incarnation with each restart.

======== ================== =================================================================================
state    meaning            how it is left
======== ================== =================================================================================
ALIVE    as far as we know  a planned connection lost, no probe answered, or not reached when in doubt → SUSPECT
SUSPECT  may be gone        connected, heard, or a newer announcement → ALIVE; its time is over → DEAD
DEAD     fell silent        a higher incarnation → ALIVE; `tombstone` over → forgotten, and `lost`
LEFT     said goodbye       a higher incarnation → ALIVE; `tombstone` over → forgotten
======== ================== =================================================================================

Only the peer itself can announce, change or end itself: every announcement carries its own signature and its chain
of credentials, both checked here. What others say of a peer changes nothing but when we look for it ourselves. Whoever
suspects a peer says so; the peer, if it is there, raises its incarnation, as in SWIM. A peer that was taken for dead
learns it from the digest at its next connection, and raises its incarnation, too.

While the mesh is small everybody is connected to everybody, and probes everybody (`liveness`). Beyond `full_mesh` each
peer has a bounded number of neighbours (`plan`), who probe it and see its connections end. The others hear of their
suspicion by gossip, leave the suspect the time to refute it, and then dial it: if that fails, too, they suspect it
themselves. So a death costs every peer one dial, and a false suspicion costs the mesh two messages.

A machine that is *following* has the same table and the same rules, but announces nothing and passes nothing on: nobody's
table has a row of it. Its plan has few neighbours, which tell it what it would otherwise hear by gossip.

The machine asks for connections with `Dial` and hears `Connected` or `DialFailed`. Of two peers that learn of each
other at once, the one with the lower id dials first.

The driver calls `handle` for everything that happens and again at `deadline()`. `now` is seconds since the epoch, from
a clock that jumps at a `Slept` only.
"""

from __future__ import annotations

from collections.abc import Iterable

from libmesh.core import membership_io as io
from libmesh.core.announcement import Announcement, Authentic, Record, Seal, authentic
from libmesh.core.credentials import Revocation
from libmesh.core.dialling import Dialling
from libmesh.core.lost import Lost
from libmesh.core.membership_io import Changed, Effect, MembershipConfig, Publish
from libmesh.core.plan import lot
from libmesh.core.roster import Entry
from libmesh.core.summary import Digest
from libmesh.core.table import Table
from libmesh.core.timers import INFINITY
from libmesh.peers import MeshId, PeerId, PeerState

MAX_PEERS = 4096
"""Peers remembered, the dead included. Announcements of further ones are ignored until tombstones end."""

MAX_HINTS = 16
"""Peers that one digest can make us look for; the rest come with later ones. Bounds what a liar makes us do."""


class Membership(Table):
    """The peer table of one mesh, as one of its peers sees it.

    Args:
        me: this node's first announcement; its sequence counts up from there.
        mesh_id: the mesh. Announcements whose credentials are for another one are ignored.
        seal: signs our own announcements.
        config: the times.
        authentic: checks records. Machines in one process can share one that remembers its verdicts.
        following: announce nothing and pass nothing on, but follow what others tell, until `TakePart`.
    """

    def __init__(
        self,
        me: Announcement,
        *,
        mesh_id: MeshId,
        seal: Seal,
        config: MembershipConfig | None = None,
        authentic: Authentic = authentic,
        following: bool = False,
    ) -> None:
        super().__init__(
            me, mesh_id=mesh_id, seal=seal, config=config or MembershipConfig(), following=following
        )
        self._authentic = authentic
        self._dialling = Dialling(me.peer, self._roster, self.config)
        self._lost = Lost(me.peer, self.config)

    # ── the two calls of every machine ───────────────────────────────────────────────────────────────────────────

    def handle(self, event: io.Event, now: float) -> list[Effect]:
        """Take in one event and say what to do. Never raises because of what a peer sent."""
        self._voice.crowd = self._roster.crowd
        effects = self._take_in(event, now)
        return [effect for effect in effects if not _told(effect)] if self.following else effects

    def _take_in(self, event: io.Event, now: float) -> list[Effect]:
        match event:
            case io.RecordHeard(record, gossiped):
                return self._heard(record, gossiped, now)
            case io.RevocationHeard(revocation, gossiped):
                return self._revoke(revocation, gossiped, now)
            case io.SuspicionHeard(suspicion):
                return self._hear_suspicion(suspicion, now)
            case io.DigestHeard(digest):
                return self._hear_digest(digest, now)
            case io.PeerSilent(peer):
                return self._silent(peer, "it answers no probe", now)
            case io.PeerHeard(peer):
                return self._believe(peer, "it answered a probe", now)
            case io.Connected(peer):
                return self._connect(peer, now)
            case io.Disconnected(peer):
                return self._disconnect(peer, now)
            case io.DialFailed(peer):
                return self._dial_failed(peer, now)
            case io.SelfChanged(services, addresses, attributes):
                self._voice.change(services, addresses, attributes)
                return self._speak(now)
            case io.Renewed(credential):
                self._voice.renew(credential)
                return self._say(now)  # while following to nobody, but `me` tells what we may do
            case io.ContactNamed(peer, addresses):
                if peer not in self._peers:
                    self._lost.add(peer, addresses, None, now)
                return []
            case io.TakePart():
                return self._take_part(now) if self.following else []
            case io.Leave():
                if self._voice.left:
                    return []
                self._dialling.stopped = True
                said = Publish(self._voice.leave())
                self._roster.my_record_changed()
                return [said]
            case io.Slept(seconds):
                self._roster.postpone(seconds)
                return []
            case io.Wake():
                return self._wake(now)

    def deadline(self) -> float | None:
        """When `handle(Wake(), …)` is next needed; always later than the `now` of the last one."""
        if self._voice.left:
            return None
        return min(
            INFINITY if self.following else self._voice.due, self._roster.timers.next(), self._lost.due
        )

    # ── what is announced ────────────────────────────────────────────────────────────────────────────────────────

    def _take_part(self, now: float) -> list[Effect]:
        self.following = False
        self._voice.repeat()
        changed = self._roster.widen(self.config.full_mesh, self.config.connections)
        return [*self._replan(changed, now), *self._speak(now)]

    def _speak(self, now: float) -> list[Effect]:
        return [] if self.following else self._say(now)

    def _say(self, now: float) -> list[Effect]:
        if (said := self._voice.speak(now)) is None:
            return []
        self._roster.my_record_changed()
        return [Publish(said)]

    def _good(self, record: Record, now: float) -> bool:
        return self._authentic(record, mesh_id=self.mesh_id, now_unix=now, revoked=self.revoked)

    def _outbid(self, incarnation: int, now: float) -> list[Effect]:
        self._voice.outbid(incarnation, now)
        return self._speak(now)

    def _heard(self, record: Record, gossiped: bool, now: float) -> list[Effect]:
        new = record.announcement
        if new.peer == self._id:
            outdone = new.age > self.me.announcement.age and self._good(record, now)
            return self._outbid(new.incarnation, now) if outdone else []
        entry = self._peers.get(new.peer)
        if entry is not None and not entry.superseded_by(new):
            if gossiped and new.age == entry.announcement.age and entry.state is not PeerState.SUSPECT:
                entry.tell_at = INFINITY  # somebody else was quicker to pass it on
                return self._settle(new.peer, entry, now)
            return []
        if (entry is None and len(self._peers) >= MAX_PEERS) or not self._good(record, now):
            return []
        before = None if entry is None else entry.state
        state = PeerState.LEFT if new.leaving else PeerState.ALIVE
        if entry is None:
            entry = Entry(record, state, now)
            entry.next_dial = self._dialling.first(new.peer, now)
            self._lost.found(new.peer)
            changed = self._roster.add(new.peer, entry)
        else:
            if not entry.believed or new.addresses != entry.announcement.addresses:
                entry.failures, entry.next_dial = 0, min(entry.next_dial, self._dialling.first(new.peer, now))
            self._roster.set_record(entry, record)
            entry.forget_doubt()
            changed = [] if before is state else self._roster.set_state(new.peer, entry, state, now)
        if state is PeerState.LEFT:
            entry.state_ends = now + self.config.tombstone
        if not gossiped:
            entry.tell_at = now + self.config.hush * lot(self._id, new.peer)
        reason = "left" if new.leaving else "joined" if before is None else "announced"
        effects = [*self._replan(changed, now), *self._settle(new.peer, entry, now)]
        return [Changed(new.peer, before, state, reason), *effects]

    def _revoke(self, revocation: Revocation, gossiped: bool, now: float) -> list[Effect]:
        if not revocation.is_valid(self.mesh_id) or not self.revoked.add(revocation):
            return []
        self._lost.revoke(self.revoked)
        effects: list[Effect] = [io.Revoked(revocation)]
        effects += [] if gossiped else [Publish(revocation)]
        for peer, entry in list(self._peers.items()):
            if not self.revoked.covers(entry.announcement.credential):
                continue
            if entry.believed:
                effects += self._expel(peer, entry, "its membership was revoked", now)
            entry.next_dial = INFINITY
            self._settle(peer, entry, now)
        return effects

    def _expel(self, peer: PeerId, entry: Entry, reason: str, now: float) -> list[Effect]:
        before = entry.state
        effects = self._end(peer, entry, now)
        entry.next_dial = INFINITY
        return [io.Drop(peer, reason), Changed(peer, before, PeerState.DEAD, reason), *effects]

    # ── what is said of others, and of us ────────────────────────────────────────────────────────────────────────

    def _hear_digest(self, digest: Digest, now: float) -> list[Effect]:
        """Outbid what it says of us: we are dead, or a former run got further. Look for those whom it calls dead."""
        mine = self.me.announcement
        age = digest.ages.get(self._id)
        effects: list[Effect] = []
        if age is not None and (age > mine.age or self._id in digest.dead):
            effects += self._outbid(age[0], now)
        hints = [peer for peer in sorted(digest.dead) if self.state_of(peer) is PeerState.ALIVE]
        for peer in hints[:MAX_HINTS]:
            if digest.ages[peer] >= self._peers[peer].announcement.age:
                effects += self._doubt(peer, self._peers[peer], now)
        return effects

    def _hear_suspicion(self, suspicion: io.Suspicion, now: float) -> list[Effect]:
        doubted = (suspicion.incarnation, suspicion.sequence)
        if suspicion.peer == self._id:
            return self._outbid(suspicion.incarnation, now) if doubted >= self.me.announcement.age else []
        entry = self._peers.get(suspicion.peer)
        if entry is None or not entry.believed or doubted < entry.announcement.age:
            return []
        entry.told_at, suspect = now, entry.state is PeerState.SUSPECT
        entry.tell_at = INFINITY if suspect else entry.tell_at
        return self._doubt(suspicion.peer, entry, now)

    def _doubt(self, peer: PeerId, entry: Entry, now: float) -> list[Effect]:
        """Find out whether `peer` is there: by a probe, or, later, by a dial, or by one under way, which may hang."""
        alive = entry.state is PeerState.ALIVE
        if alive and self._roster.watches(peer):
            entry.doubted_at = min(entry.doubted_at, now)
            return [io.Question(peer)]
        if alive and entry.doubted_at == INFINITY:
            entry.doubted_at = now
            entry.next_dial = max(now + self.config.refute, entry.next_dial if entry.failures else 0.0)
            if entry.dialling or not entry.announcement.addresses:
                entry.reach_by = now + self.config.refute + self.config.reach
        return self._settle(peer, entry, now)

    # ── belief ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _silent(self, peer: PeerId, reason: str, now: float) -> list[Effect]:
        entry = self._peers.get(peer)
        if entry is None or entry.state is not PeerState.ALIVE:
            return []
        self._roster.set_state(peer, entry, PeerState.SUSPECT, now)
        lasts = self.config.respite(connected=entry.connected, alone=self._roster.alone)
        entry.state_ends = max(min(entry.doubted_at, now), now - 0.75 * lasts) + lasts
        told = now - entry.told_at <= self.config.suspicion
        entry.tell_at = INFINITY if told else now + self.config.hush * lot(self._id, peer)
        return [Changed(peer, PeerState.ALIVE, PeerState.SUSPECT, reason), *self._settle(peer, entry, now)]

    def _believe(self, peer: PeerId, reason: str, now: float) -> list[Effect]:
        entry = self._peers.get(peer)
        if entry is None or not entry.believed or now >= entry.ends:
            return []
        before = entry.state
        if before is PeerState.ALIVE:
            entry.doubted_at = entry.reach_by = INFINITY
            return self._settle(peer, entry, now)
        self._roster.set_state(peer, entry, PeerState.ALIVE, now)
        return [Changed(peer, before, PeerState.ALIVE, reason), *self._settle(peer, entry, now)]

    def _end(self, peer: PeerId, entry: Entry, now: float) -> list[Effect]:
        """A row becomes DEAD. The effects are those of its place in the plan being taken by another."""
        changed = self._roster.set_state(peer, entry, PeerState.DEAD, now)
        entry.state_ends = now + self.config.tombstone
        entry.failures = 0
        entry.next_dial = now + self._dialling.pause(peer, entry)
        return self._replan(changed, now)

    # ── connections ──────────────────────────────────────────────────────────────────────────────────────────────

    def _connect(self, peer: PeerId, now: float) -> list[Effect]:
        entry = self._roster.set_connected(peer, True)
        if entry is None:
            return []
        self._dialling.ended(entry)
        entry.failures = 0
        believed = self._believe(peer, "connected", now) or self._settle(peer, entry, now)
        return believed or [Changed(peer, entry.state, entry.state, "connected")]

    def _disconnect(self, peer: PeerId, now: float) -> list[Effect]:
        entry = self._roster.set_connected(peer, False)
        if entry is None:
            return []
        if entry.believed:
            entry.next_dial, entry.failures = now, 0
        if entry.state is PeerState.SUSPECT:
            entry.state_ends = min(entry.state_ends, now + self.config.suspicion)
        if entry.state is PeerState.ALIVE and self._roster.wanted(peer):
            return self._silent(peer, "connection lost", now)
        return [Changed(peer, entry.state, entry.state, "disconnected"), *self._settle(peer, entry, now)]

    def _dial_failed(self, peer: PeerId, now: float) -> list[Effect]:
        entry = self._peers.get(peer)
        if entry is None or not entry.dialling:
            return []
        self._dialling.failed(peer, entry, now)
        if entry.reach_by < INFINITY:
            return self._silent(peer, "it cannot be reached", now)
        return self._settle(peer, entry, now)

    def _replan(self, changed: Iterable[PeerId], now: float) -> list[Effect]:
        """The plan changed for these: connect to them, or wonder whether the connection can go."""
        effects: list[Effect] = []
        for peer in changed:
            entry = self._peers.get(peer)
            if entry is None or not entry.believed:
                continue
            if entry.state is PeerState.ALIVE and not entry.failures:
                entry.next_dial = max(entry.next_dial, self._dialling.first(peer, now))
            effects += self._settle(peer, entry, now)
        return effects

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _settle(self, peer: PeerId, entry: Entry, now: float) -> list[Effect]:
        """Dial if that is due now, and set the alarm for whatever comes next of a row."""
        if not entry.connected or self._roster.wanted(peer):
            entry.spare_at = INFINITY
        elif entry.spare_at == INFINITY:
            entry.spare_at = now + self.config.spare
        effects: list[Effect] = [*self._dialling.dial(peer, entry, now)]
        due = min(entry.state_ends, entry.tell_at, entry.reach_by, entry.spare_at)
        if entry.believed:
            due = min(due, entry.ends)
        if self._dialling.wants(peer, entry):
            due = min(due, entry.next_dial)
        self._roster.timers.set(peer, due)
        return effects

    def _wake(self, now: float) -> list[Effect]:
        if self._voice.left:
            return []
        effects: list[Effect] = []
        for peer in self._roster.timers.pop_due(now):
            if (entry := self._peers.get(peer)) is not None:
                effects += self._age(peer, entry, now)
        return [*effects, *self._lost.dial(now), *self._speak(now)]

    def _age(self, peer: PeerId, entry: Entry, now: float) -> list[Effect]:
        before, effects = entry.state, list[Effect]()
        if entry.believed and now >= entry.ends:
            effects += self._expel(peer, entry, "its membership expired", now)
        elif now >= entry.state_ends and before is not PeerState.SUSPECT:
            self._dialling.ended(entry)
            self._roster.remove(peer)
            if before is PeerState.DEAD and entry.next_dial < INFINITY:
                said = entry.announcement
                self._lost.add(peer, said.addresses, said.credential, now)
            return [Changed(peer, before, None, "forgotten")]
        elif now >= entry.state_ends:
            effects = [io.Drop(peer, "no answer")] if entry.connected else []
            effects += [Changed(peer, before, PeerState.DEAD, "no answer"), *self._end(peer, entry, now)]
        elif now >= entry.reach_by:
            effects += self._silent(peer, "it cannot be reached", now)
        if now >= entry.tell_at:
            entry.tell_at = INFINITY
            doubt = io.Suspicion(peer, *entry.announcement.age)
            effects.append(Publish(doubt if entry.state is PeerState.SUSPECT else entry.record))
        if now >= entry.spare_at:
            entry.spare_at = now + self.config.spare
            effects.append(io.Release(peer))
        return [*effects, *self._settle(peer, entry, now)]


def _told(effect: Effect) -> bool:
    """Whether it tells others of peers. Who follows only tells of revocations, which are true whoever says so."""
    return isinstance(effect, Publish) and not isinstance(effect.said, Revocation)

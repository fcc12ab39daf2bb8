"""Peers that believe what they should not, or keep others from knowing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from libmesh import wire
from libmesh.core import announcement, credentials, voice
from libmesh.core import membership_io as io
from libmesh.core.announcement import Announcement
from libmesh.core.membership import Membership
from libmesh.core.roster import Entry
from libmesh.core.summary import Digest, Part
from libmesh.driver import Driver
from tests.conformance import peer
from tests.conformance.mutants.base import Patch, ignore, mutant

# ── what is believed ──────────────────────────────────────────────────────────────────────────────────────────


@mutant("records.forged", "a wrong signature")
def believes_forged_records(patch: Patch) -> None:
    _patch_membership(patch, "_authentic", lambda *_, **__: True)


@mutant("records.whole", "signature is wrong")
def passes_on_records_with_wrong_signatures(patch: Patch) -> None:
    encode = wire.encode_records

    def garble(records: Any, revocations: Any = ()) -> bytes:
        return encode([replace(record, signature=bytes(64)) for record in records], revocations)

    patch.setattr(wire, "encode_records", garble)


@mutant("records.credential", "credential")
def believes_signed_records_of_strangers(patch: Patch) -> None:
    _patch_membership(patch, "_authentic", lambda record, **_: _signed(record))


@mutant("records.credential", "the credential of another peer")
def believes_whoever_shows_a_member_s_credential(patch: Patch) -> None:
    def borrowed(record: Any, **given: Any) -> bool:
        shown = record.announcement.credential
        refusal = credentials.verify(shown, peer_key=shown.links[-1].subject, **given)
        return refusal is None and _signed(record)

    _patch_membership(patch, "_authentic", borrowed)


@mutant("records.credential", "the credential of another mesh")
def believes_members_of_any_mesh(patch: Patch) -> None:
    def foreign(record: Any, **given: Any) -> bool:
        shown = record.announcement.credential
        return announcement.authentic(record, **(given | {"mesh_id": shown.mesh_id}))

    _patch_membership(patch, "_authentic", foreign)


@mutant("records.by_another", "a member that signs for another")
def checks_credentials_but_not_who_signed(patch: Patch) -> None:
    def shown(record: Any, **given: Any) -> bool:
        said = record.announcement
        key = credentials.keys.public_key_of(said.peer)
        return credentials.verify(said.credential, peer_key=key, **given) is None

    _patch_membership(patch, "_authentic", shown)


def _signed(record: Any) -> bool:
    key = credentials.keys.public_key_of(record.announcement.peer)
    return credentials.keys.verify(key, wire.SIGNING_CONTEXT + record.body, record.signature)


def _patch_membership(patch: Patch, name: str, value: Any) -> None:
    """Set an attribute of every machine that is made from now on."""
    make = Membership.__init__

    def make_broken(self: Membership, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        setattr(self, name, value)

    patch.setattr(Membership, "__init__", make_broken)


@mutant("records.older", "it holds")
def takes_whatever_came_last(patch: Patch) -> None:
    patch.setattr(Entry, "superseded_by", lambda *_: True)


@mutant("records.newer", "after (2, 0)")
def compares_sequences_only(patch: Patch) -> None:
    def by_sequence(self: Entry, new: Announcement) -> bool:
        return new.sequence > self.announcement.sequence

    patch.setattr(Entry, "superseded_by", by_sequence)


@mutant("records.unchanged", "other bytes")
def encodes_records_anew(patch: Patch) -> None:
    encode = wire.encode_records

    def anew(records: Any, revocations: Any = ()) -> bytes:
        known = []
        for record in records:
            said = wire.pb.Announcement.FromString(record.body)
            said.DiscardUnknownFields()
            known.append(replace(record, body=said.SerializeToString(deterministic=True)))
        return encode(known, revocations)

    patch.setattr(wire, "encode_records", anew)


@mutant("records.bounds", "it believes")
def takes_any_number_of_services(patch: Patch) -> None:
    patch.setattr(wire, "MAX_SERVICES", 10_000)


@mutant("records.lacking", "those who have it")
def tells_everything_always(patch: Patch) -> None:
    tell = Membership.newer_than
    patch.setattr(Membership, "newer_than", lambda self, _: tell(self, Digest({})))


@mutant("digest.self", "not in its own digest")
def leaves_itself_out_of_its_digest(patch: Patch) -> None:
    digest = Membership.digest

    def of_others(self: Membership, part: Part | None = None) -> Digest:
        whole = digest(self, part)
        return replace(whole, ages={p: age for p, age in whole.ages.items() if p != self._id})

    patch.setattr(Membership, "digest", of_others)


@mutant("digest.dead", "still", slow=True)
def does_not_speak_up_when_called_dead(patch: Patch) -> None:
    ignore(patch, io.DigestHeard)


@mutant("digest.no_verdict", "another's word")
def believes_that_others_are_dead(patch: Patch) -> None:
    handle = Membership.handle

    def gullible(self: Membership, event: io.Event, now: float) -> Any:
        effects = handle(self, event, now)
        if isinstance(event, io.DigestHeard):
            for peer in event.digest.dead & self._peers.keys():
                effects += self._end(peer, self._peers[peer], now)
        return effects

    patch.setattr(Membership, "handle", gullible)


@mutant("records.of_itself", "a record that is bad")
def takes_others_word_for_its_own(patch: Patch) -> None:
    handle = Membership.handle

    def gullible(self: Membership, event: io.Event, now: float) -> Any:
        if isinstance(event, io.RecordHeard) and event.record.announcement.peer == self.me.announcement.peer:
            self._voice.record = event.record
            self._roster.my_record_changed()
            return []
        return handle(self, event, now)

    patch.setattr(Membership, "handle", gullible)


# ── what is said to everybody ─────────────────────────────────────────────────────────────────────────────────


@mutant("gossip.refutes", "it is still", slow=True)
def ignores_suspicion_of_itself(patch: Patch) -> None:
    ignore(patch, io.SuspicionHeard)


@mutant("gossip.no_verdict", "did not probe", slow=True, patience=2.0)
def does_not_probe_suspects(patch: Patch) -> None:
    """And nobody in turn either, which might come just then and be taken for the probe that is missing."""
    ignore(patch, io.SuspicionHeard)
    never = replace(peer.CONFIG.liveness, interval=1e9)
    patch.setattr(peer, "CONFIG", replace(peer.CONFIG, liveness=never))


@mutant("gossip.refutes", "did not say so", slow=True)
def keeps_its_announcements_to_itself(patch: Patch) -> None:
    patch.setattr(Driver, "_publish", lambda self, data: None)


@mutant("gossip.learned", "did not reach it", slow=True)
def does_not_listen_to_gossip(patch: Patch) -> None:
    patch.setattr(Driver, "_hear", lambda self, data, teller: None)


@mutant("gossip.forged", "wrong signature")
def believes_forged_gossip(patch: Patch) -> None:
    _patch_membership(patch, "_authentic", lambda *_, **__: True)


@mutant("survives.suspicion", "few are left", slow=True)
def outbids_any_incarnation(patch: Patch) -> None:
    patch.setattr(voice, "FAR_AHEAD", 2**60)
    patch.setattr(wire, "decode_gossip", _lowered(wire.decode_gossip))


def _lowered(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Leaves room for one more, so that the peer lives on with what it was talked into."""

    def lower(data: bytes) -> Any:
        said = decode(data)
        return (
            replace(said, incarnation=min(said.incarnation, 2**64 - 9))
            if isinstance(said, io.Suspicion)
            else said
        )

    return lower

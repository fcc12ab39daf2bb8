"""Membership: only a peer itself, or its silence, changes what is believed of it; and all come to believe the same."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libmesh import wire
from libmesh.core.announcement import Announcement, Record
from libmesh.core.credentials import CLOCK_TOLERANCE, Authority
from libmesh.core.membership import Membership
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
from libmesh.core.summary import Digest
from libmesh.identity import SecretKey
from libmesh.peers import PeerId, PeerState, Scope, Service

MESH = Authority.of_mesh(bytes(range(32)))
NOW = 1_000_000.0
CONFIG = MembershipConfig(suspicion=2, stall=2, tombstone=60, dial_min=1, dial_max=4, hush=0.2)


def key(number: int) -> SecretKey:
    return SecretKey(bytes([number]) * 32)


ME, LOW, HIGH, OTHER = (lambda ks: (ks[1], ks[0], ks[2], ks[3]))(
    sorted((key(n) for n in range(1, 5)), key=lambda k: k.peer)
)


def record(
    who: SecretKey,
    incarnation: int = 1,
    sequence: int = 1,
    *,
    authority: Authority = MESH,
    signer: SecretKey | None = None,
    **said: object,
) -> Record:
    announcement = Announcement(
        peer=who.peer,
        credential=authority.admit(who.public),
        incarnation=incarnation,
        sequence=sequence,
        addresses=("/ip4/192.0.2.1/tcp/4001",),
    )
    return wire.seal(replace(announcement, **said), (signer or who).seed)  # type: ignore[arg-type]


def membership(who: SecretKey = ME) -> Membership:
    made = Membership(
        record(who).announcement, mesh_id=MESH.mesh_id, seal=partial(wire.seal, seed=who.seed), config=CONFIG
    )
    made.handle(Wake(), NOW)
    return made


def hear(made: Membership, said: Record, now: float = NOW, gossiped: bool = True) -> list[Effect]:
    return made.handle(RecordHeard(said, gossiped), now)


def state(made: Membership, who: SecretKey) -> PeerState | None:
    entry = made.view(lambda _: None).get(who.peer)
    return entry.state if entry else None


def wake_until(made: Membership, until: float) -> list[tuple[float, Effect]]:
    done: list[tuple[float, Effect]] = []
    while (deadline := made.deadline()) is not None and deadline <= until:
        done += [(deadline, effect) for effect in made.handle(Wake(), deadline)]
    return done


# ── what a peer says of itself ───────────────────────────────────────────────────────────────────────────────────


def test_a_first_announcement_makes_a_peer_known() -> None:
    made = membership()
    assert Changed(LOW.peer, None, PeerState.ALIVE, "joined") in hear(made, record(LOW))
    assert state(made, LOW) is PeerState.ALIVE


def test_the_newer_announcement_holds_in_any_order() -> None:
    made = membership()
    hear(made, record(LOW, 1, 2, attributes=b"new"))
    assert hear(made, record(LOW, 1, 1, attributes=b"old")) == []
    assert hear(made, record(LOW, 1, 2, attributes=b"same age")) == []
    entry = made.view(lambda _: None).get(LOW.peer)
    assert entry is not None
    assert entry.attributes == b"new"


def test_what_did_not_come_by_gossip_is_passed_on() -> None:
    said = record(LOW)
    for gossiped, heard_again, passed_on in ((False, False, 1), (False, True, 0), (True, False, 0)):
        made = membership()
        hear(made, said, gossiped=gossiped)
        if heard_again:
            hear(made, said, gossiped=True)
        assert [e for _, e in wake_until(made, NOW + 1)].count(Publish(said)) == passed_on


@pytest.mark.parametrize(
    "forged",
    [
        record(LOW, signer=HIGH),
        record(LOW, authority=Authority.of_mesh(b"x" * 32)),
        replace(record(LOW), body=record(LOW, 1, 9).body),
        replace(record(LOW), announcement=replace(record(LOW).announcement, peer=PeerId("nobody"))),
    ],
    ids=["signed by another", "of another mesh", "another body", "no peer id"],
)
def test_a_forged_announcement_is_ignored(forged: Record) -> None:
    made = membership()
    assert hear(made, forged) == []
    assert state(made, LOW) is None


def test_an_expired_peer_is_not_let_in_and_one_that_expires_is_dropped() -> None:
    ends = int(NOW + 10)
    invite = MESH.delegate(scope=Scope.WORKER, not_after_unix=ends, seed=b"i" * 32)
    made = membership()
    hear(made, record(LOW, authority=invite))
    made.handle(Connected(LOW.peer), NOW)
    effects = [effect for _, effect in wake_until(made, ends + CLOCK_TOLERANCE)]
    assert Drop(LOW.peer, "its membership expired") in effects
    assert state(made, LOW) is PeerState.DEAD
    assert hear(made, record(LOW, 2, authority=invite), ends + CLOCK_TOLERANCE + 1) == []


# ── silence ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lost_connection_makes_a_suspect_and_silence_makes_it_dead() -> None:
    made = membership()
    hear(made, record(LOW))
    made.handle(Connected(LOW.peer), NOW)
    effects = made.handle(Disconnected(LOW.peer), NOW + 1)
    assert Dial(LOW.peer, ("/ip4/192.0.2.1/tcp/4001",)) in effects
    later = wake_until(made, NOW + 10)
    (told_at,) = [time for time, effect in later if effect == Publish(Suspicion(LOW.peer, 1, 1))]
    assert NOW + 1 <= told_at <= NOW + 1.2
    assert (NOW + 3, Changed(LOW.peer, PeerState.SUSPECT, PeerState.DEAD, "no answer")) in later


@pytest.mark.parametrize(
    "sign", [Connected(LOW.peer), PeerHeard(LOW.peer), RecordHeard(record(LOW, 2), gossiped=True)]
)
def test_a_suspect_that_shows_itself_is_believed_again(sign: Event) -> None:
    made = membership()
    hear(made, record(LOW))
    made.handle(PeerSilent(LOW.peer), NOW)
    assert state(made, LOW) is PeerState.SUSPECT
    made.handle(sign, NOW + 1)
    assert state(made, LOW) is PeerState.ALIVE


@pytest.mark.parametrize("end", ["dead", "left"])
def test_a_tombstoned_peer_returns_only_with_a_higher_incarnation(end: str) -> None:
    made = membership()
    hear(made, record(LOW, 5, 1))
    if end == "dead":
        made.handle(PeerSilent(LOW.peer), NOW)
        wake_until(made, NOW + 3)
    else:
        hear(made, record(LOW, 5, 2, leaving=True))
    gone = state(made, LOW)
    assert gone in (PeerState.DEAD, PeerState.LEFT)
    for sign in (PeerHeard(LOW.peer), Connected(LOW.peer), RecordHeard(record(LOW, 5, 99), gossiped=True)):
        made.handle(sign, NOW + 4)
        assert state(made, LOW) is gone
    hear(made, record(LOW, 6, 0), NOW + 5)
    assert state(made, LOW) is PeerState.ALIVE


def test_the_dead_are_forgotten_when_their_tombstone_ends() -> None:
    made = membership()
    hear(made, record(LOW))
    made.handle(PeerSilent(LOW.peer), NOW)
    wake_until(made, NOW + 2 + CONFIG.tombstone)
    assert state(made, LOW) is None


def test_a_hint_from_another_only_makes_us_ask() -> None:
    made = membership()
    hear(made, record(LOW, 3, 7))
    assert made.handle(SuspicionHeard(Suspicion(LOW.peer, 3, 7)), NOW) == [Question(LOW.peer)]
    assert state(made, LOW) is PeerState.ALIVE
    assert made.handle(SuspicionHeard(Suspicion(LOW.peer, 3, 6)), NOW) == []
    assert made.handle(SuspicionHeard(Suspicion(OTHER.peer, 3, 7)), NOW) == []


# ── what is said of us ───────────────────────────────────────────────────────────────────────────────────────────


def test_who_is_suspected_raises_its_incarnation() -> None:
    made = membership()
    mine = made.me.announcement
    (told,) = made.handle(SuspicionHeard(Suspicion(ME.peer, *mine.age)), NOW + 1)
    assert isinstance(told, Publish)
    assert made.me.announcement.incarnation == mine.incarnation + 1
    assert made.handle(SuspicionHeard(Suspicion(ME.peer, *mine.age)), NOW + 1) == []


def test_who_was_taken_for_dead_learns_it_from_a_digest() -> None:
    made = membership()
    mine = made.me.announcement
    made.handle(DigestHeard(Digest({ME.peer: mine.age}, frozenset({ME.peer}))), NOW + 1)
    assert made.me.announcement.incarnation == mine.incarnation + 1


def test_a_restart_with_a_clock_that_went_back_outlives_its_former_self() -> None:
    made = membership()
    made.handle(DigestHeard(Digest({ME.peer: (70, 3)})), NOW + 1)
    assert made.me.announcement.incarnation == 71
    hear(made, record(ME, 90, 1), NOW + 2)
    assert made.me.announcement.incarnation == 91
    assert made.handle(DigestHeard(Digest({ME.peer: made.me.announcement.age})), NOW + 3) == []


def test_changes_of_our_own_close_together_go_out_as_one() -> None:
    made = membership()
    first = [made.handle(SelfChanged((), (), bytes([n])), NOW + n / 100) for n in range(5)]
    assert first == [[]] * 5
    ((time, told),) = [(t, e) for t, e in wake_until(made, NOW + 1) if isinstance(e, Publish)]
    assert time == pytest.approx(NOW + CONFIG.coalesce)
    assert isinstance(told.said, Record)
    assert told.said.announcement.attributes == bytes([4])


def test_an_unchanged_announcement_is_repeated_seldom() -> None:
    made = membership()
    times = [time for time, effect in wake_until(made, NOW + 1000) if isinstance(effect, Publish)]
    assert times == [NOW + 300, NOW + 600, NOW + 900]
    assert made.handle(SelfChanged((), ("/ip4/192.0.2.1/tcp/4001",), b""), NOW + 1000) == []


def test_after_the_goodbye_nothing_is_said() -> None:
    made = membership()
    made.handle(SelfChanged((Service(name="s"),), (), b"x"), NOW)
    (told,) = made.handle(Leave(), NOW)
    assert isinstance(told, Publish)
    assert isinstance(told.said, Record)
    assert told.said.announcement.leaving
    assert told.said.announcement.services == ()
    for event in (Leave(), Wake(), SelfChanged((), (), b"y"), SuspicionHeard(Suspicion(ME.peer, 9, 9))):
        assert made.handle(event, NOW + 1) == []
    assert made.deadline() is None


# ── dialling ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_of_two_peers_the_lower_one_dials_first() -> None:
    made = membership()
    assert [e for e in hear(made, record(HIGH)) if isinstance(e, Dial)] != []
    assert [e for e in hear(made, record(LOW)) if isinstance(e, Dial)] == []
    dials = [time for time, effect in wake_until(made, NOW + 1) if isinstance(effect, Dial)]
    assert dials == [NOW + CONFIG.dial_first]


def test_dials_back_off_and_stop_when_connected() -> None:
    made, now, pauses = membership(), NOW, []
    hear(made, record(HIGH))
    for _ in range(5):
        made.handle(DialFailed(HIGH.peer), now)
        (then, _), *_ = [(t, e) for t, e in wake_until(made, now + 10) if isinstance(e, Dial)]
        pauses.append(then - now)
        now = then
    assert pauses == [1, 2, 4, 4, 4]
    made.handle(Connected(HIGH.peer), now)
    assert [e for _, e in wake_until(made, now + 100) if isinstance(e, Dial)] == []


# ── revocation ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_revoked_invite_cuts_off_everybody_below_it_and_nobody_else() -> None:
    invite = MESH.delegate(scope=Scope.INVITE, not_after_unix=None, seed=b"i" * 32)
    below = invite.delegate(scope=Scope.CLIENT, not_after_unix=None, seed=b"j" * 32)
    made = membership()
    hear(made, record(LOW, authority=invite))
    hear(made, record(HIGH, authority=below))
    hear(made, record(OTHER))
    revocation = MESH.revoke(invite.links)
    effects = made.handle(RevocationHeard(revocation, gossiped=False), NOW)
    assert Revoked(revocation) in effects
    assert Publish(revocation) in effects
    dropped = {effect.peer for effect in effects if isinstance(effect, Drop)}
    assert dropped == {LOW.peer, HIGH.peer}
    assert made.handle(RevocationHeard(revocation, gossiped=True), NOW) == []
    assert hear(made, record(LOW, 9, authority=invite)) == []
    assert [e for _, e in wake_until(made, NOW + 50) if isinstance(e, Dial) and e.peer != OTHER.peer] == []


def test_who_stands_below_a_link_cannot_revoke_it() -> None:
    invite = MESH.delegate(scope=Scope.INVITE, not_after_unix=None, seed=b"i" * 32)
    below = invite.delegate(scope=Scope.INVITE, not_after_unix=None, seed=b"j" * 32)
    forged = replace(below.revoke(below.admit(LOW.public).links), links=invite.links, signer=0)
    made = membership()
    hear(made, record(LOW, authority=invite))
    assert made.handle(RevocationHeard(forged, gossiped=True), NOW) == []
    assert state(made, LOW) is PeerState.ALIVE


# ── whatever happens ─────────────────────────────────────────────────────────────────────────────────────────────

SAID = [record(who, i, s, leaving=left) for who in (LOW, HIGH) for i, s, left in
        ((1, 1, False), (1, 2, False), (1, 3, True), (2, 1, False), (2, 2, False))]  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, len(SAID)))
def test_in_any_order_with_any_repetition_all_views_become_the_same(
    rng: random.Random, repeated: int
) -> None:
    def told(order: list[Record]) -> list[tuple[PeerId, tuple[int, int], PeerState]]:
        made = membership()
        for said in order:
            hear(made, said)
        ages = made.digest().ages
        return [(p.peer, ages[p.peer], p.state) for p in made.view(lambda _: None).peers]

    order = SAID + SAID[:repeated]
    rng.shuffle(order)
    assert told(order) == told(SAID)


PEERS = st.sampled_from([LOW.peer, HIGH.peer, OTHER.peer])
EVENTS = st.one_of(
    st.builds(RecordHeard, st.sampled_from(SAID), st.booleans()),
    st.builds(SuspicionHeard, st.builds(Suspicion, st.one_of(PEERS, st.just(ME.peer)), st.integers(0, 3), st.integers(0, 3))),
    st.builds(PeerSilent, PEERS),
    st.builds(PeerHeard, PEERS),
    st.builds(Connected, PEERS),
    st.builds(Disconnected, PEERS),
    st.builds(DialFailed, PEERS),
    st.builds(SelfChanged, st.just(()), st.just(()), st.binary(max_size=2)),
    st.just(Wake()),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(EVENTS, st.floats(0, 30)), max_size=40))
def test_waking_up_moves_the_deadline_forward_whatever_happens(script: list[tuple[Event, float]]) -> None:
    made, now = membership(), NOW
    for event, pause in script:
        now += pause
        made.handle(event, now)
        made.handle(Wake(), now)
        deadline = made.deadline()
        assert deadline is not None
        assert deadline > now


@settings(max_examples=100, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_nothing_that_is_said_of_a_peer_changes_what_is_believed_of_another(script: list[Event]) -> None:
    made = membership()
    for event in script:
        before = {p.peer: p.state for p in made.view(lambda _: None).peers}
        about = getattr(event, "peer", None)
        if isinstance(event, RecordHeard):
            about = event.record.announcement.peer
        made.handle(event, NOW)
        after = {p.peer: p.state for p in made.view(lambda _: None).peers}
        if not isinstance(event, Wake):
            assert {p for p in before | after if before.get(p) != after.get(p)} <= {about}

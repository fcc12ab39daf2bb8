"""The roster keeps much in mind; all of it must be what looking at every row again would tell."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libmesh import wire
from libmesh.core import membership_io as io
from libmesh.core.dialling import MAX_DIALS
from libmesh.core.membership import Membership
from libmesh.core.summary import BUCKETS, Digest, bucket_of, fingerprint_of_rows
from libmesh.peers import Path, PathKind, PeerId, PeerState
from tests import members

ME, OTHERS = 1, range(2, 12)
NOW = float(members.NOW)
CONFIG = io.MembershipConfig(
    full_mesh=5, connections=4, refute=1, reach=1.5, suspicion=2, tombstone=20, spare=3, hush=0.3, dial_max=4
)
PEERS = st.sampled_from([members.peer(number) for number in (ME, *OTHERS)])
SAID = [
    members.record(number, incarnation=incarnation, leaving=leaving, addresses=addresses)
    for number in OTHERS
    for incarnation, leaving in ((1, False), (2, False), (2, True), (3, False))
    for addresses in ((), ("/ip4/192.0.2.1/tcp/4001",))
]
AGES = st.tuples(st.integers(0, 4), st.integers(0, 2))
EVENTS = st.one_of(
    st.builds(io.RecordHeard, st.sampled_from(SAID), st.booleans()),
    st.builds(lambda peer, age: io.SuspicionHeard(io.Suspicion(peer, *age)), PEERS, AGES),
    st.builds(lambda ages: io.DigestHeard(Digest(ages, frozenset(ages))), st.dictionaries(PEERS, AGES)),
    st.builds(io.PeerSilent, PEERS),
    st.builds(io.PeerHeard, PEERS),
    st.builds(io.Connected, PEERS),
    st.builds(io.Disconnected, PEERS),
    st.builds(io.DialFailed, PEERS),
    st.builds(io.SelfChanged, st.just(()), st.just(()), st.binary(max_size=2)),
)


def machine() -> Membership:
    seal = partial(wire.seal, seed=members.seed(ME))
    return Membership(members.announcement(ME), mesh_id=members.MESH.mesh_id, seal=seal, config=CONFIG)


def path_of(peer: PeerId) -> Path:
    return Path(kind=PathKind.DIRECT, address=peer)


def plain_deadline(made: Membership) -> float:
    times = [made._voice.due, made._lost.due]
    for peer, entry in made._peers.items():
        times += [entry.state_ends, entry.tell_at, entry.reach_by, entry.spare_at]
        times += [entry.ends] if entry.believed else []
        times += [entry.next_dial] if made._dialling.wants(peer, entry) else []
    return min(times)


def plain_prints(digest: Digest) -> tuple[bytes, ...]:
    rows = [(peer, age, peer in digest.dead) for peer, age in digest.ages.items()]
    return tuple(
        fingerprint_of_rows([row for row in rows if bucket_of(row[0]) == bucket]) for bucket in range(BUCKETS)
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(EVENTS, st.floats(0, 4)), max_size=60))
def test_what_is_remembered_is_what_looking_again_would_tell(script: list[tuple[io.Event, float]]) -> None:
    made, now = machine(), NOW
    for event, pause in script:
        now += pause
        made.handle(io.Wake(), now)
        deadline = made.deadline()
        assert deadline is not None
        assert deadline > now
        made.handle(event, now)
        assert made.deadline() == plain_deadline(made)
        roster = made._roster
        assert made.watched == roster._watch()
        assert made._dialling._active == sum(entry.dialling for entry in roster.entries.values())
        digest, view = made.digest(), made.view(path_of)
        dead = {peer for peer, entry in roster.entries.items() if entry.state is PeerState.DEAD}
        assert digest.dead == dead
        ages = {peer: entry.announcement.age for peer, entry in roster.entries.items()}
        assert digest.ages == ages | {members.peer(ME): made.me.announcement.age}
        assert made.summary().buckets == plain_prints(digest)
        for entry in roster.entries.values():
            entry.picture = None
        assert view == made.view(path_of)
        assert [shown.peer for shown in view.peers] == sorted(roster.entries)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(EVENTS, st.floats(0, 4)), max_size=60))
def test_what_others_say_of_a_peer_changes_what_is_believed_of_nobody(
    script: list[tuple[io.Event, float]],
) -> None:
    made, now = machine(), NOW
    for event, pause in script:
        now += pause
        made.handle(io.Wake(), now)
        before = {shown.peer: shown.state for shown in made.view(path_of).peers}
        made.handle(event, now)
        after = {shown.peer: shown.state for shown in made.view(path_of).peers}
        if isinstance(event, io.SuspicionHeard | io.DigestHeard):
            assert before == after


def test_claims_of_incarnations_from_the_far_future_are_not_outbid() -> None:
    made = machine()
    made.handle(io.Wake(), NOW)
    mine = made.me
    for claim in (2**64 - 1, 2**63, int((NOW + 400 * 86400) * 1000)):
        made.handle(io.SuspicionHeard(io.Suspicion(members.peer(ME), claim, 0)), NOW + 2)
        made.handle(io.DigestHeard(Digest({members.peer(ME): (claim, 0)})), NOW + 2)
    assert made.me is mine


def test_a_liar_cannot_make_a_peer_speak_without_end() -> None:
    made, said = machine(), 0
    made.handle(io.Wake(), NOW)
    for tenth in range(1, 101):
        now = NOW + tenth / 10
        suspicion = io.Suspicion(members.peer(ME), *made.me.announcement.age)
        effects = [*made.handle(io.SuspicionHeard(suspicion), now), *made.handle(io.Wake(), now)]
        said += len([effect for effect in effects if isinstance(effect, io.Publish)])
    assert said == 10 / CONFIG.refute_every


def test_a_record_is_not_taken_beyond_the_bound_of_the_table() -> None:
    made = machine()
    made._peers.update(dict.fromkeys((PeerId(f"peer{n}") for n in range(4096)), None))  # type: ignore[arg-type]
    assert made.handle(io.RecordHeard(members.record(2), gossiped=True), NOW) == []


def test_records_are_shared_between_machines_not_copied() -> None:
    said = members.record(2)
    made = [machine() for _ in range(2)]
    for one in made:
        one.handle(io.RecordHeard(said, gossiped=True), NOW)
        (lacking,) = [r for r in one.newer_than(Digest({})) if r is not one.me]
        assert lacking is said


def test_of_strangers_nothing_is_known() -> None:
    made, stranger = machine(), members.peer(77)
    assert made.credential_of(stranger) is None
    assert made.addresses_of(stranger) == ()
    assert made.state_of(stranger) is None
    assert not made.believes(stranger)
    assert not made.wanted(stranger)


def test_of_members_their_own_words_are_known() -> None:
    made, said = machine(), members.record(2)
    made.handle(io.RecordHeard(said, gossiped=True), NOW)
    assert made.credential_of(members.peer(2)) == said.announcement.credential
    assert made.addresses_of(members.peer(2)) == said.announcement.addresses
    assert made.believes(members.peer(2))
    assert made.newer_than(made.digest()) == []


# ── beyond the full mesh ─────────────────────────────────────────────────────────────────────────────────────────


def crowd(count: int = 60) -> Membership:
    made = machine()
    made.handle(io.Wake(), NOW)
    for number in range(2, count):
        for effect in made.handle(io.RecordHeard(members.record(number), gossiped=True), NOW):
            if isinstance(effect, io.Dial):
                made.handle(io.DialFailed(effect.peer), NOW)
    for number in range(2, count):
        if made.wanted(members.peer(number)):
            made.handle(io.Connected(members.peer(number)), NOW)
    return made


def far(made: Membership) -> PeerId:
    return min(p.peer for p in made.view(path_of).peers if not made.wanted(p.peer))


def wake(made: Membership, until: float) -> list[tuple[float, io.Effect]]:
    done: list[tuple[float, io.Effect]] = []
    while (deadline := made.deadline()) is not None and deadline <= until:
        done += [(deadline, effect) for effect in made.handle(io.Wake(), deadline)]
    return done


def test_few_are_connected_and_watched_of_many() -> None:
    made = crowd()
    peers, doubted, asked, nearby, wards = made.watched
    assert len(peers) == 4
    assert (doubted, asked) == (frozenset(), peers)
    assert nearby is not None
    assert set(nearby) == set(wards)
    assert len(wards) == 2
    assert [e for _, e in wake(made, NOW + 100) if isinstance(e, io.Dial)] == []


def test_a_suspect_that_refutes_is_not_dialled_by_those_who_are_not_connected_to_it() -> None:
    made = crowd()
    peer = far(made)
    assert made.handle(io.SuspicionHeard(io.Suspicion(peer, 1, 1)), NOW) == []
    number = next(n for n in range(2, 60) if members.peer(n) == peer)
    made.handle(io.RecordHeard(members.record(number, incarnation=2), gossiped=True), NOW + 0.9)
    assert [e for _, e in wake(made, NOW + 30) if getattr(e, "peer", None) == peer] == []
    assert made.state_of(peer) is PeerState.ALIVE


@pytest.mark.parametrize(
    ("failed_after", "dies_after"),
    [
        (1.2, CONFIG.suspicion),
        (2.0, 2.0 + CONFIG.suspicion / 4),
    ],  # counted from the first doubt, but not all of it
)
def test_a_suspect_that_stays_silent_is_dialled_and_dies_only_when_that_fails(
    failed_after: float, dies_after: float
) -> None:
    made = crowd()
    peer = far(made)
    made.handle(io.SuspicionHeard(io.Suspicion(peer, 1, 1)), NOW)
    ((dialled_at, _),) = [(t, e) for t, e in wake(made, NOW + 1.2) if isinstance(e, io.Dial)]
    assert dialled_at == NOW + CONFIG.refute
    assert made.state_of(peer) is PeerState.ALIVE
    made.handle(io.DialFailed(peer), NOW + failed_after)
    assert made.state_of(peer) is PeerState.SUSPECT
    deaths = [
        t
        for t, e in wake(made, NOW + 9)
        if e == io.Changed(peer, PeerState.SUSPECT, PeerState.DEAD, "no answer")
    ]
    assert deaths == [NOW + dies_after]


def test_a_dial_that_hangs_counts_as_silence_after_a_while() -> None:
    made = crowd()
    peer = far(made)
    made.handle(io.SuspicionHeard(io.Suspicion(peer, 1, 1)), NOW)
    suspected = [
        t for t, e in wake(made, NOW + 9) if isinstance(e, io.Changed) and e.state is PeerState.SUSPECT
    ]
    assert suspected == [NOW + CONFIG.refute + CONFIG.reach]


def test_a_connection_that_nobody_planned_is_released_and_its_end_suspects_nobody() -> None:
    made = crowd()
    peer = far(made)
    made.handle(io.Connected(peer), NOW)
    released = [t for t, e in wake(made, NOW + 7) if e == io.Release(peer)]
    assert released == [NOW + CONFIG.spare, NOW + 2 * CONFIG.spare]
    made.handle(io.Disconnected(peer), NOW + 7)
    assert made.state_of(peer) is PeerState.ALIVE


def test_a_planned_connection_lost_suspects_and_another_takes_its_place_after_the_death() -> None:
    made = crowd()
    lost = sorted(made.watched[0])[0]
    effects = made.handle(io.Disconnected(lost), NOW)
    assert io.Changed(lost, PeerState.ALIVE, PeerState.SUSPECT, "connection lost") in effects
    later = wake(made, NOW + CONFIG.suspicion + CONFIG.dial_first)
    assert made.state_of(lost) is PeerState.DEAD
    assert {e.peer for _, e in later if isinstance(e, io.Dial) and made.wanted(e.peer)} != set()


def test_one_digest_makes_us_look_for_a_bounded_number_of_peers() -> None:
    made = crowd()
    ages = made.digest().ages
    made.handle(io.DigestHeard(Digest(ages, frozenset(ages) - {members.peer(ME)})), NOW + 1)
    dials = {e.peer for _, e in wake(made, NOW + 3) if isinstance(e, io.Dial)}
    assert 0 < len(dials) <= 16


def test_the_dead_are_dialled_a_few_at_a_time_however_many_they_are() -> None:
    made = crowd()

    def dials(event: io.Event, now: float) -> int:
        asked = [effect.peer for effect in made.handle(event, now) if isinstance(effect, io.Dial)]
        return len(asked) + sum(dials(io.DialFailed(peer), now) for peer in asked)

    for shown in made.view(path_of).peers:
        dials(io.Disconnected(shown.peer), NOW)
        dials(io.PeerSilent(shown.peer), NOW)
    for tenth in range(50):
        dials(io.Wake(), NOW + tenth / 10)
    assert {shown.state for shown in made.view(path_of).peers} == {PeerState.DEAD}
    count = sum(dials(io.Wake(), NOW + tenth / 10) for tenth in range(50, 250))
    assert 20 * 8 / CONFIG.dial_max / 2 <= count <= 20 * 8 / CONFIG.dial_max * 1.5


def test_a_doubted_peer_without_addresses_gets_the_time_that_a_dial_would_have() -> None:
    made = crowd()
    peer = members.peer(999)
    made.handle(io.RecordHeard(members.record(999, addresses=()), gossiped=True), NOW)
    assert not made.wanted(peer)
    made.handle(io.SuspicionHeard(io.Suspicion(peer, 1, 1)), NOW)
    suspected = [
        t for t, e in wake(made, NOW + 9) if isinstance(e, io.Changed) and e.state is PeerState.SUSPECT
    ]
    assert suspected == [NOW + CONFIG.refute + CONFIG.reach]


def test_a_dial_that_hangs_already_when_the_doubt_comes_counts_as_silence_as_soon() -> None:
    made = crowd()
    lost = sorted(made.watched[0])[0]
    made.handle(io.Disconnected(lost), NOW)
    now = NOW + CONFIG.suspicion + CONFIG.dial_first
    (peer,) = {e.peer for _, e in wake(made, now) if isinstance(e, io.Dial) and made.wanted(e.peer)}
    made.handle(io.SuspicionHeard(io.Suspicion(peer, 1, 1)), now)
    suspected = [
        t
        for t, e in wake(made, now + 9)
        if e == io.Changed(peer, PeerState.ALIVE, PeerState.SUSPECT, "it cannot be reached")
    ]
    assert suspected == [now + CONFIG.refute + CONFIG.reach]


def test_a_lost_connection_shortens_the_time_of_a_suspect() -> None:
    made = crowd()
    peer = sorted(made.watched[0])[0]
    made.handle(io.PeerSilent(peer), NOW)
    made.handle(io.Disconnected(peer), NOW + 0.5)
    deaths = [t for t, e in wake(made, NOW + 9) if isinstance(e, io.Changed) and e.state is PeerState.DEAD]
    assert deaths == [NOW + 0.5 + CONFIG.suspicion]


def test_who_is_dead_is_disconnected() -> None:
    made = crowd()
    peer = sorted(made.watched[0])[0]
    made.handle(io.PeerSilent(peer), NOW)
    assert (NOW + CONFIG.stall, io.Drop(peer, "no answer")) in wake(made, NOW + 9)


def test_not_more_are_dialled_at_once_than_there_may_be() -> None:
    made = machine()
    made.handle(io.Wake(), NOW)
    made._dialling._active = MAX_DIALS
    assert not [
        e
        for e in made.handle(io.RecordHeard(members.record(2), gossiped=True), NOW)
        if isinstance(e, io.Dial)
    ]
    wake(made, NOW + 2)
    made._dialling._active = 0
    assert [e for _, e in wake(made, NOW + 3) if isinstance(e, io.Dial)] != []

"""Fingerprints: the same for the same table however it came about, and different where tables differ, and only there."""

from __future__ import annotations

from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st

from libmesh import wire
from libmesh.core import membership_io as io
from libmesh.core.membership import Membership
from libmesh.core.summary import BUCKETS, Digest, Part, bucket_of
from libmesh.peers import Scope
from tests import members

NOW = float(members.NOW)


def machine(number: int, *, following: bool = False) -> Membership:
    seal = partial(wire.seal, seed=members.seed(number))
    me = members.announcement(number, sequence=0)
    made = Membership(me, mesh_id=members.MESH.mesh_id, seal=seal, following=following)
    assert bool(made.handle(io.Wake(), NOW)) is not following
    return made


def learned(number: int, records: list[int], *, following: bool = False) -> Membership:
    made = machine(number, following=following)
    for one in records:
        made.handle(io.RecordHeard(members.record(one), gossiped=True), NOW)
    return made


def test_two_peers_that_know_each_other_have_the_same_fingerprint_in_whatever_order_they_learned() -> None:
    one, two = learned(1, [2, 3, 4, 5]), learned(2, [5, 4, 3, 1])
    assert one.summary() == two.summary()
    assert one.summary().difference(two.summary()) == Part(frozenset(), revocations=False)


def test_a_difference_is_found_in_its_bucket() -> None:
    one, two = learned(1, [2, 3, 4]), learned(2, [1, 3])
    part = one.summary().difference(two.summary())
    assert part.buckets == {bucket_of(members.peer(4))}
    (told,) = one.newer_than(two.digest(part))
    assert told.announcement.peer == members.peer(4)
    two.handle(io.RecordHeard(told, gossiped=False), NOW)
    assert one.summary() == two.summary()


def test_records_outside_of_the_part_are_not_told() -> None:
    one = learned(1, list(range(2, 30)))
    part = Part(frozenset(range(BUCKETS // 2)), revocations=False)
    told = {record.announcement.peer for record in one.newer_than(Digest({}, part=part))}
    everybody = {members.peer(number) for number in range(1, 30)}
    assert told == {peer for peer in everybody if bucket_of(peer) in part.buckets}
    assert one.digest(part).ages.keys() == told
    assert one.digest(part).part == part


def test_a_death_and_a_revocation_are_differences() -> None:
    one, two = learned(1, [2, 3]), learned(2, [1, 3])
    one.handle(io.PeerSilent(members.peer(3)), NOW)
    while members.peer(3) not in one.digest().dead:
        deadline = one.deadline()
        assert deadline is not None
        one.handle(io.Wake(), deadline)
    assert bucket_of(members.peer(3)) in one.summary().difference(two.summary()).buckets
    invite = members.MESH.delegate(scope=Scope.CLIENT, not_after_unix=None, seed=members.seed(50))
    two.handle(io.RevocationHeard(members.MESH.revoke(invite.links), gossiped=True), NOW)
    assert one.summary().difference(two.summary()).revocations


def test_who_follows_knows_what_those_know_whom_it_follows() -> None:
    one, guest = learned(1, [2, 3]), learned(9, [1, 2, 3], following=True)
    assert guest.summary() == one.summary()
    assert len(guest.newer_than(Digest({}))) == 3
    assert members.peer(9) not in guest.digest().ages
    guest.handle(io.TakePart(), NOW)
    assert members.peer(9) in guest.digest().ages
    part = guest.summary().difference(one.summary())
    assert part.buckets == {bucket_of(members.peer(9))}


NUMBERS = st.integers(2, 12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(NUMBERS, st.integers(1, 3))), st.lists(st.tuples(NUMBERS, st.integers(1, 3))))
def test_the_parts_that_differ_are_exactly_those_in_which_a_row_differs(
    ours: list[tuple[int, int]], theirs: list[tuple[int, int]]
) -> None:
    sides = [machine(1), machine(1)]
    for made, heard in zip(sides, (ours, theirs), strict=True):
        for number, incarnation in heard:
            made.handle(io.RecordHeard(members.record(number, incarnation=incarnation), gossiped=True), NOW)
    one, two = (made.digest().ages for made in sides)
    differing = {bucket_of(peer) for peer in one | two if one.get(peer) != two.get(peer)}
    assert sides[0].summary().difference(sides[1].summary()).buckets == differing


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(
    st.builds(lambda n: io.RecordHeard(members.record(n), gossiped=False), NUMBERS),
    st.builds(lambda n: io.PeerSilent(members.peer(n)), NUMBERS),
    st.builds(lambda n: io.SuspicionHeard(io.Suspicion(members.peer(n - 1), 1, 1)), NUMBERS),
    st.builds(io.SelfChanged, st.just(()), st.just(()), st.binary(max_size=2)),
    st.just(io.Wake()), st.just(io.Leave()),
)))  # fmt: skip
def test_who_follows_says_nothing_whatever_happens(script: list[io.Event]) -> None:
    made, now = machine(1, following=True), NOW
    for event in script:
        now += 1
        assert not [e for e in made.handle(event, now) if isinstance(e, io.Publish)]

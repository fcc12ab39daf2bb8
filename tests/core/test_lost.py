"""The lost: forgotten, but tried now and then, one at a time, and not for ever."""

from __future__ import annotations

import itertools
from functools import partial

from libmesh import wire
from libmesh.core import membership_io as io
from libmesh.core.credentials import Revoked
from libmesh.core.lost import KEPT, MAX_LOST, Lost
from libmesh.core.membership import Membership
from libmesh.core.timers import INFINITY
from libmesh.peers import PeerId, Scope
from tests import members

NOW = float(members.NOW)
CONFIG = io.MembershipConfig(suspicion=2, tombstone=20, seek=10, dial_max=4)
ADDRESSES = ("/ip4/192.0.2.1/tcp/4001",)


def lost(*numbers: int) -> Lost:
    made = Lost(members.peer(1), CONFIG)
    for number in numbers:
        made.add(members.peer(number), ADDRESSES, None, NOW)
    return made


def tried(made: Lost, until: float) -> list[tuple[float, PeerId]]:
    dials: list[tuple[float, PeerId]] = []
    while (now := made.due) <= until:
        dials += [(now, dial.peer) for dial in made.dial(now)]
        assert made.due > now
    return dials


def test_each_is_tried_in_turn_one_per_pause() -> None:
    made = lost(2, 3, 4)
    dials = tried(made, NOW + 90)
    assert [peer for _, peer in dials][:6] == [members.peer(n) for n in (2, 3, 4, 2, 3, 4)]
    pauses = [after - before for (before, _), (after, _) in itertools.pairwise(dials)]
    assert all(7.5 <= pause <= 12.5 for pause in pauses)
    assert made.dial(NOW) == []


def test_nobody_lost_needs_no_alarm() -> None:
    made = lost()
    assert made.due == INFINITY
    assert made.dial(NOW) == []
    made.add(members.peer(1), ADDRESSES, None, NOW)  # oneself
    made.add(members.peer(2), (), None, NOW)  # nowhere to be reached
    assert made.due == INFINITY


def test_who_is_found_is_not_tried_any_more() -> None:
    made = lost(2, 3)
    made.found(members.peer(2))
    made.found(members.peer(9))
    assert {peer for _, peer in tried(made, NOW + 60)} == {members.peer(3)}


def test_of_too_many_the_first_is_forgotten() -> None:
    made = lost(*range(2, MAX_LOST + 4))
    names = {peer for _, peer in tried(made, NOW + 13 * (MAX_LOST + 2))}
    assert names == {members.peer(number) for number in range(4, MAX_LOST + 4)}


def test_nobody_is_tried_for_ever() -> None:
    made = lost(2)
    dials = tried(made, NOW + 2 * KEPT)
    assert NOW + KEPT - 13 <= dials[-1][0] < NOW + KEPT
    assert made.due == INFINITY


def test_whose_membership_has_ended_or_was_taken_back_is_not_tried() -> None:
    ended = members.invited(2, Scope.CLIENT, not_after_unix=int(NOW) + 5)
    child = members.MESH.delegate(scope=Scope.CLIENT, not_after_unix=None, seed=members.seed(50))
    gone, good = child.admit(members.key(3).public), members.credential(4)
    made, revoked = lost(), Revoked()
    for number, credential in ((2, ended), (3, gone), (4, good)):
        made.add(members.peer(number), ADDRESSES, credential, NOW)
    revoked.add(members.MESH.revoke(child.links))
    made.revoke(revoked)
    assert {peer for _, peer in tried(made, NOW + 100)} == {members.peer(4)}


# ── in the machine ───────────────────────────────────────────────────────────────────────────────────────────────


def machine() -> Membership:
    seal = partial(wire.seal, seed=members.seed(1))
    made = Membership(members.announcement(1), mesh_id=members.MESH.mesh_id, seal=seal, config=CONFIG)
    made.handle(io.Wake(), NOW)
    return made


def dials(made: Membership, until: float) -> list[tuple[float, PeerId]]:
    found: list[tuple[float, PeerId]] = []
    while (now := made.deadline()) is not None and now <= until:
        for effect in made.handle(io.Wake(), now):
            if isinstance(effect, io.Dial):
                found.append((now, effect.peer))
                made.handle(io.DialFailed(effect.peer), now)
    return found


def test_the_dead_are_tried_after_their_tombstones_and_those_who_left_are_not() -> None:
    made = machine()
    made.handle(io.RecordHeard(members.record(2), gossiped=True), NOW)
    made.handle(io.RecordHeard(members.record(3, leaving=True), gossiped=True), NOW)
    made.handle(io.PeerSilent(members.peer(2)), NOW)
    dials(made, NOW + 30)
    assert made.state_of(members.peer(2)) is None
    later = dials(made, NOW + 100)
    assert len(later) >= 5
    assert {peer for _, peer in later} == {members.peer(2)}
    made.handle(io.RecordHeard(members.record(2, incarnation=9), gossiped=True), NOW + 100)
    made.handle(io.Connected(members.peer(2)), NOW + 100)
    assert dials(made, NOW + 200) == []


def test_a_contact_is_tried_until_it_announces_itself() -> None:
    made = machine()
    made.handle(io.ContactNamed(members.peer(2), ADDRESSES), NOW)
    tries = dials(made, NOW + 30)
    assert {peer for _, peer in tries} == {members.peer(2)}
    assert 2 <= len(tries) <= 4
    made.handle(io.RecordHeard(members.record(2), gossiped=True), NOW + 30)
    made.handle(io.ContactNamed(members.peer(2), ADDRESSES), NOW + 30)
    assert made._lost.due == INFINITY


def test_who_was_expelled_is_not_looked_for() -> None:
    made = machine()
    child = members.MESH.delegate(scope=Scope.CLIENT, not_after_unix=None, seed=members.seed(50))
    credential = child.admit(members.key(2).public)
    made.handle(io.RecordHeard(members.record(2, credential=credential), gossiped=True), NOW)
    made.handle(io.RevocationHeard(members.MESH.revoke(child.links), gossiped=True), NOW)
    assert dials(made, NOW + 300) == []
    assert made.state_of(members.peer(2)) is None

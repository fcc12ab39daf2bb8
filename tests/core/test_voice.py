"""What a peer says of itself when it is a member by another invite."""

from __future__ import annotations

from libmesh.core.announcement import Record
from libmesh.core.membership_io import Effect, Leave, Publish, Renewed, SelfChanged, TakePart, Wake
from libmesh.peers import Scope
from tests.members import NOW, invited, membership

CLIENT = invited(1, Scope.CLIENT)


def said(effects: list[Effect]) -> list[Record]:
    return [e.said for e in effects if isinstance(e, Publish) and isinstance(e.said, Record)]


def test_another_credential_is_announced_at_once_with_what_waited() -> None:
    machine = membership(1)
    machine.handle(Wake(), NOW)
    assert said(machine.handle(SelfChanged((), (), b"new"), NOW + 0.01)) == [], "it waits for more"
    (record,) = said(machine.handle(Renewed(CLIENT), NOW + 0.02))
    assert record.announcement.credential == CLIENT
    assert record.announcement.attributes == b"new"
    assert machine.view(lambda _: None).scope is Scope.CLIENT
    assert said(machine.handle(Wake(), NOW + 1)) == []


def test_goodbye_and_whatever_else_is_said_later_goes_by_the_new_one() -> None:
    machine = membership(1)
    machine.handle(Renewed(CLIENT), NOW)
    (goodbye,) = said(machine.handle(Leave(), NOW + 1))
    assert goodbye.announcement.leaving
    assert goodbye.announcement.credential == CLIENT
    assert said(machine.handle(Renewed(invited(1, Scope.WORKER)), NOW + 2)) == [], (
        "nothing is said after that"
    )


def test_follower_that_is_renewed_tells_nobody_and_takes_part_by_the_new_one() -> None:
    machine = membership(1)
    machine.following = True
    assert machine.handle(Renewed(CLIENT), NOW) == []
    assert machine.view(lambda _: None).scope is Scope.CLIENT
    (record,) = said(machine.handle(TakePart(), NOW + 1))
    assert record.announcement.credential == CLIENT

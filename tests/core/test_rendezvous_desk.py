"""Who is registered at a rendezvous point, for how long, and what is refused when it is full."""

from __future__ import annotations

from libmesh.core.rendezvous_desk import RendezvousDesk, RendezvousLimits
from libmesh.peers import PeerId

A, B, C = map(PeerId, "abc")
LIMITS = RendezvousLimits(registrations=3, per_peer=2, lasts=100.0, answer=2)


def names(
    desk: RendezvousDesk, namespace: str = "x", limit: int = 0, after: int = 0, now: float = 1
) -> list[str]:
    return [r.record.decode() for r in desk.discover(namespace, limit, after, now)]


def test_whoever_registered_is_told_to_whoever_asks_in_that_namespace_only() -> None:
    desk = RendezvousDesk(LIMITS)
    assert desk.register(A, "x", b"1", 50, 0) == 50
    assert desk.register(B, "y", b"2", 0, 0) == 100, "no time is as long as is allowed"
    assert desk.register(C, "x", b"3", 1e9, 0) == 100
    assert (names(desk), names(desk, "y"), names(desk, "z")) == (["1", "3"], ["2"], [])


def test_a_registration_ends_unless_it_is_renewed() -> None:
    desk = RendezvousDesk(LIMITS)
    desk.register(A, "x", b"old", 50, 0)
    desk.register(A, "x", b"new", 50, 40)
    assert names(desk, now=60) == ["new"]
    assert names(desk, now=90) == []
    assert desk.registrations == 1


def test_a_cookie_leads_to_what_is_newer() -> None:
    desk = RendezvousDesk(LIMITS)
    for peer in (A, B, C):
        desk.register(peer, "x", peer.encode(), 50, 0)
    assert names(desk) == ["a", "b"]
    last = desk.discover("x", 0, 0, 1)[-1].number
    assert names(desk, after=last) == ["c"]
    desk.register(A, "x", b"again", 50, 1)
    assert names(desk, after=last, limit=9) == ["c", "again"]
    assert names(desk, limit=1) == ["b"]


def test_one_peer_cannot_fill_it_nor_can_all_together() -> None:
    desk = RendezvousDesk(LIMITS)
    assert [desk.register(A, ns, b"", 50, 0) for ns in "xyz"] == [50, 50, None]
    assert desk.register(A, "x", b"again", 50, 0) == 50, "a renewal takes no more room"
    assert [desk.register(peer, "x", b"", 50, 0) for peer in (B, C)] == [50, None]
    assert desk.registrations == 3


def test_what_is_over_makes_room() -> None:
    desk = RendezvousDesk(LIMITS)
    for ns in "xy":
        desk.register(A, ns, b"", 10, 0)
    desk.register(B, "x", b"", 50, 0)
    assert desk.register(C, "x", b"c", 50, 9) is None
    assert desk.register(C, "x", b"c", 50, 10) == 50
    assert desk.registrations == 2


def test_who_unregisters_is_forgotten_and_others_are_not() -> None:
    desk = RendezvousDesk(LIMITS)
    desk.register(A, "x", b"a", 50, 0)
    desk.register(B, "x", b"b", 50, 0)
    for _ in range(2):
        desk.unregister(A, "x")
        desk.unregister(A, "nowhere")
    assert names(desk) == ["b"]
    assert desk.registrations == 1

"""What announcements mean for demand: who is believed in what, and that a stranger's words never break anything."""

from __future__ import annotations

from dataclasses import replace

import pytest
from libmesh_node.announced import AnnouncedModel, NodeStatus, OnDisk, Wish, decode_status, encode_status
from libmesh_node.placement.demand import Row
from libmesh_node.placement.rows import Asks, asks_of, on_disks, row_of, rows_of

from libmesh import PeerId, PeerState, PeerView, Scope, View

M, N = "ab" * 32, "cd" * 32
STATUS = NodeStatus(
    memory_bytes=100,
    spare_bytes=60,
    models=(AnnouncedModel(name="n", digest=N, coming=True),),
    wishes=(Wish(digest=M, name="m", requests=1.5, waiting=2), Wish(digest=N, named=True)),
    on_disk=(
        OnDisk(digest=M, name="m", needed_bytes=50, refused=True),
        OnDisk(digest=N, name="n", needed_bytes=40),
    ),
)
ROW = Row(
    peer="p",
    asked={M: 1.5},
    queued={M: 2},
    wants=frozenset({N}),
    serves=frozenset({N}),
    has={M: 50, N: 40},
    spare=60,
    refused=frozenset({M}),
)


def peer(name: str, status: NodeStatus = STATUS, **changes: object) -> PeerView:
    made = PeerView(
        peer=PeerId(name),
        scope=Scope.WORKER,
        state=PeerState.ALIVE,
        services=(),
        attributes=encode_status(status),
        addresses=(),
        path=None,
        since_unix=0.0,
        incarnation=1,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def view(*peers: PeerView, scope: Scope = Scope.WORKER) -> View:
    return View(mesh_id="0" * 32, me=PeerId("me"), scope=scope, peers=peers)  # type: ignore[arg-type]


def test_announcement_is_a_row() -> None:
    assert row_of("p", decode_status(encode_status(STATUS)), works=True) == ROW


def test_every_node_makes_the_same_rows_of_what_is_announced() -> None:
    """So all decide alike: a node's own row is what the others are told."""
    mine, theirs = STATUS, replace(STATUS, rests=True)
    here = rows_of(view(peer("them", theirs)), mine)
    there = rows_of(replace(view(peer("me", mine)), me=PeerId("them")), theirs)
    assert sorted(here, key=lambda row: row.peer) == sorted(there, key=lambda row: row.peer)


def test_those_who_may_not_work_for_others_are_heard_but_take_nothing() -> None:
    (_, guest) = rows_of(view(peer("p", scope=Scope.CLIENT)), NodeStatus())
    assert (guest.asked, guest.queued, guest.wants) == (ROW.asked, ROW.queued, ROW.wants)
    assert (guest.serves, guest.has, guest.spare, guest.standby) == (frozenset(), {}, 0, False)
    guests = view(peer("p", scope=Scope.CLIENT))
    assert on_disks(guests, NodeStatus()) == ()
    assert asks_of(guests, NodeStatus())[N] == Asks(wanted=True)
    (own, *_) = rows_of(view(scope=Scope.CLIENT), STATUS)
    assert not own.standby


@pytest.mark.parametrize("state", [PeerState.DEAD, PeerState.LEFT])
def test_demand_of_the_gone_goes_with_them(state: PeerState) -> None:
    gone = view(peer("p", state=state))
    assert [row.peer for row in rows_of(gone, NodeStatus())] == ["me"]
    assert asks_of(gone, NodeStatus()) == {}
    assert on_disks(gone, NodeStatus()) == ()


def test_what_is_asked_for_is_the_sum_over_the_living() -> None:
    asks = asks_of(view(peer("p"), peer("q", attributes=b"\xff")), STATUS)
    assert asks == {
        M: Asks(asked=3.0, waiting=4),
        N: Asks(wanted=True, coming=True, standbys=2),
    }
    assert {held.name for held in on_disks(view(peer("p")), NodeStatus())} == {"n"}

"""The plan of connections: bounded, the same from both ends, in one piece, and never recomputed to another result."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libmesh.core.plan import Plan, lot
from libmesh.peers import PeerId

PEERS = [PeerId(f"peer{number}") for number in range(200)]


def plan(me: PeerId, others: list[PeerId], connections: int = 24) -> Plan:
    made = Plan(me, connections)
    for other in others:
        made.add(other)
    return made


def graph(peers: list[PeerId], connections: int) -> dict[PeerId, frozenset[PeerId]]:
    return {me: plan(me, [p for p in peers if p != me], connections).neighbours for me in peers}


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(2, 60))
def test_coming_and_going_leads_to_the_plan_that_those_present_would_make_anew(
    rng: random.Random, steps: int
) -> None:
    me, others = PEERS[0], PEERS[1:60]
    made, present = Plan(me, 12), set[PeerId]()
    before = made.neighbours
    for _ in range(steps * 3):
        peer = rng.choice(others)
        if peer in present:
            present.remove(peer)
            changed = made.remove(peer, present)
        else:
            present.add(peer)
            changed = made.add(peer)
        assert before ^ made.neighbours <= set(changed)
        before = made.neighbours
        fresh = plan(me, sorted(present), 12)
        assert (made.neighbours, made.near) == (fresh.neighbours, fresh.near)


@pytest.mark.parametrize("count", [2, 3, 20])
def test_everybody_is_the_first_of_exactly_one_other(count: int) -> None:
    peers = PEERS[:count]
    beside = [plan(me, [p for p in peers if p != me]).beside for me in peers]
    assert sorted(two[0] for two in beside) == sorted(two[-1] for two in beside) == sorted(peers)
    assert plan(peers[0], []).beside == ()


@pytest.mark.parametrize(("count", "connections"), [(2, 24), (33, 24), (200, 24), (200, 4), (100, 9)])
def test_both_ends_want_a_connection_nobody_has_too_many_and_all_hang_together(
    count: int, connections: int
) -> None:
    wanted = graph(PEERS[:count], connections)
    assert all(me in wanted[other] for me in wanted for other in wanted[me])
    assert max(map(len, wanted.values())) <= connections
    reached, edge = {PEERS[0]}, [PEERS[0]]
    while edge:
        fresh = wanted[edge.pop()] - reached
        reached |= fresh
        edge += fresh
    assert len(reached) == count


def test_those_near_a_peer_are_connected_to_each_other_up_to_its_reach() -> None:
    wanted = graph(PEERS, 24)
    line = plan(PEERS[7], [p for p in PEERS if p != PEERS[7]]).near
    assert line.index(PEERS[7]) == len(line) // 2 == 6
    for place, peer in enumerate(line):
        assert set(line[place + 1 : place + 7]) <= wanted[peer]


def test_one_arrival_among_many_changes_few_neighbours() -> None:
    before = graph(PEERS[:150], 24)
    after = graph(PEERS[:151], 24)
    lost = sum(len(before[me] - after[me]) for me in before)
    assert lost <= 2 * 24


def test_a_lot_is_fixed_for_a_pair_and_spreads_over_all_numbers() -> None:
    lots = sorted(lot(PEERS[0], other) for other in PEERS[1:])
    assert lot(PEERS[3], PEERS[9]) == lot(PEERS[9], PEERS[3])
    assert 0 <= lots[0] < 0.05
    assert 0.95 < lots[-1] < 1

"""Turns and rates, in virtual time."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from libmesh.core.shares import BURST, INFINITY, Shares
from libmesh.peers import PeerId

A, B, C = (PeerId(name) for name in "ABC")
KIB = 1024


def shares(rate: float = 0, peer_rate: float = 0) -> Shares[str]:
    return Shares(rate=rate, peer_rate=peer_rate, now=0)


def carried(it: Shares[str], flows: list[tuple[PeerId, str]], turn: int, until: float) -> Counter[str]:
    """What each flow moves if all are greedy and a turn takes no time but what the rates make it wait."""
    moved: Counter[str] = Counter()
    peer_of = {flow: peer for peer, flow in flows}
    now = 0.0
    for peer, flow in flows:
        it.wait(peer, flow, 0, now)
    while now < until:
        for flow in it.turns(now):
            moved[flow] += turn
            it.wait(peer_of[flow], flow, turn, now)
        now = max(now, it.deadline(now))
    return moved


def test_without_a_rate_everybody_has_a_turn_at_once_one_flow_of_each() -> None:
    it = shares()
    for peer, flow in ((A, "a1"), (A, "a2"), (A, "a3"), (B, "b1")):
        it.wait(peer, flow, 10**9, 0)
    assert it.deadline(0) == 0
    assert it.turns(0) == ["a1", "b1"]
    assert it.turns(0) == ["a2"]
    assert it.turns(0) == ["a3"]
    assert it.turns(0) == []
    assert it.deadline(0) == INFINITY


def test_a_rate_is_kept_and_shared_by_peer_not_by_flow() -> None:
    flows = [(A, f"a{n}") for n in range(9)] + [(B, "b")]
    moved = carried(shares(rate=100 * KIB), flows, KIB, until=60)
    assert abs(sum(moved.values()) - 100 * KIB * (60 + BURST)) <= 10 * KIB
    assert abs(moved["b"] - sum(moved.values()) / 2) <= 2 * KIB


def test_a_peer_has_its_own_rate_and_what_it_leaves_is_the_others() -> None:
    moved = carried(shares(rate=100 * KIB, peer_rate=80 * KIB), [(A, "a")], KIB, until=60)
    assert abs(moved["a"] - 80 * KIB * (60 + BURST)) <= 2 * KIB
    moved = carried(shares(peer_rate=10 * KIB), [(A, "a"), (B, "b")], KIB, until=60)
    assert abs(moved["a"] - 10 * KIB * (60 + BURST)) <= 2 * KIB
    assert abs(moved["b"] - moved["a"]) <= KIB


def test_what_was_not_used_is_not_saved_up() -> None:
    it = shares(rate=1000)
    it.wait(A, "a", 0, 1000)
    assert it.turns(1000) == ["a"]
    it.wait(A, "a", int(1000 * BURST) + 1000, 1000)
    assert it.turns(1000) == []
    assert 1001 <= it.deadline(1000) <= 1001.01


def test_whoever_leaves_gets_no_turn() -> None:
    it = shares()
    it.wait(A, "a1", 0, 0)
    it.wait(A, "a2", 0, 0)
    it.leave(A, "a1")
    it.leave(A, "never waited")
    it.leave(B, "never waited")
    assert it.turns(0) == ["a2"]
    it.wait(A, "a1", 0, 0)
    it.leave(A, "a1")
    assert it.turns(0) == []


def test_a_peer_cannot_leave_its_debt_behind() -> None:
    it = shares(peer_rate=1000)
    it.wait(A, "a", 10_000, 0)
    it.forget(A, 0)
    it.leave(A, "a")
    it.forget(A, 1)
    it.wait(A, "a", 0, 1)
    assert it.turns(1) == []
    it.leave(A, "a")
    it.forget(A, 60)
    it.wait(A, "a", 0, 60)
    assert it.turns(60) == ["a"]


def test_who_left_in_debt_is_forgotten_once_it_would_have_been_paid() -> None:
    it = shares(peer_rate=100)
    for number in range(50):
        peer = PeerId(f"debtor {number}")
        it.wait(peer, "flow", 1000, number)
        it.leave(peer, "flow")
        it.forget(peer, number)
    assert 0 < len(it._buckets) < 15
    it.forget(A, 100)
    assert it._buckets == {}


@given(
    st.floats(0, 1e6).map(lambda rate: rate if rate >= 1 else 0),
    st.floats(0, 1e6).map(lambda rate: rate if rate >= 1 else 0),
    st.lists(st.tuples(st.sampled_from((A, B, C)), st.integers(0, 10**6), st.floats(0, 2)), max_size=30),
)
def test_asking_for_turns_moves_the_deadline_on(
    rate: float, peer_rate: float, steps: list[tuple[PeerId, int, float]]
) -> None:
    it = shares(rate, peer_rate)
    now, waiting = 0.0, 0
    for number, (peer, size, after) in enumerate(steps):
        now += after
        it.wait(peer, str(number), size, now)
        waiting += 1
        taken = it.turns(now)
        waiting -= len(taken)
        if not taken:
            assert it.deadline(now) > now
        assert (it.deadline(now) == INFINITY) == (waiting == 0)
    for _ in range(10 * len(steps)):
        if it.deadline(now) == INFINITY:
            break
        now = it.deadline(now)
        waiting -= len(it.turns(now))
    assert waiting == 0

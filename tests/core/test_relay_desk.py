"""What a relay grants, to whom, and who has to give way."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libmesh.core.relay_desk import Circuit, Granted, Refusal, RelayDesk, RelayLimits
from libmesh.peers import PeerId

A, B, C, D = (PeerId(name) for name in "ABCD")


def desk(**limits: Any) -> RelayDesk:
    return RelayDesk(RelayLimits(**limits))


def connect(it: RelayDesk, source: PeerId, target: PeerId, now: float = 0) -> Granted | Refusal:
    return it.ask(source, target, now) or it.grant(source, target)


def circuit(granted: Granted | Refusal) -> Circuit:
    assert isinstance(granted, Granted)
    return granted.circuit


def test_a_circuit_needs_a_reservation_of_the_target_and_none_of_the_source() -> None:
    it = desk()
    assert connect(it, A, B) is Refusal.NOT_REACHABLE
    assert it.reserve(B, 0) == 3600
    assert circuit(connect(it, A, B)) == Circuit(1, A, B)
    assert connect(it, B, A) is Refusal.NOT_REACHABLE
    assert connect(it, B, B) is Refusal.NOT_REACHABLE


def test_a_reservation_ends_in_time_or_with_the_connection_and_can_be_renewed() -> None:
    it = desk(reservation_time=100)
    it.reserve(B, 0)
    assert it.reserve(B, 90) == 190
    assert it.ask(A, B, 189) is None
    it.settle(A)
    assert it.ask(A, B, 190) is Refusal.NOT_REACHABLE
    it.reserve(B, 200)
    it.gone(B)
    it.gone(B)
    assert it.ask(A, B, 201) is Refusal.NOT_REACHABLE
    assert it.reservations == 0


def test_reservations_are_bounded_but_ended_ones_give_way_and_old_ones_are_renewed() -> None:
    it = desk(reservations=2, reservation_time=100)
    it.reserve(A, 0)
    it.reserve(B, 50)
    assert it.reserve(C, 60) is Refusal.FULL
    assert it.reserve(A, 60) == 160
    assert it.reserve(C, 150) == 250, "that of B has ended"
    assert it.reservations == 2


def test_circuits_between_the_same_two_are_things_of_their_own() -> None:
    it = desk()
    it.reserve(B, 0)
    one, two = circuit(connect(it, A, B)), circuit(connect(it, A, B))
    it.end(one)
    it.end(one)
    assert it.circuits == (two,)


def test_what_is_asked_for_and_not_answered_is_bounded() -> None:
    it = desk(pending_per_peer=2)
    it.reserve(B, 0)
    assert it.ask(A, B, 0) is None
    assert it.ask(A, B, 0) is None
    assert it.ask(A, B, 0) is Refusal.FULL
    assert it.ask(C, B, 0) is None
    it.settle(A)
    assert it.ask(A, B, 0) is None


def test_circuits_from_one_peer_and_to_one_peer_are_bounded() -> None:
    it = desk(circuits_per_peer=2)
    for peer in (B, C, D):
        it.reserve(peer, 0)
    first = circuit(connect(it, A, B))
    connect(it, A, C)
    assert connect(it, A, D) is Refusal.FULL
    it.end(first)
    connect(it, C, D)
    connect(it, B, D)
    assert connect(it, A, D) is Refusal.FULL


def test_when_all_are_taken_whoever_has_most_gives_up_the_newest_one() -> None:
    it = desk(circuits=4)
    it.reserve(D, 0)
    held = [circuit(connect(it, A, D)) for _ in range(4)]
    assert connect(it, A, D) is Refusal.FULL
    granted = connect(it, B, D)
    assert isinstance(granted, Granted)
    assert granted.evicted == held[3]
    assert isinstance(connect(it, B, D), Granted)
    assert connect(it, B, D) is Refusal.FULL, "both have two now"
    granted = connect(it, C, D)
    assert isinstance(granted, Granted)
    assert Counter(c.source for c in it.circuits)[C] == 1


def test_whoever_was_slower_is_refused_when_the_last_place_is_gone() -> None:
    it = desk(circuits=1)
    it.reserve(D, 0)
    assert it.ask(A, D, 0) is None
    assert it.ask(B, D, 0) is None
    assert isinstance(it.grant(A, D), Granted)
    assert it.grant(B, D) is Refusal.FULL
    assert it.ask(B, D, 0) is Refusal.FULL


@pytest.mark.parametrize(
    "wrong",
    [{"reservations": 0}, {"circuits": 0}, {"bandwidth": -1}, {"duration": -1}, {"reservation_time": 1}],
)
def test_limits_that_cannot_work_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RelayLimits(**wrong)


PEERS = st.sampled_from((A, B, C, D))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(PEERS, PEERS, st.sampled_from(("connect", "end", "reserve", "gone"))), max_size=60))
def test_the_books_are_right_whatever_happens(steps: list[tuple[PeerId, PeerId, str]]) -> None:
    it = desk(circuits=5, circuits_per_peer=4, reservations=3)
    standing: dict[int, Circuit] = {}
    for now, (one, other, what) in enumerate(steps):
        match what:
            case "connect":
                granted = connect(it, one, other, now)
                if isinstance(granted, Granted):
                    standing[granted.circuit.number] = granted.circuit
                    if granted.evicted is not None:
                        del standing[granted.evicted.number]
            case "end" if standing:
                it.end(standing.pop(min(standing)))
            case "reserve":
                it.reserve(one, now)
            case "gone":
                it.gone(one)
        assert it.circuits == tuple(standing.values())
        assert len(standing) <= 5
        assert it.reservations <= 3
        for counts in (
            Counter(c.source for c in standing.values()),
            Counter(c.target for c in standing.values()),
        ):
            assert max(counts.values(), default=0) <= 4

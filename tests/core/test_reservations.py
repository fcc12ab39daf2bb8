"""Places at relays, in virtual time: which relay is asked, exactly when, and what is held."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from libmesh.core.reservations import (
    MAX_RELAYS,
    Ask,
    Effect,
    Event,
    Failed,
    Held,
    Lost,
    ReservationConfig,
    Reservations,
    Reserved,
    SetRelays,
    Wake,
)
from libmesh.peers import PeerId

A, B, C, D = (PeerId(name) for name in "ABCD")
HOUR = 3600.0


class NoChance(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


def machine(config: ReservationConfig | None = None) -> Reservations:
    return Reservations(config, rng=NoChance())


def wake(it: Reservations) -> tuple[float, list[Effect]]:
    """Let the next deadline come."""
    at = it.deadline()
    assert at is not None
    return at, it.handle(Wake(), at)


def test_the_best_two_are_asked_at_once() -> None:
    it = machine()
    assert it.deadline() is None
    assert it.handle(SetRelays((A, B, C)), 0) == [Ask(A), Ask(B)]
    assert it.handle(Reserved(A, HOUR), 0.1) == [Held((A,))]
    assert it.handle(Reserved(B, HOUR), 0.2) == [Held((A, B))]
    assert it.held == (A, B)


def test_a_place_is_renewed_at_half_of_its_time_and_kept_meanwhile() -> None:
    it = machine()
    it.handle(SetRelays((A,)), 0)
    it.handle(Reserved(A, HOUR), 0)
    assert wake(it) == (HOUR / 2, [Ask(A)])
    assert it.handle(Reserved(A, HOUR), HOUR / 2) == []
    assert it.deadline() == HOUR


def test_a_place_whose_renewal_fails_is_good_until_its_end_and_asked_for_with_pauses() -> None:
    it = machine()
    it.handle(SetRelays((A,)), 0)
    it.handle(Reserved(A, 100), 0)
    asked: list[float] = []
    while True:
        at, effects = wake(it)
        if Held(()) in effects:
            break
        if effects:
            asked.append(at)
            it.handle(Failed(A), at)
    assert at == 100
    assert asked[:6] == [50, 50.5, 51.5, 53.5, 56.5, 59.5]  # doubling, then every 3 s
    assert len(asked) < 25


def test_a_lost_relay_is_replaced_at_once_and_tried_again_soon() -> None:
    it = machine()
    it.handle(SetRelays((A, B, C)), 0)
    it.handle(Reserved(A, HOUR), 0)
    it.handle(Reserved(B, HOUR), 0)
    assert it.handle(Lost(A), 10) == [Ask(C), Held((B,))]
    assert it.handle(Reserved(C, HOUR), 10.2) == [Held((B, C))]
    assert it.deadline() == HOUR / 2, "two are held, so the lost one can wait"


def test_the_only_relay_is_asked_again_every_few_seconds_until_it_is_back() -> None:
    it = machine()
    it.handle(SetRelays((A,)), 0)
    it.handle(Reserved(A, HOUR), 0)
    assert it.handle(Lost(A), 10) == [Held(())]
    asked: list[float] = []
    for _ in range(6):
        at, effects = wake(it)
        if effects:
            assert effects == [Ask(A)]
            asked.append(at)
            it.handle(Failed(A), at)
    assert asked == [10.5, 11.5, 13.5, 16.5, 19.5, 22.5]


def test_a_relay_that_takes_its_time_does_not_hold_up_the_others() -> None:
    it = machine()
    it.handle(SetRelays((A, B, C)), 0)
    it.handle(Reserved(A, HOUR), 0.1)
    assert wake(it) == (1.5, [Ask(C)])
    it.handle(Reserved(C, HOUR), 1.6)
    assert it.handle(Reserved(B, HOUR), 5) == [Held((A, B))], (
        "the late one was better, so the third is let go"
    )


def test_a_failure_moves_on_to_the_next_relay_at_once() -> None:
    it = machine()
    it.handle(SetRelays((A, B, C, D)), 0)
    assert it.handle(Failed(A), 0.1) == [Ask(C)]
    assert it.handle(Failed(B), 0.1) == [Ask(D)]
    it.handle(Failed(C), 0.2)
    it.handle(Failed(D), 0.2)
    at, effects = wake(it)
    assert (at, effects) == (0.6, [Ask(A), Ask(B)])


def test_a_failure_while_enough_is_held_waits_long() -> None:
    it = machine(ReservationConfig(wanted=1))
    it.handle(SetRelays((A, B)), 0)
    assert wake(it) == (1.5, [Ask(B)])
    it.handle(Reserved(B, HOUR), 1.6)
    for count in range(20):
        it.handle(Failed(A), 2 + count)
    assert it.handle(Lost(B), 30) == [Held(())], "the lost one waits for a moment, the failed one much longer"
    assert wake(it) == (30.5, [Ask(B)])


def test_a_relay_that_grants_and_drops_us_is_no_success() -> None:
    it = machine()
    it.handle(SetRelays((A,)), 0)
    now = 0.0
    pauses: list[float] = []
    for _ in range(4):
        it.handle(Reserved(A, HOUR), now)
        it.handle(Lost(A), now)
        at, effects = wake(it)
        assert effects == [Ask(A)]
        pauses.append(at - now)
        now = at
    assert pauses == [0.5, 1, 2, 3]


def test_a_short_place_does_not_make_us_ask_without_end() -> None:
    it = machine()
    it.handle(SetRelays((A,)), 0)
    it.handle(Reserved(A, 0.001), 0)
    assert it.deadline() == 10


def test_relays_that_are_not_known_any_more_are_let_go_and_not_heard() -> None:
    it = machine()
    it.handle(SetRelays((A, B)), 0)
    it.handle(Reserved(A, HOUR), 0)
    it.handle(Reserved(B, HOUR), 0)
    assert it.handle(SetRelays((B, C)), 1) == [Ask(C), Held((B,))]
    for late in (Reserved(A, HOUR), Failed(A), Lost(A)):
        it.handle(late, 2)
        assert A not in it.held
    assert it.handle(SetRelays(()), 3) == [Held(())]
    assert it.deadline() is None


def test_a_relay_in_two_places_counts_once_and_only_so_many_are_considered() -> None:
    it = machine(ReservationConfig(wanted=100))
    many = tuple(PeerId(f"r{n}") for n in range(MAX_RELAYS + 5))
    assert it.handle(SetRelays((A, A, *many)), 0) == [Ask(A), *(Ask(r) for r in many[: MAX_RELAYS - 1])]


def test_a_connection_lost_while_asking_is_told_by_the_answer() -> None:
    it = machine()
    it.handle(SetRelays((A,)), 0)
    assert it.handle(Lost(A), 0.1) == []
    assert it.handle(Failed(A), 0.1) == []
    assert it.deadline() == 0.6


RELAYS = st.sampled_from((A, B, C, D))
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(SetRelays, st.lists(RELAYS, max_size=4).map(tuple)),
    st.builds(Reserved, RELAYS, st.floats(-10, 4000)),
    st.builds(Failed, RELAYS),
    st.builds(Lost, RELAYS),
    st.just(Wake()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(EVENTS, st.floats(0, 30)), max_size=40), st.integers(0, 99))
def test_time_moves_on_and_nobody_is_asked_twice_at_once(steps: list[tuple[Event, float]], seed: int) -> None:
    it = Reservations(rng=random.Random(seed))
    now = 0.0
    asked_for: set[PeerId] = set()
    told: tuple[PeerId, ...] = ()
    for event, after in steps:
        now += after
        if isinstance(event, (Reserved, Failed)):
            if event.relay not in asked_for:
                continue
            asked_for.discard(event.relay)
        if isinstance(event, SetRelays):
            asked_for.clear()
            it.handle(SetRelays(()), now)
            told = ()
        for effect in it.handle(event, now):
            match effect:
                case Ask(relay):
                    assert relay not in asked_for
                    asked_for.add(relay)
                case Held(relays):
                    assert relays != told
                    told = relays
        assert it.held == told
        assert len(told) <= 2
        deadline = it.deadline()
        if isinstance(event, Wake) and deadline is not None:
            assert deadline > now

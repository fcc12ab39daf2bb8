"""Probes: in turn, through others, at once where there is doubt; and nobody is talked dead."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libmesh.core.liveness import (
    Answered,
    Doubt,
    Event,
    Heard,
    Liveness,
    LivenessConfig,
    Ping,
    PingThrough,
    Reach,
    Silent,
    Wake,
    Watch,
)
from libmesh.peers import PeerId

PEERS = [PeerId(f"peer{number}") for number in range(6)]
CONFIG = LivenessConfig(interval=1.0, timeout=0.5, indirect_timeout=0.8, helpers=2)


def machine(*watched: PeerId, doubted: tuple[PeerId, ...] = ()) -> Liveness:
    made = Liveness(CONFIG, rng=random.Random(7))
    made.handle(Watch(frozenset(watched), frozenset(doubted)), 0.0)
    return made


def wake(made: Liveness, until: float) -> list[tuple[float, object]]:
    """Everything that the machine does by itself up to `until`, with the times."""
    done: list[tuple[float, object]] = []
    while (deadline := made.deadline()) is not None and deadline <= until:
        done += [(deadline, effect) for effect in made.handle(Wake(), deadline)]
    return done


def test_nobody_is_probed_before_somebody_is_watched() -> None:
    assert Liveness(CONFIG, rng=random.Random(1)).deadline() is None


def test_each_peer_is_probed_once_in_each_round() -> None:
    made = machine(*PEERS)
    pings: list[PeerId] = []
    for _ in range(3 * len(PEERS)):
        for _, effect in wake(made, made.deadline() or 0):
            if isinstance(effect, Ping):
                pings.append(effect.peer)
                made.handle(Answered(effect.peer), 0.0)
    rounds = [pings[start : start + len(PEERS)] for start in range(0, len(pings), len(PEERS))]
    assert all(sorted(one) == sorted(PEERS) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def test_an_unanswered_ping_goes_through_others_and_then_the_peer_is_silent() -> None:
    made = machine(*PEERS)
    made.handle(Doubt(PEERS[0]), 10.0)
    story = [(time, e) for time, e in wake(made, 11.4) if getattr(e, "peer", None) == PEERS[0]]
    (asked, through), (silent, verdict) = story[:2]
    assert (asked, silent) == (10.5, 11.3)
    assert isinstance(through, PingThrough)
    assert len(through.helpers) == 2
    assert PEERS[0] not in through.helpers
    assert verdict == Silent(PEERS[0])


def test_an_answer_through_another_saves_a_peer() -> None:
    made = machine(*PEERS)
    made.handle(Doubt(PEERS[0]), 10.0)
    wake(made, 10.6)
    assert made.handle(Answered(PEERS[0]), 10.9) == [Heard(PEERS[0])]
    assert Silent(PEERS[0]) not in [effect for _, effect in wake(made, 11.4)]


def test_with_nobody_to_ask_a_peer_is_silent_at_once() -> None:
    made = machine(PEERS[0])
    made.handle(Doubt(PEERS[0]), 10.0)
    assert (10.5, Silent(PEERS[0])) in wake(made, 10.5)


def test_with_nobody_to_ask_a_silent_peer_is_reached_anew_at_each_unanswered_probe_until_it_answers() -> None:
    made = machine(PEERS[0], doubted=(PEERS[0],))
    reached = [time for time, effect in wake(made, 2.6) if effect == Reach(PEERS[0])]
    assert reached == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert made.handle(Answered(PEERS[0]), 2.7) == [Heard(PEERS[0])]
    assert Reach(PEERS[0]) not in [effect for _, effect in wake(made, 2.9)]


def test_who_others_can_be_asked_about_is_not_reached_anew() -> None:
    made = machine(*PEERS, doubted=(PEERS[0],))
    assert Reach(PEERS[0]) not in [effect for _, effect in wake(made, 5.0)]


def test_a_doubted_peer_is_probed_at_once_and_again_until_it_answers() -> None:
    made = machine(*PEERS)
    assert made.handle(Watch(frozenset(PEERS), frozenset({PEERS[1]})), 5.0) == [Ping(PEERS[1])]
    pings = [time for time, effect in wake(made, 9.0) if effect == Ping(PEERS[1])]
    assert pings[:2] == [pytest.approx(6.3), pytest.approx(7.6)]
    made.handle(Answered(PEERS[1]), 9.0)
    later = [e for _, e in wake(made, 9.9) if e in (Silent(PEERS[1]), Ping(PEERS[1]))]
    assert len(later) <= 1  # its turn in the round may come, nothing more


def test_a_doubted_peer_helps_nobody() -> None:
    made = machine(*PEERS, doubted=tuple(PEERS[2:]))
    made.handle(Doubt(PEERS[0]), 10.0)
    asked = [e for _, e in wake(made, 10.5) if isinstance(e, PingThrough) and e.peer == PEERS[0]]
    assert asked == [PingThrough(PEERS[0], (PEERS[1],))]


def test_hints_about_strangers_do_nothing() -> None:
    made = machine(PEERS[0])
    assert made.handle(Doubt(PEERS[5]), 1.0) == []
    assert made.handle(Answered(PEERS[5]), 1.0) == []


def test_a_second_doubt_does_not_start_a_second_probe() -> None:
    made = machine(*PEERS)
    assert made.handle(Doubt(PEERS[0]), 1.0) == [Ping(PEERS[0])]
    assert made.handle(Doubt(PEERS[0]), 1.1) == []


def test_who_is_no_longer_watched_is_forgotten() -> None:
    made = machine(*PEERS)
    made.handle(Doubt(PEERS[0]), 1.0)
    made.handle(Watch(frozenset(PEERS[1:])), 1.1)
    assert all(getattr(effect, "peer", None) != PEERS[0] for _, effect in wake(made, 20.0))


def test_who_cannot_be_asked_directly_is_asked_through_those_who_can() -> None:
    made = Liveness(CONFIG, rng=random.Random(7))
    made.handle(Watch(frozenset(PEERS), asked=frozenset(PEERS[1:3])), 0.0)
    (effect,) = made.handle(Doubt(PEERS[0]), 1.0)
    assert isinstance(effect, PingThrough)
    assert set(effect.helpers) == set(PEERS[1:3])
    assert (1.8, Silent(PEERS[0])) in wake(made, 1.8)


def test_with_nobody_to_ask_even_an_unreachable_peer_is_pinged() -> None:
    made = Liveness(CONFIG, rng=random.Random(7))
    made.handle(Watch(frozenset(PEERS[:1]), asked=frozenset()), 0.0)
    assert made.handle(Doubt(PEERS[0]), 1.0) == [Ping(PEERS[0])]


def test_only_those_near_a_peer_are_asked_about_it_and_only_those_with_such_take_turns() -> None:
    near = {PEERS[0]: (PEERS[1],), PEERS[1]: (PEERS[0], PEERS[5])}
    made = Liveness(CONFIG, rng=random.Random(7))
    made.handle(Watch(frozenset(PEERS[:4]), asked=frozenset(PEERS[:4]), nearby=near), 0.0)
    effects = [effect for _, effect in wake(made, 8.0)]
    assert {effect.peer for effect in effects if isinstance(effect, Ping)} == set(PEERS[:2])
    assert PingThrough(PEERS[0], (PEERS[1],)) in effects
    assert made.handle(Doubt(PEERS[3]), 9.0) == [Ping(PEERS[3])]
    assert (9.5, Silent(PEERS[3])) in wake(made, 9.5)


def test_without_anybody_to_take_turns_time_still_goes_on() -> None:
    made = Liveness(CONFIG, rng=random.Random(7))
    made.handle(Watch(frozenset(PEERS), nearby={}), 0.0)
    assert wake(made, 5.0) == []


def test_the_first_ward_has_every_other_turn_the_second_one_a_fourth_and_the_rest_what_remains() -> None:
    made = Liveness(CONFIG, rng=random.Random(7))
    made.handle(Watch(frozenset(PEERS), wards=(PEERS[4], PEERS[2], PEERS[0])), 0.0)
    pinged: list[PeerId] = []
    while len(pinged) < 24:
        for _, effect in wake(made, made.deadline() or 0):
            assert isinstance(effect, Ping)
            pinged.append(effect.peer)
            made.handle(Answered(effect.peer), 0.0)
    start = pinged.index(PEERS[2])
    turns = pinged[start : start + 20]
    assert [turns[place::4] for place in (0, 1, 3)] == [[PEERS[2]] * 5, [PEERS[4]] * 5, [PEERS[4]] * 5]
    assert set(pinged) == set(PEERS)


def test_who_is_not_watched_is_nobodys_ward() -> None:
    made = Liveness(CONFIG, rng=random.Random(7))
    made.handle(Watch(frozenset(PEERS[:2]), wards=(PEERS[4],)), 0.0)
    assert {e.peer for _, e in wake(made, 8.0) if isinstance(e, Ping)} == set(PEERS[:2])


@pytest.mark.parametrize("field", ["interval", "timeout", "indirect_timeout", "helpers"])
def test_times_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be (greater than 0|at least 1)"):
        LivenessConfig(**{field: 0})


peers = st.sampled_from(PEERS)
groups = st.frozensets(peers)
events = st.one_of(
    st.builds(Watch, groups, groups), st.builds(Doubt, peers), st.builds(Answered, peers), st.just(Wake())
)


@given(st.lists(st.tuples(events, st.floats(0, 3)), max_size=60), st.integers(0, 1000))
def test_waking_up_moves_the_deadline_forward_whatever_happens(
    script: list[tuple[Event, float]], seed: int
) -> None:
    made, now = Liveness(CONFIG, rng=random.Random(seed)), 0.0
    for event, pause in script:
        now += pause
        made.handle(event, now)
        for effect in made.handle(Wake(), now):
            assert isinstance(effect, Ping | PingThrough | Reach | Silent | Heard)
        deadline = made.deadline()
        assert deadline is None or deadline > now

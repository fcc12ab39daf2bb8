"""Which way is tried when: scripts of (way, delay, outcome) under virtual time, with the exact time of each attempt."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libmesh.core.paths import MAX_REASONS, Paths
from libmesh.core.paths_io import (
    AddressesAre,
    Effect,
    Ended,
    Event,
    HereChanged,
    PathDoubted,
    PathIs,
    PathsConfig,
    Reached,
    Stop,
    Try,
    Unreachable,
    Unwanted,
    Wake,
    Wanted,
)
from libmesh.core.ways import PUNCH
from libmesh.peers import Attempt, PathKind
from tests.core.paths_world import CONFIG, HOME, ME, NEVER, THEM, A, B, C, R, S, World


def test_addresses_are_begun_one_stagger_apart() -> None:
    world = World({})
    world.want(A, B, C)
    world.run(1)
    assert world.tried == [(0, A), (0.2, B), (0.4, C)]


def test_a_failure_begins_the_next_address_at_once() -> None:
    world = World({A: (0.05, "refused"), B: (0.5, None)})
    world.want(A, B, C)
    world.run(10)
    assert world.tried == [(0, A), (0.05, B), (0.25, C)]
    assert world.told == [(0.55, Reached(THEM))]


def test_the_first_success_stops_the_others() -> None:
    world = World({A: (5, None), B: (0.03, None)})
    world.want(A, B, C)
    world.run(10)
    assert world.told == [(0.23, Reached(THEM))]
    assert (0.23, A) in world.stopped
    assert [way for _, way in world.tried] == [A, B]


def test_the_relay_is_asked_after_a_head_start() -> None:
    world = World({R: (0.4, None)})
    world.want(A, R)
    world.run(5)
    assert world.tried[:2] == [(0, A), (0.3, R)]
    assert world.told == [(0.7, Reached(THEM))]


@pytest.mark.parametrize(
    ("mine", "asked"), [(HOME.replace(".7/", ".8/"), CONFIG.near_start), ("/ip4/10.9.9.9/tcp/1", 0.0)]
)
def test_the_less_hope_there_is_for_a_direct_way_the_sooner_the_relay_is_asked(
    mine: str, asked: float
) -> None:
    world = World({HOME: (NEVER, None), R: (0.1, None)})
    world.tell(HereChanged((mine,)))
    world.want(HOME, R)
    world.run(1)
    assert world.tried[:2] == [(0.0, HOME), (asked, R)]


def test_the_relay_is_asked_at_once_when_no_direct_way_is_left() -> None:
    world = World({A: (0.01, "refused"), R: (0.4, None)})
    world.want(A, R)
    world.run(1)
    assert world.tried[:2] == [(0, A), (0.01, R)]
    alone = World({R: (0.4, None)})
    alone.want(R)
    assert alone.tried == [(0, R)]


def test_relays_are_staggered_too() -> None:
    world = World({R: (0.05, "no such peer"), S: (NEVER, None)})
    world.want(A, R, S)
    world.run(2)
    assert world.tried == [(0, A), (0.3, R), (0.35, S)]
    slow = World({})
    slow.want(A, R, S)
    slow.run(2)
    assert slow.tried == [(0, A), (0.3, R), (0.5, S)]


def test_a_direct_way_that_is_slow_still_replaces_the_relayed_path() -> None:
    world = World({A: (1.5, None), R: (0.1, None)})
    world.want(A, R)
    world.run(10)
    assert world.told == [(0.4, Reached(THEM))]
    assert world.kind is PathKind.DIRECT
    assert (1.5, PUNCH) not in world.tried
    assert world.machine.reasons(THEM) == ()
    assert world.machine.deadline() is None, "nothing is left to be done"


def test_the_side_that_dialled_leaves_the_punch_to_the_other() -> None:
    world = World({R: (0.1, None), PUNCH: (1, None)})
    world.want(R)
    world.run(60)
    assert world.tried == [(0, R), (2.1, PUNCH)]
    assert world.kind is PathKind.PUNCHED


def test_the_side_that_was_dialled_punches_and_dials_at_once() -> None:
    world = World({PUNCH: (0.5, None)})
    world.tell(AddressesAre(THEM, (A,)))
    world.path(PathKind.RELAYED, inbound=True)
    world.tell(AddressesAre(THEM, (A,)))
    world.run(60)
    assert world.tried[0] == (0, PUNCH)
    assert world.kind is PathKind.PUNCHED


def test_a_relayed_path_keeps_trying_with_pauses_that_grow() -> None:
    world = World({R: (0.1, None), A: (0.2, "no route"), PUNCH: (0.3, "symmetric")})
    world.want(A, R)
    world.run(3600)
    starts = [at for at, way in world.tried if way == A]
    pauses = [after - before for before, after in pairwise(starts[1:])]
    for number, pause in enumerate(pauses):
        about = min(5 * 2 ** (number + 1), 300) + 0.3
        assert 0.74 * about <= pause <= 1.27 * about
    assert len(starts) < 25
    assert world.kind is PathKind.RELAYED


def test_the_pauses_of_two_nodes_differ() -> None:
    deadlines = set()
    for seed in range(5):
        world = World({R: (0.1, None), PUNCH: (0.3, "symmetric")}, seed=seed)
        world.want(R)
        world.run(4)
        deadlines.add(world.machine.deadline())
    assert len(deadlines) == 5


def relayed_for_long() -> World:
    world = World({R: (0.1, None), A: (0.2, "no route"), PUNCH: (0.3, "symmetric")})
    world.want(A, R)
    world.run(1000)
    world.tried.clear()
    return world


@pytest.mark.parametrize("hint", [AddressesAre(THEM, (B, R)), HereChanged((HOME,))])
def test_a_hint_begins_a_round_at_once_and_shortens_the_pauses(hint: Event) -> None:
    world = relayed_for_long()
    world.script[B] = (0.2, "no route")
    world.tell(hint)
    direct = B if isinstance(hint, AddressesAre) else A
    assert sorted(world.tried) == sorted([(1000, direct), (1000, PUNCH)])
    world.run(1010)
    assert [at for at, way in world.tried if way == PUNCH][1] < 1007


def test_hints_cannot_hurry_rounds_beyond_the_gap() -> None:
    world = relayed_for_long()
    for step in range(100):
        world.now = 1000 + step / 100
        world.tell(HereChanged((f"/ip4/10.0.0.{step}/tcp/1",)))
    world.run(1000.999)
    assert [way for _, way in world.tried].count(PUNCH) == 1
    world.run(1001.5)
    assert [way for _, way in world.tried].count(PUNCH) == 2


def test_hints_without_a_relayed_path_change_nothing() -> None:
    world = World({A: (0.1, None)})
    world.tell(HereChanged((HOME,)))
    world.tell(AddressesAre(THEM, (B,)))
    world.want(A)
    world.run(1)
    world.tell(HereChanged((HOME,)))
    world.tell(AddressesAre(THEM, (B,)))
    world.tell(AddressesAre(THEM, (B,)))
    world.run(100)
    assert world.tried == [(0, A)]


def test_when_every_way_failed_the_reasons_are_told_in_order() -> None:
    world = World({A: (0.3, "refused"), B: (0.05, "no route"), R: (0.1, "no such peer")})
    world.want(A, B, R)
    world.run(10)
    attempts = tuple(
        Attempt(way=way, reason=reason)
        for way, reason in ((B, "no route"), (A, "refused"), (R, "no such peer"))
    )
    assert world.told == [(0.4, Unreachable(THEM, attempts))]
    assert world.machine.reasons(THEM) == ()


def test_a_peer_without_addresses_is_unreachable_at_once() -> None:
    world = World({})
    world.want()
    assert world.told == [(0, Unreachable(THEM, ()))]
    assert world.machine.deadline() is None


def test_reasons_are_kept_while_the_path_is_relayed() -> None:
    world = World({R: (0.1, None), A: (0.2, "no route"), PUNCH: (0.3, "symmetric")})
    world.want(A, R)
    world.run(4)
    assert world.machine.reasons(THEM) == (
        Attempt(way=A, reason="no route"),
        Attempt(way=PUNCH, reason="symmetric"),
    )
    world.path(PathKind.DIRECT)
    assert world.machine.reasons(THEM) == ()


def test_of_a_punched_path_is_told_why_it_is_not_direct() -> None:
    world = World({R: (0.1, None), A: (0.2, "no route"), PUNCH: (0.3, "symmetric")})
    world.want(A, R)
    world.run(4)
    world.path(PathKind.PUNCHED)
    assert world.machine.reasons(THEM) == (Attempt(way=A, reason="no route"),)
    world.path(PathKind.DIRECT)
    assert world.machine.reasons(THEM) == ()


def test_reasons_are_kept_until_a_further_round_has_others() -> None:
    world = World({R: (0.1, None), A: (0.2, "no route"), PUNCH: (3, "symmetric"), B: (0.1, "refused")})

    def reasons() -> dict[str, str]:
        return {attempt.way: attempt.reason for attempt in world.machine.reasons(THEM)}

    world.want(A, R)
    world.run(6)
    assert reasons() == {A: "no route", PUNCH: "symmetric"}
    world.tell(AddressesAre(THEM, (B, R)))
    assert reasons() == {A: "no route", PUNCH: "symmetric"}
    world.run(7)
    assert world.tried[-2:] == [(6, B), (6, PUNCH)]
    assert reasons() == {A: "no route", PUNCH: "symmetric", B: "refused"}
    world.run(9.5)
    assert reasons() == {B: "refused", PUNCH: "symmetric"}


def test_what_nobody_waits_for_any_more_is_stopped() -> None:
    world = World({})
    world.want(A, B)
    world.run(0.25)
    world.tell(Unwanted(THEM))
    assert world.stopped == [(0.25, A), (0.25, B)]
    world.run(100)
    assert world.machine.deadline() is None
    assert world.told == []
    world.tell(Unwanted(THEM))


def test_upgrades_go_on_when_nobody_waits() -> None:
    world = World({R: (0.1, None), A: (1, None)})
    world.want(A, R)
    world.run(0.5)
    world.tell(Unwanted(THEM))
    world.run(5)
    assert world.kind is PathKind.DIRECT


def test_wanting_a_connected_peer_is_answered_at_once() -> None:
    world = World({A: (0.1, None)})
    world.want(A)
    world.run(1)
    world.told.clear()
    world.want(A)
    assert world.told == [(1, Reached(THEM))]


def test_wanting_twice_tries_once() -> None:
    world = World({})
    world.want(A, B)
    world.want()
    world.want(A, B)
    world.run(1)
    assert world.tried == [(0, A), (0.2, B)]


def test_a_lost_path_ends_the_attempts_to_better_it() -> None:
    world = World({R: (0.1, None)})
    world.want(A, R)
    world.run(1)
    world.path(None)
    assert (1, A) in world.stopped
    assert world.machine.deadline() is None
    world.path(None)


def test_a_search_survives_a_connection_that_came_and_went() -> None:
    world = World({B: (0.5, None)})
    world.want(A, B)
    world.tell(PathIs(THEM, None, inbound=False))
    world.run(2)
    assert world.told == [(0.7, Reached(THEM))]


def test_from_direct_down_to_relayed_the_way_up_is_sought_again() -> None:
    world = World({A: (0.1, None), PUNCH: (0.3, "symmetric")})
    world.want(A)
    world.run(100)
    world.script[A] = (0.1, "no route")
    world.path(PathKind.RELAYED)
    world.run(103)
    assert [(at, way) for at, way in world.tried if at >= 100] == [(100, A), (102, PUNCH)]


def test_the_end_of_an_attempt_that_was_stopped_is_ignored() -> None:
    world = World({})
    world.tell(Ended(THEM, A, "late"))
    world.want(A)
    world.tell(Ended(THEM, B, "never begun"))
    assert world.told == []


def test_only_so_many_reasons_are_kept() -> None:
    direct = [f"/ip4/8.8.{number}.8/tcp/1" for number in range(MAX_REASONS)]
    world = World(dict.fromkeys([*direct, PUNCH], (0.01, "no route")))
    world.tell(PathIs(THEM, PathKind.RELAYED, inbound=False))
    world.tell(AddressesAre(THEM, tuple(direct)))
    world.run(5)
    reasons = world.machine.reasons(THEM)
    assert len(reasons) == MAX_REASONS
    assert direct[0] not in [attempt.way for attempt in reasons]


@pytest.mark.parametrize(
    "wrong", [{"stagger": 0}, {"head_start": -1}, {"retry_max": float("inf")}, {"retry_min": 400}]
)
def test_times_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PathsConfig(**wrong)


WAYS = st.sampled_from([A, B, C, R, S, HOME, PUNCH])
EVENTS = st.one_of(
    st.builds(Wanted, st.just(THEM), st.lists(WAYS, max_size=5).map(tuple)),
    st.builds(Unwanted, st.just(THEM)),
    st.builds(Ended, st.just(THEM), WAYS, st.sampled_from([None, "refused"])),
    st.builds(PathIs, st.just(THEM), st.sampled_from([None, *PathKind]), st.booleans()),
    st.builds(PathDoubted, st.just(THEM), st.lists(WAYS, max_size=5).map(tuple)),
    st.builds(AddressesAre, st.just(THEM), st.lists(WAYS, max_size=5).map(tuple)),
    st.builds(HereChanged, st.lists(WAYS, max_size=2).map(tuple)),
    st.builds(Wake),
)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.floats(0, 20), EVENTS), max_size=40))
def test_any_events_in_any_order_keep_the_rules(script: list[tuple[float, Event]]) -> None:
    """One attempt at a way at a time, only running ones stopped, every want answered or given up, deadlines ahead."""
    machine = Paths(ME, CONFIG, rng=random.Random(0))
    running: set[str] = set()
    wanted, now = False, 0.0

    def take(effects: list[Effect]) -> None:
        nonlocal wanted
        for effect in effects:
            match effect:
                case Try(_, way):
                    assert way not in running
                    running.add(way)
                case Stop(_, way):
                    running.remove(way)
                case Reached() | Unreachable():
                    wanted = False

    for pause, event in script:
        now += pause
        while (deadline := machine.deadline()) is not None and deadline <= now:
            take(machine.handle(Wake(), deadline))
            after = machine.deadline()
            assert after is None or after > deadline
        match event:
            case Wanted():
                wanted = True
            case Unwanted():
                wanted = False
            case Ended(_, way, _):
                running.discard(way)
        take(machine.handle(event, now))
        if wanted:
            assert running or machine.deadline() is not None, "whoever waits is not forgotten"

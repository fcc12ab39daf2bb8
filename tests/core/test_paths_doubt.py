"""A path that is silent without having ended: what is tried beside it, and for how long."""

from __future__ import annotations

from libmesh.core.paths_io import HereChanged, PathDoubted
from libmesh.core.ways import PUNCH
from libmesh.peers import PathKind
from tests.core.paths_world import HOME, NEVER, THEM, A, R, S, Script, World


def doubtful(script: Script, kind: PathKind = PathKind.DIRECT, *addresses: str) -> World:
    """A path of this kind that has just fallen silent, at 10."""
    world = World(script)
    world.path(kind)
    world.run(10)
    world.tried.clear()
    world.stopped.clear()
    world.tell(PathDoubted(THEM, addresses))
    return world


def test_beside_a_silent_path_all_ways_are_tried_at_once() -> None:
    world = doubtful({A: (0.5, None), R: (0.1, "full")}, PathKind.DIRECT, A, R)
    world.run(60)
    assert world.tried == [(10, A), (10, R)]
    assert world.kind is PathKind.DIRECT
    assert world.machine.deadline() is None


def test_a_circuit_takes_the_place_of_a_silent_direct_path_while_direct_ways_are_tried_on() -> None:
    world = doubtful({R: (0.1, None), PUNCH: (0.5, "no luck"), A: (1.0, None)}, PathKind.DIRECT, A, R)
    world.kind = None  # to the network, which has the silent path last
    world.run(10.5)
    assert world.kind is PathKind.RELAYED
    assert (10.1, A) not in world.stopped
    world.run(20)
    assert world.kind is PathKind.DIRECT


def test_a_sign_of_life_ends_the_search_beside_a_silent_path() -> None:
    world = doubtful({}, PathKind.DIRECT, A, R)
    world.run(11)
    world.path(PathKind.DIRECT)
    assert world.stopped == [(11, A), (11, R)]
    assert world.machine.deadline() is None


def test_the_search_beside_a_silent_path_goes_on_until_that_has_ended() -> None:
    world = doubtful({A: (0.1, "refused")}, PathKind.DIRECT, A)
    world.tell(PathDoubted(THEM, (A,)))
    world.run(12)
    assert world.tried == [(10, A), (11.1, A)]
    world.path(None)
    world.run(60)
    assert len(world.tried) == 2
    assert world.machine.deadline() is None


def test_attempts_beside_a_silent_path_begin_anew_in_another_network() -> None:
    world = doubtful({}, PathKind.DIRECT, A)
    world.run(12)
    world.tell(HereChanged((HOME,)))
    assert world.stopped == [(12, A)]
    assert world.tried == [(10, A), (12, A)]


def test_a_silent_relayed_path_is_replaced_by_a_circuit_through_another_relay() -> None:
    world = doubtful({R: (NEVER, None), S: (0.1, None)}, PathKind.RELAYED, R, S)
    world.kind = None
    world.run(10.5)
    assert world.tried[:2] == [(10, R), (10.2, S)]
    assert (10.3, R) in world.stopped
    assert world.kind is PathKind.RELAYED


def test_nobody_is_sought_who_has_no_path_to_doubt() -> None:
    world = World({})
    world.tell(PathDoubted(THEM, (A,)))
    assert not world.tried

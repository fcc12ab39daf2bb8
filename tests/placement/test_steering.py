from __future__ import annotations

from dataclasses import replace

import pytest
from libmesh_node.placement.electing import elect
from libmesh_node.placement.splitting import Placement, Shortage
from libmesh_node.placement.steering import Abandon, Adopt, Broken, Looked, Steering, SteeringConfig

from tests.placement.machines import machine, shape

CONFIG = SteeringConfig(margin=0.2, patience=30, settle=1)


def placement(host: str, speed: float = 10.0) -> Placement:
    worker = "b" if host != "b" else "a"
    machines = [machine(host, 24, bandwidth=1e12), machine(worker, 24)]
    best = elect(shape(), machines)
    assert isinstance(best, Placement)
    return replace(best, tokens_per_second=speed)


SHORT = Shortage(needed=44, have=1, peers=0)


def running() -> Steering:
    steering = Steering(CONFIG)
    assert steering.handle(Looked(placement("a"), None), 0.0) == []
    assert steering.deadline() == 1.0
    assert steering.handle(Looked(placement("a"), None), 1.0) == [Adopt(placement("a"))]
    assert steering.deadline() is None
    return steering


def test_the_first_placement_must_be_the_same_for_a_moment() -> None:
    steering = Steering(CONFIG)
    steering.handle(Looked(placement("a"), None), 0.0)
    assert steering.handle(Looked(placement("c"), None), 0.9) == []
    assert steering.handle(Looked(placement("c"), None), 1.8) == []
    assert steering.handle(Looked(placement("c"), None), 1.9) == [Adopt(placement("c"))]


def test_an_irrelevant_joiner_changes_nothing() -> None:
    steering = running()
    for second in range(100):
        assert steering.handle(Looked(placement("a"), 10.0), float(second)) == []
    assert steering.deadline() is None


@pytest.mark.parametrize(("speed", "after"), [(11.9, None), (12.1, 40.0)])
def test_better_must_be_better_by_a_margin_for_a_while(speed: float, after: float | None) -> None:
    steering = running()
    better = placement("c", speed)
    assert steering.handle(Looked(better, 10.0), 10.0) == []
    assert steering.deadline() == after
    assert steering.handle(Looked(better, 10.0), 39.9) == []
    assert steering.handle(Looked(better, 10.0), 40.0) == ([Adopt(better)] if after else [])


def test_better_only_now_and_then_is_not_better() -> None:
    steering = running()
    for second in range(0, 200, 20):
        assert steering.handle(Looked(placement("c", 20), 10.0), float(second)) == []
        assert steering.handle(Looked(placement("a"), 10.0), second + 10.0) == []


def test_better_ones_that_take_turns_are_better_all_the_same() -> None:
    """The one that is the best when the time has come, and stays so for a moment."""
    steering = running()
    for second in range(0, 40, 2):
        best = placement("c" if second % 4 else "d", 20)
        assert steering.handle(Looked(best, 10.0), second + 0.5) == []
        assert steering.handle(Looked(best, 10.0), second + 1.4) == []
        assert steering.deadline() == max(30.5, second + 1.5)
        if second >= 30:
            assert steering.handle(Looked(best, 10.0), second + 1.5) == [Adopt(best)]
            return


def test_a_broken_placement_is_replaced_at_once() -> None:
    assert running().handle(Looked(placement("c"), None), 5.0) == [Adopt(placement("c"))]


def test_what_runs_goes_on_when_nobody_else_could() -> None:
    assert running().handle(Looked(SHORT, 10.0), 5.0) == []


def test_what_may_go_on_is_not_ended_for_nothing() -> None:
    steering = running()
    assert steering.handle(Looked(SHORT, None, lives=True), 5.0) == []
    assert steering.handle(Looked(placement("c"), None, lives=True), 6.0) == [Adopt(placement("c"))]


def test_when_nothing_is_left_it_is_said_what_is_missing() -> None:
    assert running().handle(Looked(SHORT, None), 5.0) == [Abandon(str(SHORT))]


def test_after_an_end_it_begins_anew() -> None:
    steering = running()
    steering.handle(Broken(), 5.0)
    assert steering.handle(Looked(placement("a"), None), 5.0) == []
    assert steering.handle(Looked(placement("a"), None), 6.0) == [Adopt(placement("a"))]

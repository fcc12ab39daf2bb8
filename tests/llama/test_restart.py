from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.llama.restart import Ended, GiveUp, Launch, Ready, RestartConfig, RestartPolicy, Wake

END = Ended("it broke")


def test_pause_doubles_with_each_failure_up_to_the_longest() -> None:
    policy = RestartPolicy(RestartConfig(first_delay=1, max_delay=3, failures=10, window=1000))
    pauses, now = [], 0.0
    for _ in range(4):
        assert policy.handle(END, now) == []
        due = policy.deadline()
        assert due is not None
        pauses.append(due - now)
        assert policy.handle(Wake(), due - 0.001) == []
        assert policy.handle(Wake(), due) == [Launch()]
        assert policy.deadline() is None
        now = due
    assert pauses == [1, 2, 3, 3]


def test_five_failures_in_the_window_are_a_crash_loop() -> None:
    policy = RestartPolicy()
    for now in range(4):
        assert policy.handle(END, now) == []
        policy.handle(Wake(), now + 0.9)
    (verdict,) = policy.handle(END, 100)
    assert verdict == GiveUp("it failed 5 times in 100 s; the last time it broke")


def test_failures_further_apart_than_the_window_go_on_for_ever() -> None:
    policy = RestartPolicy(RestartConfig(failures=2, window=10))
    for now in range(0, 1000, 11):
        assert policy.handle(END, now) == []


def test_long_health_forgets_failures_and_short_health_does_not() -> None:
    config = RestartConfig(failures=2, window=1000, healthy_after=60)
    for health, gives_up in ((59, True), (60, False)):
        policy = RestartPolicy(config)
        policy.handle(END, 0)
        policy.handle(Ready(), 10)
        assert bool(policy.handle(END, 10 + health)) is gives_up


def test_lost_port_is_replaced_at_once_but_not_for_ever() -> None:
    policy = RestartPolicy(RestartConfig(failures=3))
    lost = Ended("port", port_taken=True)
    assert policy.handle(lost, 0) == [Launch()]
    assert policy.handle(lost, 0) == [Launch()]
    assert isinstance(policy.handle(lost, 0)[0], GiveUp)


def test_nothing_happens_after_the_verdict() -> None:
    policy = RestartPolicy(RestartConfig(failures=1))
    assert isinstance(policy.handle(END, 0)[0], GiveUp)
    for event in (END, Ready(), Wake()):
        assert policy.handle(event, 1000) == []
    assert policy.deadline() is None


@pytest.mark.parametrize("wrong", [{"first_delay": 0}, {"first_delay": 31}, {"failures": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RestartConfig(**wrong)  # type: ignore[arg-type]


@given(
    st.lists(
        st.tuples(st.sampled_from([END, Ended("p", port_taken=True), Ready(), Wake()]), st.floats(0, 100))
    )
)
def test_deadline_is_near_and_waking_moves_it(events: list[tuple[Ended | Ready | Wake, float]]) -> None:
    policy, now = RestartPolicy(), 0.0
    for event, passed in events:
        now += passed
        effects = policy.handle(event, now)
        assert len(effects) <= 1
        due = policy.deadline()
        assert due is None or not effects
        if due is not None:
            assert due - now <= 30
            if isinstance(event, Wake):
                assert due > now

"""Timers: whatever is set and unset, the next one is the earliest of those that are set."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from libmesh.core.timers import INFINITY, Timers

KEYS = st.sampled_from("abcdefgh")
TIMES = st.one_of(st.floats(0, 20), st.just(INFINITY))


@given(st.lists(st.one_of(st.tuples(KEYS, TIMES), st.floats(0, 20)), max_size=300))
def test_the_heap_answers_as_a_plain_search_would(script: list[tuple[str, float] | float]) -> None:
    timers: Timers[str] = Timers()
    plain: dict[str, float] = {}
    for step in script:
        if isinstance(step, tuple):
            timers.set(*step)
            plain[step[0]] = step[1]
        else:
            due = sorted((time, key) for key, time in plain.items() if time <= step)
            assert timers.pop_due(step) == [key for _, key in due]
            plain |= {key: INFINITY for _, key in due}
        assert timers.next() == min(plain.values(), default=INFINITY)


def test_alarms_that_are_put_off_again_and_again_do_not_pile_up() -> None:
    timers: Timers[str] = Timers()
    for time in range(10_000):
        timers.set("a", float(time))
    assert len(timers._heap) < 100
    assert timers.pop_due(9_999) == ["a"]
    assert timers.next() == INFINITY

"""What is being answered while a better placement comes, in virtual time: finished first, by whomever it is answered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing
from libmesh_node import split_host

from tests.placement.hosting import LOAD, Machine, world
from tests.placement.machines import GB
from tests.placement.test_churn import TURN, bettered, settled


class Busy:
    """Whether servers answer requests: those for which `says` holds."""

    def __init__(self) -> None:
        self.says: Callable[[object], bool] = lambda server: False

    async def __call__(self, server: object) -> bool:
        return self.says(server)


@pytest.fixture(autouse=True)
def busy(monkeypatch: pytest.MonkeyPatch) -> Busy:
    asked = Busy()
    monkeypatch.setattr(split_host, "_is_busy", asked)
    return asked


async def test_a_host_finishes_what_it_answers_before_its_split_ends_for_a_better_one(
    autojump_clock: trio.testing.MockClock, busy: Busy
) -> None:
    async with world(force=False) as place:
        run = await bettered(place)
        idle_at = trio.current_time() + TURN
        busy.says = lambda _: trio.current_time() < idle_at
        await trio.sleep(TURN - 1)
        assert place.serving == [run]
        await settled(place)
        assert place.serving[0].placement.members == ("c", "a")
    assert (place.launched, place.most) == (2, 1)
    assert place.outages == [pytest.approx(LOAD + 1.05, abs=0.5)]


async def test_a_host_that_always_has_something_to_do_keeps_its_split(
    autojump_clock: trio.testing.MockClock, busy: Busy
) -> None:
    """When it is idle after all, the better one comes."""
    async with world(force=False) as place:
        run = await bettered(place)
        busy.says = lambda _: True
        await trio.sleep(5 * split_host.DRAIN_LIMIT)
        assert place.serving == [run]
        busy.says = lambda _: False
        await trio.sleep(3 * TURN)
        assert place.serving[0].placement.members == ("c", "a")
    assert (place.launched, place.most, len(place.outages)) == (2, 1, 1)


async def test_a_host_keeps_its_split_when_the_better_worker_leaves_before_it_is_idle(
    autojump_clock: trio.testing.MockClock, busy: Busy
) -> None:
    async with world(force=False) as place:
        run = await bettered(place)
        busy.says = lambda _: True
        await trio.sleep(TURN)
        place.leave("c")
        busy.says = lambda _: False
        await trio.sleep(5 * TURN)
        assert place.serving == [run]
    assert (place.launched, place.outages) == (1, [])


async def test_nothing_is_waited_for_when_a_member_has_fallen_silent(
    autojump_clock: trio.testing.MockClock, busy: Busy
) -> None:
    """Its host's server waits for it, and passes for busy."""
    async with world(force=False) as place:
        place.join("a", Machine(25, bandwidth=1000))
        place.join("b", Machine(25))
        await settled(place)
        place.join("c", Machine(25, rtt=0.05))
        await trio.sleep(TURN)
        assert place.serving[0].placement.members == ("b", "a")
        busy.says = lambda _: True
        place.nodes.pop("b").life.cancel()
        place.news()
        await trio.sleep(LOAD + 5)
        assert place.serving[0].placement.members == ("c", "a")
    assert place.most == 1


async def test_no_split_ends_for_a_worker_whose_memory_others_have(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It is announced as free. The worker refuses, and what runs goes on; it is asked again now and then."""
    async with world(force=True) as place:
        place.join("a", Machine(60, bandwidth=1000, rtt=0.001))
        place.join("b", Machine(40))
        await settled(place)
        (run,) = place.serving
        assert run.placement.members == ("b", "a")
        place.lent["c"] = 30
        place.join("c", Machine(40, bandwidth=500, rtt=0.001))
        for _ in range(20):
            await trio.sleep(TURN)
        assert place.serving == [run]
        assert 2 < place.launched < 50
        place.lent.clear()
        await trio.sleep(3 * TURN)
        assert place.serving[0].placement.members == ("c", "a")
    assert place.outages == []


async def test_a_split_that_another_host_takes_over_finishes_what_it_answers(
    autojump_clock: trio.testing.MockClock, busy: Busy
) -> None:
    """It takes nothing new meanwhile."""
    async with world(force=True) as place:
        place.join("a", Machine(100))
        place.join("b", Machine(100))
        await settled(place)
        (old,) = place.serving
        busy.says = lambda server: server is old.server
        place.join("c", Machine(100, bandwidth=1000, rtt=0.0005))
        await trio.sleep(TURN)
        assert {run.placement.host for run in place.serving} == {old.placement.host, "c"}
        assert place.nodes[old.placement.host].entry.base_url is None
        busy.says = lambda _: False
        await settled(place)
        assert place.serving[0].placement.host == "c"
        assert [node.entry.split_bytes > 0 for node in place.nodes.values()] == [False, False, True]
    assert place.outages == []


async def test_what_was_ended_for_another_host_is_said_to_come(
    autojump_clock: trio.testing.MockClock, busy: Busy
) -> None:
    """So that requests wait for it. Not any more when it has been taken back."""
    async with world(force=False) as place:
        place.join("a", Machine(25))
        place.join("b", Machine(25))
        await settled(place)
        place.idle.add("c")
        place.join("c", Machine(25, bandwidth=1000, rtt=0.001))
        while place.serving:  # noqa: ASYNC110 - the clock is virtual
            await trio.sleep(0.5)
        for _ in range(10):
            await trio.sleep(split_host.HEIR_LIMIT / 20)
            assert [node.entry.coming for node in place.nodes.values()].count(True) == 1
        await settled(place)
        assert not any(node.entry.coming or node.entry.left for node in place.nodes.values())


LONG = 55
"""Heads with which a cache of 65,536 tokens takes 20 GB."""


async def test_a_long_context_leaves_room_for_the_split_that_replaces_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Of a machine of which half is enough, the other half."""
    async with world(force=True, heads=LONG) as place:
        place.join("a", Machine(60))
        place.join("b", Machine(60))
        await settled(place)
        assert min(place.serving[0].taken.values()) > 29 * GB
        place.join("c", Machine(60, bandwidth=1000, rtt=0.0005))
        await settled(place)
        assert place.serving[0].placement.host == "c"
    assert (place.launched, place.outages, place.crowded) == (2, [], set())


async def test_where_the_running_split_has_all_memory_it_ends_for_the_better_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Of the worker the better one wants so little that there would be room beside what the running one must have."""
    async with world(force=True, heads=LONG) as place:
        place.join("a", Machine(30))
        place.join("b", Machine(30))
        await settled(place)
        assert max(place.serving[0].taken.values()) > 29 * GB
        place.join("c", Machine(400, bandwidth=1000, rtt=0.0005))
        await trio.sleep(2 * TURN)
        await settled(place)
        (run,) = place.serving
        assert run.placement.host == "c"
        assert run.placement.workers[0].granted < 10 * GB
    assert place.outages == [pytest.approx(LOAD, abs=3)]
    assert place.crowded == set()


async def test_who_works_for_a_split_and_is_to_host_it_waits_until_that_has_ended(
    autojump_clock: trio.testing.MockClock, busy: Busy
) -> None:
    """Its memory works for the host that is busy."""
    async with world(force=False, heads=LONG) as place:
        place.join("a", Machine(30, bandwidth=40))
        place.join("b", Machine(30))
        await settled(place)
        (run,) = place.serving
        assert run.placement.members == ("b", "a")
        busy.says = lambda _: True
        place.nodes["b"].machine.bandwidth = 2000
        place.join("c", Machine(30, bandwidth=3000, rtt=0.0005))
        place.nodes["b"].machine.rtt = 0.0005
        place.news()
        await trio.sleep(5 * TURN)
        assert place.serving == [run]
        assert place.launched == 1
        busy.says = lambda _: False
        await trio.sleep(3 * TURN)
        assert set(place.serving[0].placement.members) == {"b", "c"}
    assert place.crowded == set()
    assert place.outages == [pytest.approx(LOAD, abs=3)]


@pytest.mark.parametrize("there", [True, False], ids=["another host's", "its own"])
async def test_a_replaced_split_goes_on_when_what_replaced_it_ends_before(
    autojump_clock: trio.testing.MockClock, busy: Busy, there: bool
) -> None:
    """It is finishing answers, with the memory that would be needed anew."""
    async with world(force=True) as place:
        place.join("a", Machine(100, bandwidth=40))
        place.join("b", Machine(100))
        await settled(place)
        (old,) = place.serving
        busy.says = lambda server: server is old.server
        faster = Machine(100, bandwidth=1000, rtt=0.0005) if there else Machine(100, bandwidth=39, rtt=0.0001)
        place.nodes["a"].machine.rtt = 0.002 if there else 0.0001
        place.join("c", faster)
        await trio.sleep(TURN)
        assert len(place.serving) == 2
        assert place.nodes["a"].entry.base_url == (None if there else "http://127.0.0.1:1")
        place.leave("c") if there else place.lose_worker("c")
        await trio.sleep(1)
        assert place.serving == [old]
        assert place.nodes["a"].entry.base_url is not None
        assert place.nodes["a"].entry.workers == ("b",)
        if not there:
            place.leave("c")
        await trio.sleep(2 * split_host.DRAIN_LIMIT)
        assert place.serving == [old]
    assert (place.launched, place.outages) == (2, [])

"""Peers that come and go while a model is served over several, in virtual time: no needless change, no needless outage."""

from __future__ import annotations

from itertools import pairwise

import pytest
import trio
import trio.testing
from libmesh_node import split_host
from libmesh_node.placement import heirs
from libmesh_node.split_run import SplitFailed

from tests.placement.hosting import LOAD, Machine, Run, World, world

TURN = 60.0  # longer than a better placement must be better, and its load


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def idle(_server: object) -> bool:
        return False

    monkeypatch.setattr(split_host, "_is_busy", idle)


async def settled(place: World) -> None:
    await trio.sleep(TURN)
    assert len(place.runs) == len(place.serving) == 1


async def test_who_is_not_needed_changes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """Neither by coming nor by going."""
    async with world(force=False) as place:
        place.join("a", Machine(24))
        place.join("b", Machine(24))
        await settled(place)
        (run,) = place.serving
        for number in range(10):
            place.join(f"c{number}", Machine(24, rtt=0.05))
            await settled(place)
        for number in range(10):
            place.leave(f"c{number}")
            await settled(place)
        assert place.serving == [run]
    assert (place.launched, place.most, place.outages) == (1, 1, [])


async def test_ten_better_ones_take_over_without_an_outage(autojump_clock: trio.testing.MockClock) -> None:
    """Each is faster and nearer, and memory allows both: the new one answers before the old one ends."""
    async with world(force=True) as place:
        place.join("a", Machine(100))
        place.join("b", Machine(100))
        await settled(place)
        speeds = [place.serving[0].placement.tokens_per_second]
        for number in range(10):
            place.join(f"c{number}", Machine(100, 40 * 2**number, 0.0016 * 0.8**number))
            await settled(place)
            speeds.append(place.serving[0].placement.tokens_per_second)
    assert place.outages == []
    assert place.most == 2
    assert speeds[-1] > 10 * speeds[0]
    assert all(later > sooner for sooner, later in pairwise(speeds))


async def test_after_each_of_ten_leaves_the_rest_serve_again(autojump_clock: trio.testing.MockClock) -> None:
    """Who had a part is gone with it: for as long as a load takes nothing answers. Never are there two for longer."""
    async with world(force=True) as place:
        for number in range(12):
            place.join(f"c{number}", Machine(100, bandwidth=20 + number))
        await settled(place)
        for left in range(10):
            members = place.serving[0].placement.members
            place.leave(members[left % 2])
            await settled(place)
            assert members[left % 2] not in place.serving[0].placement.members
    assert len(place.outages) == 10
    assert max(place.outages) <= LOAD + 2.5
    assert place.most <= 2


async def bettered(place: World) -> Run:
    """The running split of a host that has a better worker in view now, and no memory for a part in both."""
    place.join("a", Machine(25, bandwidth=1000))
    place.join("b", Machine(25))
    await settled(place)
    (run,) = place.serving
    assert run.placement.members == ("b", "a")
    place.join("c", Machine(25, bandwidth=500, rtt=0.001))
    place.nodes["a"].machine.rtt = 0.001
    place.news()
    return run


async def test_where_memory_does_not_allow_both_the_old_one_makes_room(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The host has room for its part in one placement only: for as long as a load takes nothing answers."""
    async with world(force=False) as place:
        await bettered(place)
        await settled(place)
        assert place.serving[0].placement.members == ("c", "a")
    assert (place.launched, place.most) == (2, 1)
    assert place.outages == [pytest.approx(LOAD + 1.05, abs=0.2)]


async def scarce(place: World) -> Run:
    """Two nodes whose memory one split takes, and its run."""
    place.join("a", Machine(25))
    place.join("b", Machine(25))
    await settled(place)
    return place.serving[0]


async def test_where_memory_does_not_allow_both_another_host_is_made_room_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The worker's memory is taken by the split that works; the better one comes when that has ended."""
    async with world(force=False) as place:
        await scarce(place)
        place.join("c", Machine(25, bandwidth=1000, rtt=0.001))
        for _ in range(10):
            await trio.sleep(TURN)
        await settled(place)
        (run,) = place.serving
        assert run.placement.host == "c"
    assert place.most == 1
    assert place.outages == [pytest.approx(LOAD, abs=3)]


async def test_room_is_made_when_the_server_has_nothing_to_do(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is answering is finished first."""
    busy_until = 2 * TURN + 40

    async def busy(_server: object) -> bool:
        return trio.current_time() < busy_until

    async with world(force=False) as place:
        monkeypatch.setattr(split_host, "_is_busy", busy)
        run = await scarce(place)
        place.join("c", Machine(25, bandwidth=1000, rtt=0.001))
        await trio.sleep(busy_until - trio.current_time())
        assert place.serving == [run]
        await settled(place)
        assert place.serving[0].placement.host == "c"


async def test_a_server_that_always_has_something_to_do_is_not_ended_for_a_better_one(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes new requests while it waits to be idle. When it is idle after all, room is made."""
    busy = True

    async def is_busy(_server: object) -> bool:
        return busy

    async with world(force=False) as place:
        monkeypatch.setattr(split_host, "_is_busy", is_busy)
        run = await scarce(place)
        place.join("c", Machine(25, bandwidth=1000, rtt=0.001))
        await trio.sleep(5 * split_host.DRAIN_LIMIT)
        assert place.serving == [run]
        busy = False
        await trio.sleep(3 * TURN)
        assert place.serving[0].placement.host == "c"
    assert place.most == 1
    assert place.outages == [pytest.approx(LOAD, abs=3)]


async def test_room_is_made_for_nobody_who_is_not_elected_any_more(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left while the server here finished its work."""

    async def busy(_server: object) -> bool:
        return trio.current_time() < 3 * TURN

    async with world(force=False) as place:
        monkeypatch.setattr(split_host, "_is_busy", busy)
        run = await scarce(place)
        place.join("c", Machine(25, bandwidth=1000, rtt=0.001))
        await trio.sleep(TURN)
        place.leave("c")
        await trio.sleep(5 * TURN)
        assert place.serving == [run]
    assert place.outages == []


async def test_what_was_ended_for_somebody_who_does_not_come_is_taken_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """And not ended for that one again."""
    async with world(force=False) as place:
        await scarce(place)
        place.idle.add("c")
        place.join("c", Machine(25, bandwidth=1000, rtt=0.001))
        for _ in range(20):
            await trio.sleep(TURN)
        await settled(place)
        assert "c" not in place.serving[0].placement.members
    assert place.outages == [pytest.approx(split_host.HEIR_LIMIT + LOAD, abs=4)]


async def test_nothing_is_left_again_to_a_host_that_cannot_load(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It says that it loads, fails, and offers no memory for a while; then it is what everybody elects again."""
    async with world(force=False) as place:
        await scarce(place)
        place.broken.add("c")
        place.join("c", Machine(25, bandwidth=1000, rtt=0.001))
        await trio.sleep(3 * split_host.UNABLE_FOR)
        (run,) = place.serving
        assert "c" not in run.placement.members
    assert len(place.outages) == 1


async def test_what_was_ended_for_somebody_who_dies_then_is_taken_back_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with world(force=False) as place:
        await scarce(place)
        place.idle.add("c")
        place.join("c", Machine(25, bandwidth=1000, rtt=0.001))
        while place.serving:  # noqa: ASYNC110 - the clock is virtual
            await trio.sleep(0.5)
        await trio.sleep(2)
        place.leave("c")
        await settled(place)
    assert place.outages == [pytest.approx(LOAD + 3, abs=1)]


async def test_who_did_not_take_over_is_tried_again_when_it_has_been_restarted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Once. If that fails, too, its restarts change nothing for as long as it is passed over."""
    async with world(force=False) as place:
        await scarce(place)
        place.idle.add("c")
        for incarnation, tries in enumerate((1, 2, 2)):
            place.join("c", Machine(25, bandwidth=1000, rtt=0.001)).incarnation += incarnation
            for _ in range(10):
                await trio.sleep(TURN)
            assert len(place.outages) == tries
            place.leave("c")
            await trio.sleep(TURN)
        await trio.sleep(heirs.NO_HEIR_FOR)
        place.idle.clear()
        place.join("c", Machine(25, bandwidth=1000, rtt=0.001))
        await trio.sleep(2 * TURN)
        assert place.serving[0].placement.host == "c"


async def test_who_did_not_take_over_may_be_a_worker(autojump_clock: trio.testing.MockClock) -> None:
    """The other one leaves, and without it there is nothing to serve with. The others still wait for it to host."""
    async with world(force=False) as place:
        await scarce(place)
        place.idle.add("c")
        place.join("c", Machine(25, bandwidth=1000, rtt=0.001))
        for _ in range(5):
            await trio.sleep(TURN)
        assert place.serving[0].placement.members == ("b", "a")
        place.leave("b")
        await settled(place)
        assert place.serving[0].placement.members == ("c", "a")
    assert place.outages[1] <= LOAD + 2.5


async def test_who_did_not_take_over_serves_once_it_does_so_by_itself(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """With room for both it needs nobody's leave: it answers, and the one here ends."""
    async with world(force=False) as place:
        await scarce(place)
        place.broken.add("c")
        place.join("c", Machine(25, bandwidth=1000, rtt=0.001))
        for _ in range(5):
            await trio.sleep(TURN)
        place.broken.clear()
        for node in place.nodes.values():
            node.machine.memory = 60
        for _ in range(10):
            await trio.sleep(TURN)
        assert [run.placement.host for run in place.serving] == ["c"]
    assert len(place.outages) == 1


async def test_a_host_that_cannot_load_leaves_it_to_others(autojump_clock: trio.testing.MockClock) -> None:
    """It is what everybody elects; when it works again, it is elected again."""
    async with world(force=False) as place:
        place.broken.add("a")
        place.join("a", Machine(25, bandwidth=1000))
        place.join("b", Machine(25))
        place.join("c", Machine(25))
        await trio.sleep(TURN)
        (run,) = place.serving
        assert "a" not in run.placement.members
        place.broken.clear()
        await trio.sleep(2 * split_host.UNABLE_FOR)
        assert place.nodes["a"].status().spare_bytes > 0
        assert len(place.serving) == 1


async def test_a_host_that_lost_a_worker_takes_another_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Only the host knows of the loss: all others still want it to be the host, with that very worker."""
    async with world(force=False) as place:
        place.join("a", Machine(25))
        place.join("b", Machine(25))
        place.join("c", Machine(25, bandwidth=21))
        await settled(place)
        assert place.serving[0].placement.members == ("a", "c")
        place.lose_worker("a")
        await settled(place)
        assert place.serving[0].placement.members == ("b", "c")
    assert place.outages == [pytest.approx(LOAD + 1.05, abs=0.2)]


async def test_the_only_worker_is_asked_again_soon(autojump_clock: trio.testing.MockClock) -> None:
    """Its rpc-server died, its node lives. Later each time, if that goes on."""
    async with world(force=False) as place:
        place.join("a", Machine(25))
        place.join("b", Machine(25))
        await settled(place)
        for _ in range(4):
            place.lose_worker("b")
            await trio.sleep(split_host.REFUSED_FOR + 2 * LOAD)
            assert len(place.runs) == len(place.serving) == 1
    assert place.outages[0] <= LOAD + 5.2
    assert place.outages == sorted(place.outages)
    assert place.outages[-1] <= LOAD + 10


async def test_a_server_that_dies_again_and_again_is_back_within_ten_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Each time it had answered. One that never does is tried more and more seldom."""
    async with world(force=False) as place:
        place.join("a", Machine(25))
        place.join("b", Machine(25))
        await settled(place)
        for _ in range(8):
            place.serving[0].why = SplitFailed("it was killed")
            place.serving[0].lost.set()
            await trio.sleep(4 * LOAD)
            assert len(place.runs) == len(place.serving) == 1
    assert len(place.outages) == 8
    assert max(place.outages) <= LOAD + 5

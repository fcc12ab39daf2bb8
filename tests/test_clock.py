"""A machine that sleeps: the date has gone on when it wakes, and nobody died of that."""

from __future__ import annotations

import time

import pytest
import trio
import trio.testing

from libmesh import PeerState, Scope, clock
from libmesh.clock import Clock, seconds_asleep
from libmesh.core.membership_io import PeerSilent, Slept, Wake
from libmesh.core.membership_io import RecordHeard as Heard
from tests.members import NOW, membership, peer, record
from tests.town import Town, state, town, until


class Machine:
    """Sleeps when it is told to."""

    def __init__(self) -> None:
        self.slept = 5000.0

    def asleep(self) -> float:
        return self.slept


async def test_the_date_goes_on_while_the_machine_sleeps(autojump_clock: trio.testing.MockClock) -> None:
    machine = Machine()
    ours = Clock(lambda: NOW + trio.current_time(), machine.asleep)
    start = ours.now()
    await trio.sleep(10)
    assert (ours.woke(), ours.now() - start) == (0.0, 10)
    machine.slept += 3600
    assert ours.now() - start == 10, "not before anybody could be told of it"
    assert ours.woke() == 3600
    assert (ours.woke(), ours.now() - start) == (0.0, 3610)


async def test_what_lies_between_two_readings_is_no_sleep() -> None:
    machine = Machine()
    ours = Clock(time.time, machine.asleep)
    for _ in range(100):
        machine.slept += 0.005
        assert ours.woke() == 0.0
    machine.slept += 1
    assert ours.woke() == pytest.approx(1.5)


def test_a_machine_that_is_awake_does_not_sleep() -> None:
    assert abs(seconds_asleep() - seconds_asleep()) < clock.SLEPT


def test_where_the_system_does_not_tell_nobody_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    assert seconds_asleep() == 0.0


def test_a_suspect_has_as_much_time_left_after_a_sleep_as_before_it() -> None:
    machine = membership(1)
    machine.handle(Heard(record(2), gossiped=False), NOW)
    machine.handle(PeerSilent(peer(2)), NOW)
    later = NOW + 3600.0
    machine.handle(Slept(3600.0), later)
    machine.handle(Wake(), later)
    assert machine.state_of(peer(2)) is PeerState.SUSPECT
    assert (machine.deadline() or 0) > later
    machine.handle(Wake(), later + machine.config.alone + 1)
    assert machine.state_of(peer(2)) is PeerState.DEAD


async def asleep_for(place: Town, machine: Machine, seconds: float) -> None:
    """All connections of node 2 are lost in its sleep."""
    machine.slept += seconds
    for other in (1, 3):
        place.hub.cut(place.networks[2].peer, place.networks[other].peer)
    await trio.sleep(0.1)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """All of a mesh in one process sleep together."""
    sleeper = Machine()
    monkeypatch.setattr(Clock.__init__, "__defaults__", (sleeper.asleep,))
    return sleeper


async def test_who_wakes_takes_nobody_for_dead(
    autojump_clock: trio.testing.MockClock, machine: Machine
) -> None:
    async with town() as place:
        first, sleeper, third = await place.of(3)
        await trio.sleep(5)
        dead: list[object] = []
        for _ in range(3):
            await asleep_for(place, machine, 8 * 3600)
            for _ in range(100):
                await trio.sleep(0.1)
                dead += [
                    e
                    for mesh in (first, sleeper, third)
                    for e in mesh.view.peers
                    if e.state is PeerState.DEAD
                ]
        assert dead == []


async def test_membership_that_ended_in_the_sleep_has_ended(
    autojump_clock: trio.testing.MockClock, machine: Machine
) -> None:
    async with town() as place:
        founder = await place.found()
        guest = await place.join(2, founder.invite(scope=Scope.CLIENT, not_after_unix=NOW + 3600))
        await until(lambda: state(founder, guest) is PeerState.ALIVE)
        machine.slept += 2 * 3600
        await until(lambda: state(founder, guest) is PeerState.DEAD, limit=10)


async def test_whoever_only_follows_is_cut_off_when_its_membership_ended_in_the_sleep(
    autojump_clock: trio.testing.MockClock, machine: Machine
) -> None:
    async with town() as place:
        founder = await place.found()
        token = founder.invite(scope=Scope.CLIENT, not_after_unix=NOW + 3600)
        await place._open(2, invite=token, follow=True)
        await until(lambda: len(founder.view.followers) == 1)
        machine.slept += 2 * 3600
        await until(lambda: founder.view.followers == (), limit=60)

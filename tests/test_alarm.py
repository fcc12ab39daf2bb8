"""When an alarm goes off, in virtual time."""

from __future__ import annotations

import trio
import trio.testing

from libmesh.alarm import Alarm


async def test_it_goes_off_at_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    until = trio.current_time() + 7
    await Alarm().due(lambda: until)
    assert trio.current_time() == until


async def test_a_deadline_that_moves_is_kept_in_either_direction(
    autojump_clock: trio.testing.MockClock,
) -> None:
    start, alarm = trio.current_time(), Alarm()
    at: float | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alarm.due, lambda: at)
        for moment, moved in ((1.0, start + 50), (2.0, start + 9), (3.0, start + 20)):
            await trio.sleep_until(start + moment)
            at = moved
            alarm.moved()
    assert trio.current_time() == start + 20


async def test_a_deadline_that_has_passed_is_due_and_still_a_checkpoint(
    autojump_clock: trio.testing.MockClock,
) -> None:
    alarm = Alarm()
    with trio.testing.assert_checkpoints():
        await alarm.due(lambda: -5.0)


async def test_the_clock_may_be_another(autojump_clock: trio.testing.MockClock) -> None:
    start = trio.current_time()
    await Alarm().due(lambda: 103.0, lambda: 100.0 + trio.current_time() - start)
    assert trio.current_time() == start + 3

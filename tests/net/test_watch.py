"""A change of the network is noticed: by the kernel's word, by looking, and by a clock that jumped."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from libmesh.net import watch


async def test_where_the_kernel_does_not_tell_interfaces_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    answers = [["11.0.1.2"], ["11.0.1.2"], ["11.0.1.3"]]
    times: list[float] = []
    monkeypatch.setattr(
        "libmesh.net.watch.tcp.interface_hosts", lambda: answers.pop(0) if len(answers) > 1 else answers[0]
    )
    start = trio.current_time()
    with trio.move_on_after(10 * watch.LOOK_EVERY):
        await watch._watch_interfaces(lambda: times.append(trio.current_time() - start))
    assert times == [2 * watch.LOOK_EVERY]


@pytest.mark.parametrize(("jump", "told"), [(3600.0, 1), (1.0, 0), (-3600.0, 0)])
async def test_a_clock_that_went_on_while_we_stood_still_means_sleep(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, jump: float, told: int
) -> None:
    calls: list[None] = []
    ahead = iter([1000.0, *[1000.0 + jump] * 1000])
    monkeypatch.setattr("libmesh.net.watch.time.time", lambda: next(ahead))
    monkeypatch.setattr("libmesh.net.watch.time.monotonic", lambda: 0.0)
    with trio.move_on_after(5 * watch.CLOCK_EVERY):
        await watch._watch_clock(lambda: calls.append(None))
    assert len(calls) == told

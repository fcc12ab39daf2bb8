"""A worker that is there and does not answer, in virtual time."""

from __future__ import annotations

from typing import Any, cast

import trio
import trio.testing
from libmesh_node.llama.rpc.borrower import Borrowed
from libmesh_node.split_run import STALLED_AFTER, lost_or_silent


class Worker:
    """As far as it is watched."""

    def __init__(self) -> None:
        self.lost = trio.Event()
        self.waiting_since: float | None = None
        self.why = "its node left"


async def outcome(worker: Worker, script: Any) -> tuple[str, float]:
    """What is said in the end, and when."""
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(script, worker)
        words = await lost_or_silent(cast(Borrowed, worker))
        nursery.cancel_scope.cancel()
    return words, trio.current_time() - began


async def test_a_worker_that_owes_an_answer_for_long_is_given_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def falls_silent(worker: Worker) -> None:
        await trio.sleep(100)
        worker.waiting_since = trio.current_time()

    words, after = await outcome(Worker(), falls_silent)
    assert words == f"it has not answered for {STALLED_AFTER:g} s"
    assert 100 + STALLED_AFTER < after <= 100 + STALLED_AFTER * 1.1


async def test_a_worker_that_answers_in_the_end_is_kept_and_an_idle_one_too(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def is_slow(worker: Worker) -> None:
        for _ in range(20):
            worker.waiting_since = trio.current_time()
            await trio.sleep(STALLED_AFTER * 0.8)
            worker.waiting_since = None
        await trio.sleep(10 * STALLED_AFTER)
        worker.lost.set()

    words, after = await outcome(Worker(), is_slow)
    assert (words, after) == ("its node left", 26 * STALLED_AFTER)


async def test_a_worker_that_is_lost_is_told_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async def is_lost(worker: Worker) -> None:
        worker.waiting_since = trio.current_time()
        await trio.sleep(7)
        worker.lost.set()

    assert await outcome(Worker(), is_lost) == ("its node left", 7.0)

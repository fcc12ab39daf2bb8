"""Who waits, in what order, and what the refused are told. With a loop of its own each; nothing sleeps for long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from libmesh_node.http import queue
from libmesh_node.http.errors import ApiError
from libmesh_node.http.queue import PER_SLOT, Queues


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


class Server:
    """Room for some requests, and the order in which they came in."""

    def __init__(self, room: int) -> None:
        self.room, self.queues, self.order = room, Queues(), list[str]()

    async def ask(self, name: str, *, batch: bool = False, again: bool = False) -> None:
        await self.queues.turn("m", batch=batch, has_room=lambda: self.room > 0, slots=lambda: 1, again=again)
        self.room -= 1
        self.order.append(name)

    def leave(self, seconds: float = 2.0) -> None:
        self.room += 1
        self.queues.took("m", seconds)
        self.queues.nudge("m")


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_with_room_nobody_waits() -> None:
    async def test() -> None:
        server = Server(room=2)
        await server.ask("a")
        await server.ask("b")
        assert server.order == ["a", "b"]

    run(test)


def test_first_come_first_served_and_batches_after_all_others() -> None:
    async def test() -> None:
        server = Server(room=0)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.ask("batch", batch=True))
            tasks.create_task(server.ask("first"))
            tasks.create_task(server.ask("second"))
            await settle()
            assert server.queues.waiting("m") == 3
            for _ in range(3):
                server.leave()
                await settle()
        assert server.order == ["first", "second", "batch"]
        assert server.queues.waiting("m") == 0

    run(test)


def test_newcomer_does_not_pass_those_who_wait() -> None:
    async def test() -> None:
        server = Server(room=0)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.ask("first"))
            await settle()
            server.room += 1  # nobody was told yet
            tasks.create_task(server.ask("second"))
            await settle()
            server.leave()
        assert server.order == ["first", "second"]

    run(test)


def test_room_that_came_without_a_word_is_found() -> None:
    async def test() -> None:
        server = Server(room=0)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.ask("a"))
            await settle()
            server.room += 1
        assert server.order == ["a"]

    run(test)


def test_who_leaves_the_line_holds_up_nobody() -> None:
    async def test() -> None:
        server = Server(room=0)
        async with asyncio.TaskGroup() as tasks:
            gone = tasks.create_task(server.ask("gone"))
            tasks.create_task(server.ask("stays"))
            await settle()
            gone.cancel()
            await settle()
            server.leave()
        assert server.order == ["stays"]

    run(test)


def test_who_leaves_when_told_of_room_passes_the_word_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "LOOK", 1000.0)

    async def test() -> None:
        server = Server(room=0)
        async with asyncio.TaskGroup() as tasks:
            gone = tasks.create_task(server.ask("gone"))
            tasks.create_task(server.ask("stays"))
            await settle()
            server.leave()
            gone.cancel()
        assert server.order == ["stays"]

    run(test)


def test_request_whose_server_failed_waits_before_its_equals_and_is_never_refused() -> None:
    async def test() -> None:
        server = Server(room=0)
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(server.ask(str(index))) for index in range(PER_SLOT)]
            await settle()
            tasks.create_task(server.ask("again", again=True))
            await settle()
            assert server.queues.lengths == {"m": PER_SLOT + 1}
            server.leave()
            await settle()
            assert server.order == ["again"]
            for task in waiting:
                task.cancel()
        assert server.queues.lengths == {"m": 0}

    run(test)


def test_full_line_refuses_with_the_time_by_the_measured_rate() -> None:
    async def test() -> None:
        server = Server(room=0)
        for _ in range(40):
            server.queues.took("m", 2.0)
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(server.ask(str(index))) for index in range(PER_SLOT)]
            await settle()
            with pytest.raises(ApiError) as caught:
                await server.ask("too many")
            assert (caught.value.status, caught.value.code) == (429, "overloaded")
            assert caught.value.retry_after in range(2 * (PER_SLOT + 1), 2 * (PER_SLOT + 1) + 2)
            for task in waiting:
                task.cancel()
        assert server.order == []

    run(test)


def test_who_would_be_refused_anyway_is_refused_before_anything_is_known_of_its_request() -> None:
    async def test() -> None:
        server = Server(room=0)

        def check() -> None:
            server.queues.check("m", has_room=lambda: server.room > 0, slots=lambda: 1)

        async with asyncio.TaskGroup() as tasks:
            check()  # nobody waits
            waiting = [tasks.create_task(server.ask(str(index))) for index in range(PER_SLOT - 1)]
            await settle()
            check()  # there is one place left in line
            waiting.append(tasks.create_task(server.ask("last")))
            await settle()
            with pytest.raises(ApiError) as early:
                check()
            with pytest.raises(ApiError) as late:
                await server.ask("late")
            assert (early.value.status, early.value.retry_after) == (429, late.value.retry_after)
            server.room += 1  # whether one that goes before batches is let in is for `turn` to say
            check()
            for task in waiting:
                task.cancel()

    run(test)


def test_line_that_batches_have_filled_takes_interactive_requests_and_no_further_batch() -> None:
    async def test() -> None:
        server = Server(room=0)
        async with asyncio.TaskGroup() as tasks:
            batches = [tasks.create_task(server.ask(str(index), batch=True)) for index in range(PER_SLOT)]
            await settle()
            with pytest.raises(ApiError):
                await server.ask("batch too many", batch=True)
            server.queues.check("m", has_room=lambda: False, slots=lambda: 1)
            first = [tasks.create_task(server.ask(f"first {index}")) for index in range(PER_SLOT)]
            await settle()
            with pytest.raises(ApiError):
                await server.ask("too many")
            assert server.queues.lengths == {"m": 2 * PER_SLOT}
            for _ in range(PER_SLOT):
                server.leave()
                await settle()
            assert all(task.done() for task in first)
            for task in batches:
                task.cancel()

    run(test)

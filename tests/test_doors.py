"""Doors of exposed services: who is let through when, and what waits before them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from libmesh import expose, serve_tunnel, tunnel
from tests.test_tunnel import reset_is_seen, send, serve, tcp_echo, two_meshes


async def test_a_door_lets_peers_through_when_it_will_and_where_it_will() -> None:
    async with two_meshes() as (near, far, nursery):
        opened, inside = trio.Event(), list[str]()

        @asynccontextmanager
        async def door(peer: str) -> AsyncIterator[tuple[str, int] | None]:
            await opened.wait()
            inside.append(peer)
            yield "127.0.0.1", elsewhere
            inside.remove(peer)

        elsewhere = await serve(nursery, tcp_echo)
        await nursery.start(partial(expose, near, "tcp", "127.0.0.1", 9, door=door))
        port: int = await nursery.start(serve_tunnel, far, near.peer, "tcp")
        with trio.fail_after(60):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"knock")
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert not inside
                opened.set()
                assert await stream.receive_some() == b"knock"
                assert inside == [far.peer]
            while inside:  # noqa: ASYNC110 - it is left when the stream has ended
                await trio.sleep(0.01)


async def test_a_stream_that_says_nothing_waits_before_the_door_until_the_service_ends() -> None:
    async with two_meshes() as (near, far, nursery):
        entered = list[str]()

        @asynccontextmanager
        async def door(peer: str) -> AsyncIterator[tuple[str, int] | None]:
            entered.append(peer)
            yield None

        async def offer(*, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
            with trio.CancelScope() as scope:
                exposing = partial(expose, near, "tcp", "127.0.0.1", behind, door=door)
                async with trio.open_nursery() as inner:
                    await inner.start(exposing)
                    task_status.started(scope)

        behind = await serve(nursery, tcp_echo)
        scope: trio.CancelScope = await nursery.start(offer)
        port: int = await nursery.start(serve_tunnel, far, near.peer, "tcp")
        with trio.fail_after(60):
            silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not entered
            async with silent.pop() as first:
                await send(first, b"question" * 50_000)
                assert b"".join([data async for data in first]) == b"question" * 50_000
            assert entered == [far.peer]
            async with silent.pop() as hasty:  # leaves without a word
                await hasty.send_eof()
                await reset_is_seen(hasty)
            scope.cancel()
            async with silent.pop() as last:
                await reset_is_seen(last)
        assert len(entered) == 1


@pytest.mark.parametrize("by", ["reset", "disconnect", "end of file"])
async def test_whoever_has_gone_stands_in_line_no_more(by: str) -> None:
    async with two_meshes() as (near, far, nursery):
        waiting, opened = list[str](), trio.Event()

        @asynccontextmanager
        async def door(peer: str) -> AsyncIterator[tuple[str, int] | None]:
            waiting.append(peer)
            try:
                with trio.CancelScope():
                    await opened.wait()
                    yield None
            finally:
                waiting.remove(peer)

        behind = await serve(nursery, tcp_echo)
        await nursery.start(partial(expose, near, "tcp", "127.0.0.1", behind, door=door))
        stream = await far.open_service(near.peer, "tcp", wait=False)
        await stream.send_all(b"let me in")
        with trio.fail_after(60):
            await holds(lambda: waiting == [far.peer])
            if by == "end of file":  # only asks, and then listens
                await stream.send_eof()
                await trio.testing.wait_all_tasks_blocked(0.05)
                opened.set()
                assert b"".join([bytes(data) async for data in stream]) == b"let me in"
            elif by == "reset":
                stream.reset()
            else:
                await far._driver.network.disconnect(near.peer)
            await holds(lambda: not waiting)


async def holds(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - whoever is at a door tells nobody
        await trio.sleep(0.01)


async def test_a_stream_that_never_says_anything_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "IDLE_LIMIT", 0.05)

    @asynccontextmanager
    async def door(peer: str) -> AsyncIterator[tuple[str, int] | None]:
        raise AssertionError
        yield

    async with two_meshes() as (near, far, nursery):
        await nursery.start(partial(expose, near, "tcp", "127.0.0.1", 9, door=door))
        port: int = await nursery.start(serve_tunnel, far, near.peer, "tcp")
        with trio.fail_after(60):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await reset_is_seen(stream)

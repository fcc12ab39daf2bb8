"""One task that reads for many: whoever waits is served, woken, failed and forgotten by itself."""

from __future__ import annotations

import select

import pytest
import trio
import trio.testing

from libmesh.net.readable import MOST_AT_ONCE, Readable
from tests.net.pairs import socket_pair


class Reader:
    """Takes what comes, and goes on waiting until it has taken `last`."""

    def __init__(self, sock: trio.SocketStream, last: bytes = b".") -> None:
        self.sock, self.last = sock, last
        self.got: list[bytes] = []
        self.woken = 0
        self.readable = Readable(sock.socket.fileno())

    def pull(self) -> bool:
        self.got.append(self.sock.socket._sock.recv(100))  # type: ignore[attr-defined]
        return not self.got[-1].endswith(self.last)

    async def wait(self) -> None:
        await self.readable.wait(self.pull)
        self.woken += 1


async def test_what_can_be_dealt_with_at_once_wakes_nobody() -> None:
    near, far = await socket_pair()
    reader = Reader(near)
    async with near, far, trio.open_nursery() as nursery:
        nursery.start_soon(reader.wait)
        for piece in (b"one", b"two", b"three."):
            await trio.testing.wait_all_tasks_blocked()
            assert reader.woken == 0
            await far.send_all(piece)
        await trio.testing.wait_all_tasks_blocked()
        assert reader.woken == 1
        assert reader.got == [b"one", b"two", b"three."]


async def test_a_socket_that_nobody_waits_for_keeps_nobody_busy() -> None:
    near, far = await socket_pair()
    reader = Reader(near)
    async with near, far:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.wait)
            await far.send_all(b".")
        await far.send_all(b"more")
        await far.send_eof()
        await trio.testing.wait_all_tasks_blocked()  # would not return while somebody is told again and again
        assert reader.got == [b"."]
        assert await near.receive_some() == b"more"


async def test_the_end_of_a_socket_is_something() -> None:
    near, far = await socket_pair()
    reader = Reader(near, last=b"")
    async with near, far, trio.open_nursery() as nursery:
        nursery.start_soon(reader.wait)
        await trio.testing.wait_all_tasks_blocked()
        await far.send_eof()
    assert (reader.woken, reader.got) == (1, [b""])


async def test_a_failure_is_met_by_whoever_waits_and_by_nobody_else() -> None:
    near, far = await socket_pair()
    other_near, other_far = await socket_pair()
    other = Reader(other_near)

    def fail() -> bool:
        raise OSError("gone")

    async def wait() -> None:
        with pytest.raises(OSError, match="gone"):
            await Readable(near.socket.fileno()).wait(fail)

    async with near, far, other_near, other_far, trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(other.wait)
        await far.send_all(b"x")
        await trio.testing.wait_all_tasks_blocked()
        await other_far.send_all(b".")
    assert other.woken == 1


async def test_a_cancelled_wait_has_missed_nothing() -> None:
    near, far = await socket_pair()
    reader = Reader(near)
    async with near, far:
        for data in (b"one", b"two"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader.wait)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            await far.send_all(data)
        await far.send_all(b".")
        await reader.wait()
        assert b"".join(reader.got) == b"onetwo."


async def test_who_is_cancelled_when_something_comes_leaves_it_where_it_is() -> None:
    for _ in range(10):
        near, far = await socket_pair()
        reader = Reader(near)
        async with near, far:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader.wait)
                await trio.testing.wait_all_tasks_blocked()
                far.socket._sock.send(b"x")  # type: ignore[attr-defined]
                nursery.cancel_scope.cancel()
            assert reader.got == []
            assert await near.receive_some() == b"x"


async def test_all_are_served_however_many_have_something() -> None:
    pairs = [await socket_pair() for _ in range(MOST_AT_ONCE + 10)]
    readers = [Reader(near) for near, _ in pairs]
    async with trio.open_nursery() as nursery:
        for reader in readers:
            nursery.start_soon(reader.wait)
        await trio.testing.wait_all_tasks_blocked()
        for _, far in pairs:
            far.socket._sock.send(b".")  # type: ignore[attr-defined]
    assert all(reader.woken == 1 for reader in readers)
    for pair in pairs:
        for stream in pair:
            await stream.aclose()


async def test_without_epoll_each_task_waits_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll", raising=False)
    near, far = await socket_pair()
    reader = Reader(near)
    async with near, far, trio.open_nursery() as nursery:
        nursery.start_soon(reader.wait)
        await trio.testing.wait_all_tasks_blocked()
        assert reader.woken == 0
        await far.send_all(b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert reader.woken == 1
        assert await near.receive_some() == b"x"

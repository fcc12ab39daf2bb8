"""Thousands of tunnels in which nothing moves: what each keeps, counted, and that all is given back."""

from __future__ import annotations

import os
import resource

import pytest
import trio

from libmesh.net import splice as pumps
from libmesh.net.base import Stream
from libmesh.net.pipes import TAKE_BYTES, BufferPool
from libmesh.net.splice import splice
from tests.net.hosts import PROTOCOL, join, networks, until
from tests.net.pairs import socket_pair

TUNNELS = 2000
TASKS = 6
"""Of one tunnel, both its ends together: two pumps each, and whoever opened or serves it."""
DESCRIPTORS = 4
"""The same: a socket at each end, and the sockets of the test at the other side of them."""


class Counted(BufferPool):
    """Knows how many of its buffers are in use."""

    out = most = 0

    def take(self) -> bytearray:
        self.out += 1
        self.most = max(self.most, self.out)
        return super().take()

    def give(self, buffer: bytearray) -> None:
        self.out -= 1
        super().give(buffer)


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def possible() -> int:
    """How many tunnels the limit on descriptors allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS * TUNNELS + 500
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, wanted), hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(TUNNELS, (soft - 500) // DESCRIPTORS)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors are counted in /proc")
async def test_thousands_of_idle_tunnels_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Counted(TAKE_BYTES)
    monkeypatch.setattr(pumps, "_POOL", pool)
    count = possible()
    ends: list[tuple[trio.SocketStream, trio.SocketStream]] = []
    served: list[trio.SocketStream] = []

    async def serve(stream: Stream) -> None:
        near, far = await socket_pair()
        served.append(far)
        await splice(stream, near)

    with trio.fail_after(300):
        async with networks(2) as (one, two), trio.open_nursery() as nursery:
            two.set_handler(PROTOCOL, serve)
            await join(one, two)
            tasks_before, descriptors_before = tasks(), descriptors()
            for _ in range(count):
                client, entrance = await socket_pair()
                nursery.start_soon(splice, await one.open_stream(two.peer, PROTOCOL), entrance)
                await client.send_all(b"%04d" % len(ends))
                ends.append((client, entrance))
                if len(ends) % 50 == 0:
                    await until(lambda: len(served) == len(ends))
            await until(lambda: len(served) == count)
            servers = {int(await server.receive_some()): server for server in served}
            assert len(servers) == count
            assert tasks() - tasks_before <= TASKS * count + 10
            assert descriptors() - descriptors_before <= DESCRIPTORS * count + 10
            assert pool.out == 0
            assert pool.most <= 2  # however many there are, only those that move something use one

            await ends[count // 2][0].send_all(b"still there")
            assert await servers[count // 2].receive_some() == b"still there"

            for number, (client, _) in enumerate(ends):
                await client.aclose()
                await servers[number].aclose()
            await until(lambda: tasks() - tasks_before <= 10)
            await until(lambda: descriptors() - descriptors_before <= 10)

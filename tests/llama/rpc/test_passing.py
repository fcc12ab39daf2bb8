"""Results on their way to the next worker: at once where the stream takes them, in order, and never a piece of one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from libmesh_node.llama.rpc.frames import TICKET, FrameParser, Link, frame
from libmesh_node.llama.rpc.passing import MAX_WAITING, Passer

from libmesh import PeerId, Stream

TOKEN = bytes(16)
OPENING = frame(Link.PUSH_OPEN, TOKEN)


class Wire(Stream):
    """A stream that takes so many bytes at once, and the rest when it is let; it may break."""

    def __init__(self) -> None:
        self.peer, self.protocol = PeerId("next"), "test"
        self.room, self.broken, self.was_reset = 1 << 20, False, False
        self.taken = bytearray()
        self.open = trio.Event()
        self.open.set()

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        if self.broken:
            raise trio.BrokenResourceError
        sent = min(len(data), self.room)
        self.taken += data[:sent]
        return sent

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.open.wait()
        if self.broken:
            raise trio.BrokenResourceError
        self.taken += data

    async def wait_send_all_might_not_block(self) -> None: ...

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return b""

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...

    def reset(self) -> None:
        self.was_reset = True

    @property
    def tickets(self) -> list[int]:
        """Of the whole results that arrived; nothing else did."""
        parser = FrameParser(lambda *_: None, {})
        opening, *results = parser.feed(bytes(self.taken))
        assert not parser.midway
        assert opening == parser.feed(OPENING)[0]
        return [TICKET.unpack_from(result.payload)[0] for result in results]  # type: ignore[union-attr]


@asynccontextmanager
async def passing(*wires: Wire) -> AsyncIterator[Passer]:
    left = list(wires)

    async def opened() -> Stream:
        return left.pop(0)

    passer = Passer(opened, TOKEN)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(passer.run)
        await trio.testing.wait_all_tasks_blocked()
        yield passer
        nursery.cancel_scope.cancel()


async def test_a_result_leaves_in_the_call_that_brings_it() -> None:
    wire = Wire()
    async with passing(wire) as passer:
        for ticket in range(3):
            passer.put(ticket, bytes(100))
            assert wire.tickets == [*range(ticket + 1)]


@pytest.mark.parametrize("room", [0, 1, 50])
async def test_what_is_not_taken_at_once_follows_in_order(room: int) -> None:
    wire = Wire()
    async with passing(wire) as passer:
        wire.room, wire.open = room, trio.Event()
        for ticket in range(3):
            passer.put(ticket, bytes(100))
        await trio.testing.wait_all_tasks_blocked()
        wire.open.set()
        await trio.testing.wait_all_tasks_blocked()
        assert wire.tickets == [0, 1, 2]


async def test_a_stream_that_does_not_keep_up_costs_results_and_no_memory() -> None:
    wire = Wire()
    async with passing(wire) as passer:
        wire.room, wire.open = 7, trio.Event()
        for ticket in range(100):
            passer.put(ticket, bytes(100))
        wire.open.set()
        await trio.testing.wait_all_tasks_blocked()
        assert wire.tickets == [*range(1 + MAX_WAITING)]


@pytest.mark.parametrize("room", [0, 50])
async def test_after_a_break_another_stream_begins_with_a_whole_result(
    room: int, autojump_clock: trio.testing.MockClock
) -> None:
    first, second = Wire(), Wire()
    async with passing(first, second) as passer:
        first.room, first.broken = room, room == 0
        passer.put(1, bytes(100))
        first.broken = True
        await trio.sleep(1)
        assert first.was_reset
        passer.put(2, bytes(100))
        assert second.tickets == [2]

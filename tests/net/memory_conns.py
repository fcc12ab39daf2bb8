"""Two ends of a secure connection in memory, for virtual time: a cable that can be cut without either end being told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from libmesh.core.yamux_frames import Options
from libmesh.net.muxer import YamuxConnection
from tests.net.pairs import KEYS, peer_of

FULL = 16  # writes that may be under way


class MemoryConn:
    """One end. What is written after `cut` is taken, and arrives nowhere."""

    def __init__(self, is_initiator: bool) -> None:
        self.is_initiator = is_initiator
        self.cut = False
        self._arrived: trio.MemoryReceiveChannel[bytes]
        self._leaving: trio.MemorySendChannel[bytes]

    async def read(self, n: int | None = None) -> bytes:
        return await self._arrived.receive()

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if not self.cut:
            await self._leaving.send(data)

    async def close(self) -> None:
        if not self.cut:
            self._leaving.close()


def conn_pair() -> tuple[MemoryConn, MemoryConn]:
    near, far = MemoryConn(True), MemoryConn(False)
    near._leaving, far._arrived = trio.open_memory_channel[bytes](FULL)
    far._leaving, near._arrived = trio.open_memory_channel[bytes](FULL)
    return near, far


@asynccontextmanager
async def memory_muxed_pair(
    options: Options | None = None,
) -> AsyncIterator[tuple[YamuxConnection, YamuxConnection, tuple[MemoryConn, MemoryConn]]]:
    """Two running muxers and the ends of the cable between them; the first one dialled."""
    conns: Any = conn_pair()
    a = YamuxConnection(conns[0], peer_of(KEYS[1]), options)
    b = YamuxConnection(conns[1], peer_of(KEYS[0]), options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.start)
        nursery.start_soon(b.start)
        await a.event_started.wait()
        await b.event_started.wait()
        yield a, b, conns
        nursery.cancel_scope.cancel()

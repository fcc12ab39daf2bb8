"""What waits to be sent to one side of a session, in order.

Several tasks put into it, one sends. What the other side takes at once is sent in the very call, which spares a turn of
the scheduler: a fifth of the time that a small message takes. Messages that leave together leave as one: each record
and each system call costs more than a small message does, and a token takes eight of those.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

ROOM = 1 << 20
"""Bytes waiting above which `room` waits. What a single call puts in may exceed it."""

HELD = 64 * 1024
"""Bytes that are held back for others to leave with. When there are more, all leave."""

Work = Callable[[], Awaitable[None]]
"""Sends something by itself, such as a piece of a file."""


class Sink(Protocol):
    """Where bytes go: a socket, or a stream of the mesh."""

    def send_nowait(self, data: bytes) -> int:
        """Send what is taken without waiting; how many bytes that was, possibly 0."""

    async def send_all(self, data: bytes) -> None:
        """Send everything."""


class SocketSink:
    """A TCP connection as a sink. Errors are trio's, from `send_all`; `send_nowait` leaves them to that."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    def send_nowait(self, data: bytes) -> int:
        """See `Sink`."""
        try:
            return os.write(self._stream.socket.fileno(), data)
        except OSError:
            return 0

    async def send_all(self, data: bytes) -> None:
        """See `Sink`."""
        await self._stream.send_all(data)


async def receive(stream: trio.SocketStream, most: int) -> bytes:
    """Like `receive_some` where nothing has arrived yet, as a rule: one turn of the scheduler and one read.

    trio's tries first, waits, and gives others a turn once more; here that is a tenth of a token's way.
    """
    while True:
        await trio.lowlevel.wait_readable(stream.socket)
        try:
            return os.read(stream.socket.fileno(), most)
        except BlockingIOError:
            continue
        except OSError as exc:
            raise trio.BrokenResourceError(str(exc)) from exc


class Outbox:
    """A queue in front of a sink. `run` it until cancelled; an error of the sink's comes out of that."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._items: deque[bytes | Work] = deque()
        self._bytes = 0
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._sending = False
        self._filled, self._drained = trio.Event(), trio.Event()

    def put(self, item: bytes | Work, *, more: bool = False) -> None:
        """Send `item` after all that was put in before. Never waits.

        With `more`, bytes are held back until something is put in without it, or there are `HELD` of them, or `flush`.
        """
        if callable(item):
            self.flush()
            self._items.append(item)
            self._filled.set()
            return
        if len(item) >= HELD:
            self.flush()  # not worth a copy
        self._held.append(item)
        self._held_bytes += len(item)
        if not more or self._held_bytes >= HELD:
            self.flush()

    def flush(self) -> None:
        """Hold nothing back any more."""
        if not self._held:
            return
        data = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        self._held, self._held_bytes = [], 0
        if not self._items and not self._sending:
            sent = self._sink.send_nowait(data)
            if sent == len(data):
                return
            data = data[sent:] if sent else data
        self._queue(data)

    def put_later(self, data: bytes) -> None:
        """Send `data` in its order, but not before others have had their turn: nobody waits for it yet."""
        self.flush()
        self._queue(data)

    def _queue(self, data: bytes) -> None:
        self._items.append(data)
        self._bytes += len(data)
        self._filled.set()

    async def room(self) -> None:
        """Wait until less than `ROOM` is waiting. Whoever reads from one side waits here for the other."""
        while self._bytes > ROOM or any(map(callable, self._items)):
            await self._next()

    async def sent(self) -> None:
        """Wait until nothing is waiting. Needs `run`, and whoever goes on putting in may let it wait for ever."""
        self.flush()
        while self._items or self._sending:
            await self._next()

    async def _next(self) -> None:
        if self._drained.is_set():
            self._drained = trio.Event()
        await self._drained.wait()

    async def run(self) -> None:
        """Send what is put in, for ever."""
        while True:
            while self._items:
                item = self._items.popleft()
                self._sending = True
                if callable(item):
                    await item()
                else:
                    self._bytes -= len(item)
                    await self._sink.send_all(item)
                self._sending = False
                self._drained.set()
            self._filled = trio.Event()
            await self._filled.wait()

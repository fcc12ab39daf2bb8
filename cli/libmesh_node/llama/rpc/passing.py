"""Results from one worker to the next, over a stream of their own.

The stream is opened by the worker that has results, to the next one's service; it begins with the token that the host gave
to both. What cannot be sent is dropped: the host notices, and fills the hole itself.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from libmesh import MeshError, Stream
from libmesh_node.llama.rpc.frames import (
    TICKET,
    WHOLE,
    Frame,
    FrameParser,
    Link,
    ProtocolError,
    frame,
)

log = logging.getLogger(__name__)

MAX_WAITING = 4
"""Results that wait for the stream; more are dropped while it does not keep up."""

AGAIN_AFTER, LONGEST_PAUSE = 0.05, 2.0
"""Seconds until a stream that broke is opened again: at first, and at most. Until then each token waits for its host."""

READ_BYTES = 64 * 1024


class Passer:
    """Passes results on. `run` it until cancelled; never raises for what the other side does.

    A result that the stream takes at once leaves in the very call that brings it: the next worker waits for nothing else.

    Args:
        open_stream: to the next worker.
        token: of its session.
    """

    def __init__(self, open_stream: Callable[[], Awaitable[Stream]], token: bytes) -> None:
        self._open_stream, self._token = open_stream, token
        self._idle: Stream | None = None  # while `run` has nothing to send on it
        self._rest = b""  # of a result that began to leave
        self._waiting: deque[bytes] = deque()
        self._filled = trio.Event()

    def put(self, ticket: int, data: bytes) -> None:
        """Pass `data` on. Never waits."""
        message = frame(Link.PUSH, TICKET.pack(ticket) + data)
        stream, self._idle = self._idle, None
        if stream is not None:
            try:
                sent = stream.send_nowait(message)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                sent = 0  # `run` finds out
            if sent == len(message):
                self._idle = stream
                return
            self._rest = message[sent:]
        elif len(self._waiting) < MAX_WAITING:
            self._waiting.append(message)
        else:
            log.debug("a result for the next worker was dropped")
        self._filled.set()

    async def run(self) -> None:
        """Open the stream at once, so that the first result need not wait, and send; again and again if it breaks."""
        pause = AGAIN_AFTER
        while True:
            stream: Stream | None = None
            try:
                stream = await self._open_stream()
                await stream.send_all(frame(Link.PUSH_OPEN, self._token))
                pause = AGAIN_AFTER
                await self._send(stream)
            except (MeshError, OSError, trio.BrokenResourceError) as exc:
                log.info("results do not reach the next worker directly: %s", exc)
            finally:
                self._idle, self._rest = None, b""
                if stream is not None:
                    stream.reset()
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _send(self, stream: Stream) -> None:
        while True:
            while self._rest or self._waiting:
                message, self._rest = self._rest or self._waiting.popleft(), b""
                await stream.send_all(message)
            self._filled = trio.Event()
            self._idle = stream
            await self._filled.wait()


async def receive_results(stream: Stream, data: bytes, fill: Callable[[int, bytes], None]) -> None:
    """Hand each result that comes on `stream` to `fill`, until its end. Raises `ProtocolError`, or as the stream does."""

    def check(kind: int, size: int) -> None:
        if kind != Link.PUSH or not TICKET.size <= size <= TICKET.size + WHOLE:
            raise ProtocolError("a worker passed on what is no result")

    parser = FrameParser(check, {})
    while True:
        for event in parser.feed(data):
            assert isinstance(event, Frame)
            fill(TICKET.unpack_from(event.payload)[0], event.payload[TICKET.size :])
        data = bytes(await stream.receive_some(READ_BYTES))
        if not data:
            return

"""Services that are asked and answer, several times on one stream.

Where a `Framing` tells when an exchange is over, a stream outlives the connection to the service that it was carried on: the
next exchange gets one of its own. So an opener keeps a stream as HTTP keeps connections (RFC 9112, 9.3), also with a service
that does not, and is spared the making of one for each request.

Each stream has two tasks: one takes what the opener says, so that its end is heard at any time; the other carries one exchange
after the other. What begins an exchange goes to the latter at once, and on to the service without another turn of the scheduler
if neither the door nor the service keeps it waiting: whoever asked waits for just that.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Protocol

import trio

from libmesh.doors import Door
from libmesh.errors import ServiceRefused
from libmesh.net.base import Pieces, Stream
from libmesh.net.parking import Wakeup
from libmesh.net.pipes import tune_socket
from libmesh.net.readable import Readable
from libmesh.net.splice import reset_on_close, write_nowait
from libmesh.net.tcp import connect
from libmesh.peers import PeerId

log = logging.getLogger(__name__)

HOLD_BYTES = 512 * 1024
"""What an opener may say before there is a connection for it. Beyond that it waits, and is not heard to reset the stream."""

TAKE_BYTES = 64 * 1024
"""What is read at once of an answer."""


class Framing(Protocol):
    """Follows one exchange. It sees the bytes, and changes none. One that loses track never says that it is over."""

    def asked(self, data: bytes | bytearray) -> None:
        """More of what the opener says, before the service gets it."""

    def answered(self, data: bytes) -> bool:
        """More of what the service says. Whether the exchange is over with that, and another may follow."""


class Exchanges:
    """Serves streams to what listens at `host:port`.

    Args:
        door: entered for each exchange, once its first bytes have come; see `Door`.
        framing: called for each exchange.
        counter: called with a peer when a stream begins; what it returns is told the bytes sent and received by each exchange.
        connect_limit: seconds within which the service has to accept a connection.
        idle_limit: seconds that a stream may stay without an exchange.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        door: Door | None,
        framing: Callable[[], Framing],
        counter: Callable[[PeerId], Callable[[int, int], None]],
        connect_limit: float,
        idle_limit: float,
    ) -> None:
        self.address = host, port
        self.door, self.framing, self.counter = door, framing, counter
        self.connect_limit, self.idle_limit = connect_limit, idle_limit
        self.withdrawn = False
        self._idle: dict[_Conversation, float] = {}  # since when, the longest first
        self._some_idle = trio.Event()

    async def run(self) -> None:
        """Reset streams that stay without an exchange for too long. To be run meanwhile; never returns.

        When this is cancelled, the streams that are idle end, and the others after their exchange.
        """
        try:
            while True:
                while not self._idle:
                    self._some_idle = trio.Event()
                    await self._some_idle.wait()
                oldest, since = next(iter(self._idle.items()))
                if since + self.idle_limit <= trio.current_time():
                    del self._idle[oldest]
                    oldest.expire()
                else:
                    await trio.sleep_until(since + self.idle_limit)
        finally:
            self.withdrawn = True
            for one in self._idle:
                one.expire()

    def idles(self, one: _Conversation) -> None:
        """It waits for an exchange, until it is `busy`."""
        self._idle[one] = trio.current_time()
        self._some_idle.set()

    def busy(self, one: _Conversation) -> None:
        """It waits no more. Harmless to repeat."""
        self._idle.pop(one, None)

    async def serve(self, stream: Stream) -> None:
        """Carry exchanges until the opener has no more, or one ended the connection. Resets a stream that fails."""
        one = _Conversation(self, stream)
        try:
            if not await one.run():
                stream.reset()
        except BaseException:
            stream.reset()
            raise


class _Conversation:
    def __init__(self, service: Exchanges, stream: Stream) -> None:
        self._service, self._stream = service, stream
        self._count = service.counter(stream.peer)
        self._said = bytearray()  # by the opener, for an exchange that has no connection yet
        self._heard = Wakeup()  # that something was said
        self._taken = Wakeup()  # what was said
        self._sock: trio.socket.SocketType | None = None  # of the exchange under way
        self._framing: Framing | None = None
        self._unsent = b""  # of the answer
        self._sent = self._received = 0
        self._ended = self._lost = False  # the opener

    async def run(self) -> bool:
        """Until the end. False if that is to be seen as a failure."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, nursery.cancel_scope)
            try:
                while await self._is_asked() and await self._exchange():
                    pass
                await self._part()
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                log.debug("an exchange with the peer %s broke off: %s", self._stream.peer, exc)
                self._lost = True
            nursery.cancel_scope.cancel()
        return not self._lost

    # ── what the opener says ─────────────────────────────────────────────────────────────────────────────────────

    async def _listen(self, scope: trio.CancelScope) -> None:
        try:
            while data := await self._stream.receive_past(self._hold):
                await self._pass_on(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._lost = True
            scope.cancel()
            return
        self._ended = True
        self._heard.wake()
        if self._sock is not None:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)

    def _hold(self, pieces: Pieces) -> int:
        """Keep what was said for the exchange that has no connection yet; see `Sink`."""
        size = sum(map(len, pieces))
        if self._sock is not None or len(self._said) + size >= HOLD_BYTES:
            return 0
        for piece in pieces:
            self._said += piece
        self._heard.wake()
        return size

    async def _pass_on(self, data: bytes | bytearray) -> None:
        sock, framing = self._sock, self._framing
        if sock is None or framing is None:
            self._said += data
            self._heard.wake()
            while len(self._said) >= HOLD_BYTES:
                await self._taken.wait()
            return
        self._received += len(data)
        framing.asked(data)
        await _write(sock, data)

    async def _is_asked(self) -> bool:
        """Wait for the first bytes of an exchange. False if there will be none."""
        if not self._said and not self._ended and not self._service.withdrawn:
            self._service.idles(self)
            try:
                await self._heard.wait()
            finally:
                self._service.busy(self)
            if not self._said and not self._ended:
                self._lost = True
        return bool(self._said) and not self._lost

    def expire(self) -> None:
        """It has waited for long enough."""
        self._heard.wake()

    async def _part(self) -> None:
        """End the stream, and wait for the opener to, who may go on with it as long. What it says still goes nowhere."""
        if self._lost:
            return
        await self._stream.send_eof()
        with trio.move_on_after(self._service.idle_limit):
            while not self._ended:
                self._said.clear()
                self._taken.wake()
                await self._heard.wait()

    # ── one exchange ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _exchange(self) -> bool:
        """Whether another may follow."""
        service, door = self._service, self._service.door
        try:
            async with nullcontext() if door is None else door(self._stream.peer) as elsewhere:
                with await connect(*(elsewhere or service.address), service.connect_limit) as sock:
                    try:
                        return await self._carry(sock)
                    except BaseException:
                        reset_on_close(sock)
                        raise
        except ServiceRefused as exc:
            log.debug("refused the peer %s: %s", self._stream.peer, exc)
            self._lost = True
            return False

    async def _carry(self, sock: trio.socket.SocketType) -> bool:
        framing = self._service.framing()
        self._sent = self._received = 0
        while said := self._said:
            self._said = bytearray()
            self._taken.wake()
            self._received += len(said)
            framing.asked(said)
            await _write(sock, said)
        self._sock, self._framing = sock, framing
        tune_socket(sock)
        if self._ended:
            sock.shutdown(socket.SHUT_WR)
        readable = Readable(sock.fileno())
        over = ended = False

        def take() -> bool:
            """Send on what the service has said; see `Pull`."""
            nonlocal over, ended
            try:
                data = os.read(sock.fileno(), TAKE_BYTES)
            except BlockingIOError:
                return True
            if not data:
                ended = True
                return False
            if over := framing.answered(data):
                # What is said from now on, in the same turn even, belongs to the next one.
                self._sock = self._framing = None
            sent = self._stream.send_nowait(data)
            self._sent += len(data)
            self._unsent = data[sent:]
            return not self._unsent and not over

        try:
            while not over and not ended:
                await readable.wait(take)
                if not self._unsent and not over and not ended:  # where `wait` does not call it
                    take()
                if self._unsent:
                    unsent, self._unsent = self._unsent, b""
                    await self._stream.send_all(unsent)
        finally:
            self._sock = self._framing = None
            self._count(self._sent, self._received)
        return over


async def _write(sock: trio.socket.SocketType, data: bytes | bytearray) -> None:
    """Write all. A service that does not take it has ended, or will: it is heard of where its answer is read."""
    with memoryview(write_nowait(sock, data)) as rest, suppress(OSError, trio.ClosedResourceError):
        sent = 0
        while sent < len(rest):
            sent += await sock.send(rest[sent:])

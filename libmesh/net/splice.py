"""TCP ⇄ stream: the two pumps of one tunnelled connection.

What crosses, exactly: bytes; an end of file in either direction while the other goes on; a reset, in both directions
(on the socket side by SO_LINGER 0, which makes the kernel send RST). A pump that waits holds no buffer, so an idle
tunnel costs two tasks and the stream. What arrives while the pump waits goes to the socket in the very call that took it
off the connection, and what the socket has to the stream in the very call that found it readable (`readable.py`). That
spares turns of the scheduler: a third of the time that a small message takes.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from libmesh.errors import MeshError, ServiceRefused
from libmesh.net.base import Pieces, Stream, StreamReset
from libmesh.net.journal import Journal, Lifeline
from libmesh.net.negotiate import Libp2pStream
from libmesh.net.parking import Wakeup
from libmesh.net.pipes import RECORDS_AT_ONCE, TAKE_BYTES, BufferPool, tune_socket
from libmesh.net.readable import Readable

LEAST_TAKE_BYTES = TAKE_BYTES // RECORDS_AT_ONCE
"""What is read at once from a socket whose bytes have to wait: a tunnel that waits holds what was read last."""

TURN_BYTES = 1024 * 1024
"""Bytes that a pump moves before it lets other tasks run, when it never has to wait."""

MOST_PIECES = 64
"""Pieces that one call writes to the socket. The rest, of a peer that sends crumbs, is joined and waits its turn."""

NOT_READ_BYTES = 1024 * 1024
"""TCP_NOTSENT_LOWAT of the socket: bytes that wait in the kernel for its program beyond those that fill its buffer.

Four of our own writes. With one, as on a connection (`pipes.NOT_SENT_BYTES`), 40 % of the writes in bulk found no room for
all of it, and what they left was copied to wait: a tenth of what receiving cost. Nothing has to overtake it here."""

_POOL = BufferPool(
    TAKE_BYTES
)  # for all tunnels of the process: a buffer is in use only between two awaits, or while blocked


@dataclass(frozen=True, slots=True)
class SpliceResult:
    """What one connection carried.

    Attributes:
        bytes_sent: from the socket into the stream.
        bytes_received: from the stream into the socket.
        reset: which side ended it abruptly and so took the other with it: `"socket"`, `"stream"`, or `None` when both
            directions came to their end.
    """

    bytes_sent: int
    bytes_received: int
    reset: str | None = None


async def splice(
    stream: Stream,
    sock: trio.SocketStream,
    lifeline: Lifeline | None = None,
    ended: Callable[[], Awaitable[None]] | None = None,
    first: bytes | bytearray = b"",
    rest: bytes | bytearray | None = None,
    count: Callable[[int, int], None] | None = None,
) -> SpliceResult:
    """Carry bytes between a stream and a socket until both directions have ended, or either side is reset.

    With a `lifeline` it goes on over another stream if the connection of this one is lost. `ended` is awaited once both
    directions have come to their end here, which the other end may still have to be told, for as long as that takes.
    `first` was received from the stream already; of that, `rest` was not written to the socket yet: all, if it is not said.
    `count` is told the bytes sent and received, however it ends.

    A stream that wraps another one only until it is opened may have a method `settle` that waits for that and returns
    the other; receiving then goes on with it. Takes over both and closes them, also on error. Cancelling resets both. Never
    raises for what either side does; a refused service resets the socket and raises `ServiceRefused`.
    """
    pumps = _Pumps(stream, sock, lifeline, first, first if rest is None else rest)
    try:
        if sock.socket.family in (socket.AF_INET, socket.AF_INET6):
            tune_socket(sock.socket, not_sent=NOT_READ_BYTES)
        # Whoever opened the stream has bytes for it already, if anybody has. They leave with the question, or go to the
        # socket with the answer, as its pump needs no other turn of the scheduler; nor a task of its own.
        pump, other = (
            (pumps.send, pumps.receive) if hasattr(stream, "settle") else (pumps.receive, pumps.send)
        )
        while True:
            pumps.sent_all = pumps.received_all = False
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other, nursery.cancel_scope)
                await pump(nursery.cancel_scope)
            if ended is not None and pumps.reset is None and not pumps.lost:
                await ended()
                ended = None
            if lifeline is None or not await _must_go_on(pumps, lifeline):
                break
        if pumps.reset is None:
            pumps.ended = True
            await pumps.stream.aclose()
    finally:
        if not pumps.ended:
            pumps.stream.reset()
            # What came whole is not taken from a client that is slow to read it; who sends more hears of the reset.
            if not (pumps.received_all and _unsent(sock)):
                reset_on_close(sock.socket)
        sock.socket.close()
        if count is not None:
            count(pumps.bytes_sent, pumps.bytes_received)
    if pumps.refusal is not None:
        raise pumps.refusal
    return SpliceResult(pumps.bytes_sent, pumps.bytes_received, pumps.reset)


async def _must_go_on(pumps: _Pumps, lifeline: Lifeline) -> bool:
    """After both pumps have ended: whether they begin again, on another stream."""
    if pumps.reset is None and not pumps.lost:
        pumps.lost = not await lifeline.finished(pumps.stream)
    if not pumps.lost or pumps.reset is not None:
        return False
    pumps.stream.reset()
    try:
        pumps.stream = await lifeline.again()
    except (MeshError, trio.BrokenResourceError):
        pumps.reset = "stream"
        return False
    pumps.lost = False
    return True


class _Pumps:
    def __init__(
        self,
        stream: Stream,
        sock: trio.SocketStream,
        lifeline: Lifeline | None,
        first: bytes | bytearray = b"",
        rest: bytes | bytearray = b"",
    ) -> None:
        self.stream = stream
        self._socket = sock.socket
        self._lifeline = lifeline
        self._journal = None if lifeline is None else lifeline.journal
        self._unsent: tuple[bytearray, int, int] | None = (
            None  # read and not sent: a buffer, from where to where
        )
        self._unwritten = bytes(rest)  # received, and not yet written to the socket when the pump was stopped
        if lifeline is not None and first:
            lifeline.took(len(first))
        self._reach = LEAST_TAKE_BYTES  # how much to read at once
        self._readable = Readable(self._socket.fileno())
        self.sent_all = self.received_all = False  # which pump only waits for the other, or for a reset
        self._sent = Wakeup()
        self.lost = False
        self.bytes_sent = 0
        self.bytes_received = len(first)
        self.reset: str | None = None
        self.refusal: ServiceRefused | None = None
        self.ended = False

    async def send(self, scope: trio.CancelScope) -> None:
        """Socket to stream."""
        journal = self._journal
        turn = 0
        try:
            if journal is not None and journal.sent + journal.sent_end and await self._send_again(journal):
                await self._until_received()
                return
            while True:
                if journal is not None and journal.full:
                    await journal.wait_changed()
                    continue
                reach = self._reach
                count = self._take()
                if count == 0:
                    if self._lifeline is not None:
                        self._lifeline.journal.sent_end = True
                        self._tell_end(self._lifeline)
                    await self.stream.send_eof()
                    await self._until_received()
                    return
                await self._send_rest()
                if count == reach:
                    turn += count
                    if turn >= TURN_BYTES:
                        turn = 0
                        await trio.lowlevel.checkpoint()
                else:  # that was likely all for now: spare the call that would only say so
                    turn = 0
                    await self._readable.wait(self._pull)
                    await self._send_rest()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, ServiceRefused) as exc:
            self._failed(exc, scope)
        finally:
            if self._unsent is not None:  # a journal has it
                _POOL.give(self._unsent[0])
                self._unsent = None

    @staticmethod
    def _tell_end(lifeline: Lifeline) -> None:
        """Once both directions have ended here: nobody waits for it before, and it leaves with our own end."""
        if lifeline.journal.sent_end and lifeline.journal.received_end:
            lifeline.tell_progress()

    async def _until_received(self) -> None:
        """Nothing is read of the socket any more. Hear of its reset all the same, until the other pump is done, too."""
        self.sent_all = True
        self._sent.wake()
        if not self.received_all:
            await self._readable.wait_broken()
            if error := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error))

    async def _until_sent(self) -> None:
        """Nothing more comes from the stream. Hear of its reset all the same, until the other pump is done, too."""
        self.received_all = True
        if self.sent_all:
            self._readable.release()
            return
        with trio.CancelScope() as broken:
            if self.stream.when_lost(broken):
                try:
                    await self._sent.wait()
                finally:
                    self.stream.when_lost(None)
        if broken.cancelled_caught:
            raise StreamReset("the peer reset the stream, or the connection was lost")

    def _take(self) -> int | None:
        """Read what the socket has, and send what can be sent at once. How much it had: 0 at its end, `None` for nothing."""
        buffer = _POOL.take()
        try:
            count = os.readv(self._socket.fileno(), (memoryview(buffer)[: self._reach],))
            if count:
                view = memoryview(buffer)[:count]
                if self._journal is not None:
                    self._journal.append(view)
                sent = self.stream.send_nowait(view)
                self.bytes_sent += count
                if (left := count - sent) > LEAST_TAKE_BYTES:
                    self._unsent = buffer, sent, count
                elif left:  # which may wait for long
                    self._unsent = bytearray(view[sent:]), 0, left
                if left:
                    self._reach = max(self._reach // 2, LEAST_TAKE_BYTES)
                elif count == self._reach:
                    self._reach = min(2 * self._reach, TAKE_BYTES)
        except BlockingIOError:
            count = None
        finally:
            if self._unsent is None or self._unsent[0] is not buffer:
                _POOL.give(buffer)
        return count

    def _pull(self) -> bool:
        """What `_take` does, while the pump waits. False if the pump must go on."""
        if self._journal is not None and self._journal.full:
            return False
        reach = self._reach
        count = self._take()
        return count is None or (0 < count < reach and self._unsent is None)

    async def _send_rest(self) -> None:
        """Send what was taken off the socket and could not be sent at once."""
        if self._unsent is not None:
            buffer, start, end = self._unsent
            with memoryview(buffer) as whole, whole[start:end] as view:
                await self.stream.send_all(view)
            self._unsent = None
            _POOL.give(buffer)

    async def _send_again(self, journal: Journal) -> bool:
        """What the other end of a tunnel that goes on has not received. Whether that was all there is to send."""
        offset = journal.has
        while (piece := journal.piece_at(offset)) is not None:
            await self.stream.send_all(piece)
            # A peer that says to have what it was not sent yet is believed: what it has is not kept any more.
            offset = max(offset + len(piece), journal.has)
        if journal.sent_end:
            await self.stream.send_eof()
        return journal.sent_end

    async def receive(self, scope: trio.CancelScope) -> None:
        """Stream to socket."""
        stream, number = self.stream, self._socket.fileno()
        lifeline = self._lifeline
        turn = 0
        try:
            if self._unwritten:
                await self._write_all(number, self._unwritten)
            if lifeline is not None and lifeline.journal.received_end:
                await self._until_sent()
                return
            if (settle := getattr(stream, "settle", None)) is not None:
                self.stream = stream = await settle()
            while True:
                data: bytes | bytearray | None = stream.receive_nowait()
                if data is None and isinstance(stream, Libp2pStream):
                    turn = 0
                    await stream.wait_receivable(self._push)
                    continue
                if data is None:
                    turn = 0
                    data = await stream.receive_some()
                elif turn >= TURN_BYTES:
                    turn = 0
                    await trio.lowlevel.checkpoint()
                if not data:
                    break
                self.bytes_received += len(data)
                if lifeline is not None:
                    lifeline.took(len(data))
                await self._write_all(number, data)
                turn += len(data)
            self._socket.shutdown(socket.SHUT_WR)
            if lifeline is not None:
                lifeline.journal.received_end = True
                self._tell_end(lifeline)
            await self._until_sent()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, ServiceRefused) as exc:
            self._failed(exc, scope)

    def _failed(self, exc: Exception, scope: trio.CancelScope) -> None:
        """Tell whose fault it was, and end both pumps. `StreamReset` comes from the stream, `OSError` does not."""
        if isinstance(exc, ServiceRefused):
            self.refusal = exc
        ended = isinstance(exc, (trio.BrokenResourceError, trio.ClosedResourceError))
        if ended and self._lifeline is not None and self._lifeline.is_lost(self.stream):
            self.lost = True
        elif self.reset is None:
            self.reset = "stream" if isinstance(exc, (ServiceRefused, trio.BrokenResourceError)) else "socket"
        scope.cancel()

    def _push(self, pieces: Pieces) -> int:
        """Write at once what the socket takes. An error is left to the pump, which meets it next."""
        number = self._socket.fileno()
        try:
            if len(pieces) == 1:
                written = os.write(number, pieces[0])
            else:
                written = os.writev(number, pieces[:MOST_PIECES])
        except OSError:
            return 0
        self.bytes_received += written
        if self._lifeline is not None:
            self._lifeline.took(written)
        return written

    async def _write_all(self, number: int, data: bytes | bytearray) -> None:
        written = 0
        with memoryview(data) as view:
            try:
                while written < len(data):
                    try:
                        written += os.write(number, view[written:] if written else view)
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(number)
            finally:
                self._unwritten = bytes(view[written:]) if written < len(data) else b""


def write_nowait(sock: trio.socket.SocketType, data: bytes | bytearray) -> bytes | bytearray:
    """Write what the socket takes at once; return the rest. An error is left to `splice`, which meets it next."""
    if not data:
        return data
    try:
        return data[os.write(sock.fileno(), data) :]
    except OSError:
        return data


def _unsent(sock: trio.SocketStream) -> int:
    """Bytes that the kernel has still to send, or to have confirmed; 0 where it does not say."""
    if sock.socket.fileno() < 0 or not hasattr(termios, "TIOCOUTQ"):
        return 0
    count = array("i", [0])
    try:
        fcntl.ioctl(sock.socket.fileno(), termios.TIOCOUTQ, count)
    except OSError:
        return 0
    return count[0]


def reset_on_close(sock: trio.socket.SocketType) -> None:
    """Make the coming close a reset, so that the other side does not take it for an end of file."""
    # lint: the socket may be closed already, and then there is nobody left to tell
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        return

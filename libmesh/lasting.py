"""Streams that outlive their connections.

What tunnels do for TCP connections (`resuming.py`, `net.journal`), for streams that an application holds itself: when the
connection is lost, the stream is sought again in the background, and goes on behind the last byte that had arrived.

    steady ──connection lost──▶ seeking ──another stream──▶ repeating ──all said again──▶ steady
                                   │ ▲                          │
                                   │ └──────lost again──────────┘
                                   └──no way found in time──▶ failed

While seeking nothing moves; while repeating one may receive, for otherwise two ends that repeat much to each other would
wait for each other for ever. Bytes inside an application (such as what an `Interceptor` holds back) are none of the
stream's business: they stay where they are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from enum import Enum, auto

import trio

from libmesh.errors import MeshError
from libmesh.net.base import Pieces, Sink, Stream, StreamReset
from libmesh.net.journal import Lifeline

PIECE_BYTES = 256 * 1024
"""Most that is sent at once, so that a long message does not overrun what is kept."""

LOOK_EVERY = 1.0
"""Seconds between looks at the connection while a sender waits for the other end to say what it has."""

_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


class _Phase(Enum):
    STEADY = auto()
    SEEKING = auto()
    REPEATING = auto()


class LastingStream(Stream):
    """A stream that goes on over another connection when its own is lost. Both ends must be one.

    The contract is that of `Stream`, but for these:

    - The loss of a connection is not an error: calls wait until the stream goes on, or for as long as `MeshConfig.resume`
      says; then they raise `StreamReset`. So do they, at once, if the peer has left, or has forgotten the stream.
    - It is noticed by whoever receives or sends. A stream on which the peer does neither cannot go on.
    - Up to 4 MiB are kept until the other end has them; then senders wait.
    - `aclose` does not wait for that. What had not arrived when a connection is lost after it, has not arrived.

    Args:
        stream: the first one; taken over.
        lifeline: its books, and how it gets another one; begun here, ended with this stream.
        tasks: where it is sought.
    """

    def __init__(self, stream: Stream, lifeline: Lifeline, tasks: trio.Nursery) -> None:
        self.peer, self.protocol = stream.peer, stream.protocol
        self._stream, self._lifeline, self._tasks = stream, lifeline, tasks
        self._phase = _Phase.STEADY
        self._changed = trio.Event()
        self._closed = False
        self._failure: str | None = None
        self._search = trio.CancelScope()
        self._busy: set[str] = set()
        lifeline.begin()

    @property
    def connection_lost(self) -> bool:
        """Whether there is no connection beneath: while another one is sought, and for good if none was found."""
        return self._phase is _Phase.SEEKING or self._failure is not None

    # ── receiving ────────────────────────────────────────────────────────────────────────────────────────────────

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See `trio.abc.ReceiveStream.receive_some`."""
        return await self._receive(lambda stream: stream.receive_some(max_bytes))

    async def receive_past(self, sink: Sink) -> bytes | bytearray:
        """See `Stream`."""

        def take(pieces: Pieces) -> int:
            if taken := sink(pieces):
                self._lifeline.took(taken)
            return taken

        return await self._receive(lambda stream: stream.receive_past(take))

    async def _receive(self, receive: Callable[[Stream], Awaitable[bytes | bytearray]]) -> bytes | bytearray:
        with self._alone("receiving"):
            while True:
                if self._lifeline.journal.received_end and not self._closed:
                    await trio.lowlevel.checkpoint()
                    return b""
                stream = self._stream
                try:
                    data = await receive(stream)
                except _BROKEN as exc:
                    if not await self._may_go_on(stream, _Phase.REPEATING):
                        raise self._error(exc) from None
                    continue
                self._took(data)
                return data

    def receive_nowait(self, max_bytes: int | None = None) -> bytes | None:
        """See `Stream.receive_nowait`."""
        if self._lifeline.journal.received_end or self._closed or self._phase is _Phase.SEEKING:
            return None
        try:
            data = self._stream.receive_nowait(max_bytes)
        except _BROKEN:
            return None  # `receive_some` finds out why
        if data is not None:
            self._took(data)
        return data

    def _took(self, data: bytes | bytearray) -> None:
        if data:
            self._lifeline.took(len(data))
        else:
            self._lifeline.took_end()

    # ── sending ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream.send_all`."""
        journal = self._lifeline.journal
        with self._alone("sending"), memoryview(data) as whole, whole.cast("B") as rest:
            at = 0
            while True:
                if journal.full or self._phase is not _Phase.STEADY:
                    await self._room()
                if journal.sent_end:
                    raise trio.ClosedResourceError("the end of this stream was sent")
                with rest[at : at + PIECE_BYTES] as piece:
                    stream, at = self._stream, at + len(piece)
                    if piece:
                        journal.append(piece)
                    try:
                        await stream.send_all(piece)
                    except (
                        _BROKEN
                    ) as exc:  # if it goes on, the piece is said again with the rest of what is kept
                        if not await self._may_go_on(stream, _Phase.STEADY):
                            raise self._error(exc) from None
                if at >= len(rest):
                    return

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """See `Stream.send_nowait`."""
        journal = self._lifeline.journal
        if self._phase is not _Phase.STEADY or self._closed or "sending" in self._busy:
            return 0
        if journal.full or journal.sent_end:
            return 0
        try:
            sent = self._stream.send_nowait(data)
        except _BROKEN:
            return 0  # `send_all` finds out why
        if sent:
            with memoryview(data) as view, view[:sent] as taken:
                journal.append(taken)
        return sent

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        with self._alone("sending"):
            while True:
                await self._room()
                stream = self._stream
                try:
                    await stream.wait_send_all_might_not_block()
                except trio.ClosedResourceError:
                    if not await self._may_go_on(stream, _Phase.STEADY):
                        raise
                    continue
                return

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream.send_eof`."""
        with self._alone("sending"):
            await self._steady()
            stream = self._stream
            journal = self._lifeline.journal
            before, journal.sent_end = journal.sent_end, not self._closed
            try:
                await stream.send_eof()
            except trio.Cancelled:
                journal.sent_end = before  # no stream that was cancelled in this has ended
                raise
            except _BROKEN as exc:
                if not await self._may_go_on(stream, _Phase.STEADY):
                    raise self._error(exc) from None

    async def _room(self) -> None:
        """Wait until something may be sent: not while the stream is sought, nor while too much is kept."""
        await self._steady()
        journal = self._lifeline.journal
        while journal.full and not self._closed and self._failure is None:
            with trio.move_on_after(LOOK_EVERY):
                await journal.wait_changed()
            if self._lifeline.is_lost(self._stream):
                self._seek()
            await self._steady()

    async def _steady(self) -> None:
        while self._phase is not _Phase.STEADY and not self._closed and self._failure is None:
            await self._changed.wait()

    # ── going on ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _may_go_on(self, stream: Stream, least: _Phase) -> bool:
        """After an error of `stream`: wait for another one. False if there is none, or the error was no loss.

        `least`: `REPEATING` for those who may use it while what was lost is repeated, `STEADY` for others.
        """
        while not self._closed and self._failure is None:
            usable = self._phase is _Phase.STEADY or self._phase is least
            if usable and stream is not self._stream:
                return True
            if self._phase is _Phase.STEADY:
                if not self._lifeline.is_lost(stream):
                    return False
                self._seek()
            await self._changed.wait()
        return False

    def _seek(self) -> None:
        if self._phase is _Phase.STEADY:
            self._enter(_Phase.SEEKING)
            try:
                self._tasks.start_soon(self._go_on)
            except RuntimeError:  # nobody looks for streams any more: this node leaves the mesh
                self._fail("this node leaves the mesh")

    async def _go_on(self) -> None:
        with trio.CancelScope() as self._search:
            try:
                while not self._closed:
                    self._enter(_Phase.SEEKING)
                    self._stream.reset()
                    self._stream = await self._lifeline.again()
                    self._enter(_Phase.REPEATING)
                    if await self._repeat(self._stream):
                        break
                else:
                    return
                self._enter(_Phase.STEADY)
            except (MeshError, *_BROKEN, LookupError) as exc:
                self._fail(str(exc))
            finally:
                if self._phase is not _Phase.STEADY:
                    self._fail("this node leaves the mesh")
                if self._closed:  # since the stream was found, so that `reset` has not seen it
                    self._stream.reset()

    async def _repeat(self, stream: Stream) -> bool:
        """Say again what the other end lacks. False if the connection was lost over that."""
        journal = self._lifeline.journal
        offset = journal.has
        try:
            while (piece := journal.piece_at(offset)) is not None:
                await stream.send_all(piece)
                offset = max(offset + len(piece), journal.has)
            if journal.sent_end:
                await stream.send_eof()
        except _BROKEN:
            if not self._lifeline.is_lost(stream):
                raise
            return False
        return True

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self._changed.set()
        self._changed = trio.Event()

    def _fail(self, why: str) -> None:
        if self._failure is None:
            self._failure = why
            self._let_go()

    def _error(self, cause: Exception) -> Exception:
        if self._closed:
            return trio.ClosedResourceError("the stream is closed")
        return cause if self._failure is None else StreamReset(self._failure)

    # ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────

    def reset(self) -> None:
        """See `Stream.reset`. An end that cannot be told so, gives up after its own time."""
        if not self._closed:
            self._closed = True
            self._search.cancel()
            self._let_go()

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource.aclose`. Waits for a stream that is being sought.

        While another task is in `send_all` it is a `reset`: the peer must not take half a message for the whole.
        """
        try:
            if not self._closed:
                with suppress(*_BROKEN):
                    if not self._lifeline.journal.sent_end:
                        await self.send_eof()
                await self._steady()
            if not self._closed and self._failure is None:
                self._closed = True
                self._lifeline.end()
                self._enter(self._phase)
                await self._stream.aclose()
            else:
                await trio.lowlevel.checkpoint()
        except trio.BusyResourceError:
            self.reset()
            await trio.lowlevel.checkpoint()
        finally:
            self.reset()

    def _let_go(self) -> None:
        self._stream.reset()
        self._lifeline.end()
        self._enter(self._phase)

    def _alone(self, doing: str) -> _Alone:
        if doing in self._busy:
            raise trio.BusyResourceError(f"another task is {doing} on this stream")
        return _Alone(self._busy, doing)


class _Alone:
    """One task at a time does this."""

    __slots__ = ("_busy", "_doing")

    def __init__(self, busy: set[str], doing: str) -> None:
        self._busy, self._doing = busy, doing

    def __enter__(self) -> None:
        self._busy.add(self._doing)

    def __exit__(self, *_: object) -> None:
        self._busy.discard(self._doing)

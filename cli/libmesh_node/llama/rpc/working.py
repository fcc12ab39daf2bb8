"""A session at work: bytes between the host's end and a fresh rpc-server, all of them checked by `WorkerEnd`."""

from __future__ import annotations

import os
import select
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import trio

from libmesh import MeshError, Stream
from libmesh_node.llama.rpc.frames import ProtocolError, Reply, frame
from libmesh_node.llama.rpc.opening import MAX_MESSAGE
from libmesh_node.llama.rpc.outbox import Outbox, SocketSink, receive
from libmesh_node.llama.rpc.passing import Passer
from libmesh_node.llama.rpc.weights import Place, Weights
from libmesh_node.llama.rpc.worker import Effect, FileToServer, Push, ToHost, ToServer, WorkerEnd

ASK_LIMIT = 10.0
"""Seconds that a host has for its first frame; later, once a frame has begun, for each next piece of it."""

IDLE_LIMIT = 300.0
"""Seconds without a word that a session may last which holds no memory: its place and what it was granted are others' to have."""

ENDED = "the worker's rpc-server has ended"

READ_BYTES = 256 * 1024
_FILE_STEP = 4 << 20
_POLL_MS = 200


class Working:
    """The four tasks of a session: two read, two send."""

    def __init__(self, stream: Stream, sock: trio.SocketStream, end: WorkerEnd, weights: Weights) -> None:
        self._stream, self._sock, self._end, self._weights = stream, sock, end, weights
        self._to_host, self._to_server = Outbox(stream), Outbox(SocketSink(sock))
        self._reason = "the host has ended it"
        self._telling, self._told = trio.Lock(), False
        self.passer: Passer | None = None

    async def run(self, first: bytes) -> str:
        """Run until either side ends. Returns why it ended; the host has been told if the fault was on this side."""
        tasks = (self._to_host.run, self._to_server.run, self._from_server, partial(self._from_host, first))
        async with trio.open_nursery() as nursery:
            if self.passer is not None:
                nursery.start_soon(self.passer.run)
            for task in tasks:
                nursery.start_soon(self._guarded, task, nursery.cancel_scope)
        return self._reason

    async def _guarded(self, task: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        """Run a task whose end, however it comes, is the end of the session."""
        try:
            await task()
        except ProtocolError as exc:
            await self._tell(str(exc))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            if not isinstance(exc, MeshError):
                await self._tell(ENDED)
            elif self._stream.connection_lost:
                self._reason = "the connection to the host was lost"
        scope.cancel()

    async def _tell(self, reason: str) -> None:
        """Tell the host why the session ends, after what it is sent already. The first reason holds; others wait for it."""
        async with self._telling:
            if self._told:
                return
            self._told, self._reason = True, reason
            with trio.move_on_after(ASK_LIMIT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                self._to_host.put(frame(Reply.LOST, reason.encode()[:MAX_MESSAGE]))
                await self._to_host.sent()
                await self._stream.aclose()
                return
            self._stream.reset()

    async def _from_host(self, data: bytes | bytearray) -> None:
        while True:
            self._apply(self._end.from_host(bytes(data)))
            await self._to_server.room()
            received: bytes | bytearray | None = self._stream.receive_nowait(READ_BYTES)
            if received is None:
                received = await self._receive()
            if not received:
                return
            data = received

    async def _receive(self) -> bytes | bytearray:
        if self._end.midway:
            limit, what = ASK_LIMIT, "a request was not finished within"
        elif self._end.holds_nothing:
            limit, what = IDLE_LIMIT, "no memory was asked for, nor anything else within"
        else:
            return await self._stream.receive_some(READ_BYTES)
        with trio.move_on_after(limit):
            return await self._stream.receive_some(READ_BYTES)
        raise ProtocolError(f"{what} {limit:g} s")

    async def _from_server(self) -> None:
        while data := await receive(self._sock, READ_BYTES):
            self._apply(self._end.from_server(data))
            await self._to_host.room()
        raise ProtocolError(ENDED)

    def fill(self, ticket: int, data: bytes) -> None:
        """The worker before this one has a result. Raises `ProtocolError`."""
        self._apply(self._end.fill(ticket, data))

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Push(ticket, data):
                    if self.passer is not None:
                        self.passer.put(ticket, data)
                case ToServer(data):
                    self._to_server.put(data, more=True)
                case FileToServer(place):
                    self._to_server.put(partial(self._send_file, place))
                case ToHost(data):
                    self._to_host.put(data, more=True)
        self._to_server.flush()
        self._to_host.flush()

    async def _send_file(self, place: Place) -> None:
        """Send from the file in a thread: the disk may take its time."""
        file, sock = self._weights.file(place.part), self._sock.socket.fileno()
        await trio.to_thread.run_sync(
            _send_file, sock, file, place.offset, place.size, abandon_on_cancel=False
        )


def _send_file(sock: int, file: int, offset: int, size: int) -> None:
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    end = offset + size
    while offset < end:
        trio.from_thread.check_cancelled()
        try:
            sent = os.sendfile(sock, file, offset, min(_FILE_STEP, end - offset))
        except BlockingIOError:
            poller.poll(_POLL_MS)
            continue
        except OSError as exc:
            raise trio.BrokenResourceError(str(exc)) from exc
        if not sent:
            raise ProtocolError("the worker's file has become shorter")
        offset += sent


async def say(stream: Stream, data: bytes, *, last: bool = True) -> bool:
    """Send a few bytes, whatever becomes of them; `last` ends the stream. Whether they were sent."""
    with (
        trio.move_on_after(ASK_LIMIT),
        suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError),
    ):
        await stream.send_all(data)
        if last:
            await stream.aclose()
        return True
    stream.reset()
    return False

"""A worker as a host sees it: a port on this machine that llama-server takes for an rpc-server.

The first session is opened before llama-server starts: whether the worker has the same file, speaks the same protocol and
has the memory is known before a byte is loaded. It waits there for the first connection that needs it. Each further such
connection, one after the other, gets a session of its own, and with it a fresh rpc-server.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

import trio

from libmesh import MeshError, Stream
from libmesh_node.llama.rpc.ahead import Chain, Foreseen
from libmesh_node.llama.rpc.facts import WorkerFacts
from libmesh_node.llama.rpc.fork import converse
from libmesh_node.llama.rpc.frames import Frame, FrameParser, Link, ProtocolError, Reply, frame
from libmesh_node.llama.rpc.host import Effect, HostEnd, ToClient
from libmesh_node.llama.rpc.opening import (
    MAX_MESSAGE,
    Neighbour,
    Refusal,
    SessionRequest,
    decode_answer,
    encode_request,
    is_fork,
    protocol_mismatch,
)
from libmesh_node.llama.rpc.outbox import Outbox, SocketSink, receive
from libmesh_node.llama.rpc.uploads import FromFile, ToWorker
from libmesh_node.llama.rpc.weights import LearnedHashes, Place, Weights

log = logging.getLogger(__name__)

OPEN_LIMIT = 45.0
"""Seconds within which a worker must answer the request for a session; its rpc-server starts within that."""

OVERDUE_AFTER = 0.25
"""Seconds between looks for what was sent ahead and lacks its result; twice in a row means that it does not come."""

READ_BYTES = 256 * 1024
_FILE_STEP = 1 << 20

OpenStream = Callable[[], Awaitable[Stream]]
"""Opens a stream to the worker's service, best a lasting one: llama-server waits as long as it takes. Raises `MeshError`."""


class SessionRefused(Exception):
    """The worker will not, in its own words. `later`: it may, some other time."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.later = refusal.later


class Borrowed:
    """One worker, for one llama-server: `open`, then `listen`, in the end `close`; or all three by `borrow`.

    Attributes:
        port: at 127.0.0.1, for llama-server's `--rpc`.
        facts: what the worker said of itself.
        weights: of the model.
        waiting_since: when the oldest request under way was sent, by trio's clock; `None` if none is.
        lost: set with `why` when the session in use has ended before llama-server ended its connection.
        denied: bytes of an allocation that the worker did not make; 0 if it made all.
        spared: bytes of uploads that needed not travel; `sent` and `received`: what did, both ways.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        request: SessionRequest,
        weights: Weights,
        hashes: LearnedHashes,
        chain: Chain | None = None,
        place: int = 0,
    ) -> None:
        self.chain, self.place = chain, place
        self._open_stream, self._request = open_stream, request
        self.weights, self._hashes = weights, hashes
        self._spare: Stream | None = None
        self._turn = trio.Lock()
        self._listeners: list[trio.SocketListener] = []
        self.facts = WorkerFacts((0, 0, 0), ())
        self.port = 0
        self.lost = trio.Event()
        self.why = ""
        self.waiting_since: float | None = None
        self.denied = 0
        self.spared = 0
        self.sent = 0
        self.received = 0

    async def open(self) -> None:
        """Open the first session. Raises `SessionRefused`, `ProtocolError`, `MeshError` or the stream's errors."""
        self._spare = await self._session()

    async def _session(self) -> Stream:
        stream = await self._open_stream()
        try:
            await stream.send_all(frame(Link.OPEN, encode_request(self._request)))
            with trio.move_on_after(OPEN_LIMIT):
                outcome = await _receive_answer(stream)
                if isinstance(outcome, Refusal):
                    raise SessionRefused(outcome)
                mismatch = protocol_mismatch(self._request.protocol, outcome.protocol)
                if mismatch is not None:
                    raise SessionRefused(Refusal(mismatch))
                self.facts = outcome
                return stream
            raise ProtocolError(f"the worker did not answer within {OPEN_LIMIT:g} s")
        except BaseException:
            stream.reset()
            raise

    async def serve(self, sock: trio.SocketStream) -> None:
        """One connection of llama-server's, from its beginning to its end."""
        if is_fork(self._request.protocol):
            await self._pass_on(sock)
            return
        end = HostEnd(self.facts, self.weights, self._hashes, self.chain, self.place)
        async with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                while (data := await sock.receive_some(READ_BYTES)) and not end.engaged:
                    effects = end.from_client(data)
                    if end.engaged:
                        async with self._turn:
                            await self._engage(sock, end, effects)
                        return
                    for effect in effects:
                        assert isinstance(effect, ToClient)
                        await sock.send_all(effect.data)
            except (ProtocolError, trio.BrokenResourceError) as exc:
                log.info("a connection of llama-server's ended: %s", exc)
                _abort(sock)

    async def _pass_on(self, sock: trio.SocketStream) -> None:
        """As the fork has it: each connection a session, and its bytes as they are."""
        async with self._turn, sock:
            if (stream := await self._take_session(sock)) is None:
                return
            try:
                if not await converse(sock, stream):
                    self._lose("the worker ended the session")
                    _abort(sock)
            finally:
                stream.reset()

    async def _take_session(self, sock: trio.SocketStream) -> Stream | None:
        """The one that was opened beforehand, or another; `None` if there is none: then that is told, and `sock` done with."""
        stream, self._spare = self._spare, None
        try:
            return stream or await self._session()
        except Exception as exc:  # noqa: BLE001 - whatever the worker or the way to it did, this session is over
            self._lose(str(exc))
            _abort(sock)
            return None

    async def _engage(self, sock: trio.SocketStream, end: HostEnd, effects: list[Effect]) -> None:
        if (stream := await self._take_session(sock)) is None:
            return
        conversation = _Conversation(self, sock, stream, end)
        try:
            why = await conversation.run(effects)
        finally:
            stream.reset()
            self.waiting_since = None
            self.spared += end.spared
            self.denied = self.denied or end.denied
            await trio.to_thread.run_sync(self._hashes.save)
        if why is not None:
            self._lose(why)
            _abort(sock)

    def _lose(self, why: str) -> None:
        if not self.lost.is_set():
            self.why = why
            self.lost.set()

    async def bind(self) -> None:
        """Have a `port`. Connections to it wait for `listen`. Raises `OSError`."""
        if not self._listeners:
            self._listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            self.port = self._listeners[0].socket.getsockname()[1]

    async def listen(self, nursery: trio.Nursery) -> None:
        """Serve connections in `nursery` from now on, at `port`. Raises `OSError`."""
        await self.bind()
        nursery.start_soon(trio.serve_listeners, self.serve, self._listeners)

    def introduce(self, neighbours: tuple[Neighbour, ...]) -> None:
        """Tell the worker, when a session is opened, of all workers of this llama-server."""
        self._request = replace(self._request, neighbours=neighbours)

    @property
    def token(self) -> bytes:
        """Of its sessions."""
        return self._request.token

    def close(self) -> None:
        """End a session that nobody came to use."""
        for listener in self._listeners:
            listener.socket.close()
        if self._spare is not None:
            self._spare.reset()


@asynccontextmanager
async def borrow(
    open_stream: OpenStream, request: SessionRequest, weights: Weights, hashes: LearnedHashes
) -> AsyncIterator[Borrowed]:
    """Have a worker for as long as the context lasts. Raises as `Borrowed.open`; leaving ends all of its sessions."""
    borrowed = Borrowed(open_stream, request, weights, hashes)
    await borrowed.open()
    try:
        async with trio.open_nursery() as nursery:
            await borrowed.listen(nursery)
            yield borrowed
            nursery.cancel_scope.cancel()
    finally:
        borrowed.close()


class _Conversation:
    """The four tasks of an engaged connection: two read, two send."""

    def __init__(self, worker: Borrowed, sock: trio.SocketStream, stream: Stream, end: HostEnd) -> None:
        self._worker, self._sock, self._stream, self._end = worker, sock, stream, end
        self._to_client, self._to_worker = Outbox(SocketSink(sock)), Outbox(stream)
        self._why: str | None = None

    async def run(self, effects: list[Effect]) -> str | None:
        """Run until either side ends. Returns `None` if llama-server did, else what was wrong."""
        chain, place = self._worker.chain, self._worker.place
        if chain is not None:
            chain.join(place, self._send_ahead)
        try:
            async with trio.open_nursery() as nursery:
                self._apply(effects)
                for task in (self._to_client.run, self._to_worker.run, self._from_worker, self._from_client):
                    nursery.start_soon(self._guarded, task, nursery.cancel_scope)
                if chain is not None and place:
                    nursery.start_soon(self._fill_overdue)
        finally:
            if chain is not None:
                chain.leave(place)
        return self._why

    def _send_ahead(self, foreseen: Foreseen, data: bytes) -> bool:
        if not self._end.sent_ahead(foreseen):
            return False
        self._worker.sent += len(data)
        self._to_worker.put_later(data)  # what makes the result for its hole goes first
        return True

    async def _fill_overdue(self) -> None:
        """Where a result does not come directly, send it from here: late, but it goes on."""
        before: bytes | None = None
        while True:
            await trio.sleep(OVERDUE_AFTER)
            missing = self._end.overdue
            if missing is not None and missing == before and self._worker.chain is not None:
                self._worker.chain.late()
                self._to_worker.put(missing)
            before = missing

    async def _guarded(self, task: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        """Run a task whose end, however it comes, is the end of the conversation."""
        try:
            await task()
        except (ProtocolError, OSError) as exc:
            self._why = self._why or str(exc)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            if task != self._from_client:  # llama-server may vanish as it likes
                lost = isinstance(exc, MeshError) and self._stream.connection_lost
                self._why = self._why or (str(exc) if lost else "the connection to the worker broke")
        scope.cancel()

    async def _from_client(self) -> None:
        while data := await receive(self._sock, READ_BYTES):
            self._apply(self._end.from_client(data))
            self._watch()
            await self._to_worker.room()

    async def _from_worker(self) -> None:
        while True:
            data = self._stream.receive_nowait(READ_BYTES)
            if data is None:
                data = bytes(await self._stream.receive_some(READ_BYTES))
            if not data:
                raise ProtocolError("the worker ended the session")
            self._worker.received += len(data)
            self._worker.waiting_since = None
            self._apply(self._end.from_worker(data))
            self._watch()
            await self._to_client.room()

    def _watch(self) -> None:
        if not self._end.waiting:
            self._worker.waiting_since = None
        elif self._worker.waiting_since is None:
            self._worker.waiting_since = trio.current_time()

    def _apply(self, effects: list[Effect]) -> None:
        early = True
        for effect in effects:
            match effect:
                case ToWorker(data):
                    self._worker.sent += len(data)
                    self._to_worker.put(data, more=True)
                    early = early and effect.early
                case FromFile(place, size):
                    self._worker.sent += size
                    self._to_worker.put(partial(self._send_file, place, size))
                case ToClient(data):
                    self._to_client.put(data, more=True)
        self._to_client.flush()
        if not early:
            self._to_worker.flush()

    async def _send_file(self, place: Place, size: int) -> None:
        for start in range(0, size, _FILE_STEP):
            await self._stream.send_all(
                self._worker.weights.read(place, start, min(_FILE_STEP, size - start))
            )


async def _receive_answer(stream: Stream) -> WorkerFacts | Refusal:
    """The first frame. The worker sends nothing behind it before it is asked."""

    def check(kind: int, size: int) -> None:
        if kind != Reply.OPENED or size > MAX_MESSAGE:
            raise ProtocolError("the worker's first frame is no answer to a request for a session")

    parser = FrameParser(check, {})
    while received := await stream.receive_some(MAX_MESSAGE):
        for event in parser.feed(bytes(received)):
            assert isinstance(event, Frame)
            return decode_answer(event.payload)
    raise ProtocolError("the worker ended the stream without an answer")


def _abort(sock: trio.SocketStream) -> None:
    """Make the coming close a reset."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

"""Services over streams, and TCP over services.

A stream to a service starts with `Open` and `Opened` (mesh.proto); then the bytes are the service's. A tunnel is a
local TCP port each of whose connections becomes one such stream, whose other end is a TCP connection to what the
peer exposed. The opener's first bytes need not wait for the answer.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, nullcontext, suppress
from math import inf
from typing import TYPE_CHECKING

import trio

from libmesh import wire
from libmesh.doors import IDLE_LIMIT, Door
from libmesh.errors import AddressUnavailable, MeshClosed, MeshError, PeerUnreachable, ServiceRefused
from libmesh.exchanges import Exchanges, Framing
from libmesh.framing import FrameReader, frame
from libmesh.net.base import Stream, StreamReset
from libmesh.net.negotiate import Libp2pStream
from libmesh.net.splice import reset_on_close, splice, write_nowait
from libmesh.net.tcp import accept_all, connect
from libmesh.peers import PeerId, Scope
from libmesh.resume_wire import is_resumable, session_of_open
from libmesh.resuming import NearTunnel, Resumption
from libmesh.wire_pieces import WireError, valid_service_name

if TYPE_CHECKING:
    from libmesh.mesh import Mesh

log = logging.getLogger(__name__)

PROTOCOL = "/libmesh/tunnel/1.0.0"

OPEN_LIMIT = 10.0
"""Seconds within which an opener must say what it wants, and an exposed address must accept a connection."""


class Acceptance:
    """Agrees to a tunnel.

    Attributes:
        session: what the opener calls the tunnel, if it would resume it.
        given: the opener was told, or may have been: what is said from now on are the service's bytes.
    """

    def __init__(self, stream: Stream, session: bytes | None) -> None:
        self._stream, self.session = stream, session
        self.given = False

    async def __call__(self, *, resumable: bool = False) -> None:
        """Tell the opener; `resumable`: the tunnel may go on over another connection."""
        self.given = True
        said = frame(wire.encode_opened(None, resumable=resumable))
        if not self._stream.post(said):
            await self._stream.send_all(said)


ServiceHandler = Callable[[Stream], Awaitable[None]]
"""Called in its own task for each stream that a member opened to a service. The stream is closed when it returns, and
reset if it raises."""

Accept = Acceptance
RawHandler = Callable[[Stream, Accept], Awaitable[None]]
"""Serves a stream: calls the given function to accept, or raises `ServiceRefused` before that."""

_REFUSALS = {
    "unknown_service": "it offers no service {service!r}",
    "unknown_protocol": "it does not offer tunnels",
    "scope": "this node's scope does not allow the service {service!r}",
    "busy": "the service {service!r} is busy",
    "unavailable": "what is behind the service {service!r} does not answer",
}


async def answer(stream: Stream, choose: Callable[[str], RawHandler]) -> None:
    """Serve one inbound stream: read what is wanted, let `choose` say who serves it or raise `ServiceRefused`.

    One that the handler raises after it has accepted is another service's, which it asked itself: it is raised here, too.
    """
    reader = FrameReader(stream, wire.MAX_OPEN)
    try:
        request = reader.receive_nowait()
        if request is None:
            with trio.fail_after(OPEN_LIMIT):
                request = await reader.receive()
        service, accept = wire.decode_open(request), Acceptance(stream, session_of_open(request))
    except (WireError, trio.TooSlowError, trio.BrokenResourceError) as exc:
        log.debug("the peer %s opened a tunnel and made no sense: %s", stream.peer, str(exc) or "too slow")
        stream.reset()
        return

    try:
        await choose(service)(stream, accept)
    except ServiceRefused as exc:
        if accept.given:
            raise
        log.debug("refused %r to the peer %s: %s", service, stream.peer, exc)
        with suppress(trio.BrokenResourceError):
            await stream.send_all(frame(wire.encode_opened(exc.reason)))
            await stream.aclose()
    except trio.BrokenResourceError:
        stream.reset()


def check_service(name: str) -> None:
    """Raise `ValueError` for what names no service."""
    if not valid_service_name(name):
        raise ValueError(f"{name!r} is no service name: 1 to 255 bytes, without control characters")


def accepting(handler: ServiceHandler, resumption: Resumption | None) -> RawHandler:
    """Accepts each stream and has `handler` serve it; with `resumption` as one that lasts, if its opener wants that."""
    if not callable(handler):
        raise TypeError(f"a handler is an async function that takes a stream, not {handler!r}")

    async def serve(stream: Stream, accept: Accept) -> None:
        lifeline = None if resumption is None else resumption.far(stream.peer, accept.session)
        if resumption is None or lifeline is None:
            await accept()
            await handler(stream)
            return
        lifeline.carried_by(stream)
        kept = resumption.lasting(stream, lifeline)
        try:
            await accept(resumable=True)
            await handler(kept)
            await kept.aclose()
        finally:
            kept.reset()

    return serve


async def request(stream: Stream, service: str, *, wait: bool, lifeline: NearTunnel | None = None) -> Stream:
    """Ask for `service` on a fresh stream, and return a stream of its bytes. Takes over `stream`.

    Without `wait`, what is sent next travels with the question, and a refusal comes out of the first receive.
    """
    opening = _OpeningStream(stream, service, lifeline)
    try:
        await opening.ask()
        if wait:
            await opening.hear()
    except WireError as exc:
        raise PeerUnreachable(f"the peer {stream.peer} did not answer as a mesh does: {exc}") from exc
    except BaseException:
        stream.reset()
        raise
    return opening.opened or opening


class _OpeningStream(Stream):
    """A stream whose first answer has still to be read."""

    def __init__(self, stream: Stream, service: str, lifeline: NearTunnel | None) -> None:
        self._stream, self._service, self._lifeline = stream, service, lifeline
        self._answer = FrameReader(stream, wire.MAX_OPEN)
        self._refusal: ServiceRefused | None = None
        self.peer, self.protocol = stream.peer, stream.protocol
        self.opened: Stream | None = None

    async def ask(self) -> None:
        session = b"" if self._lifeline is None else self._lifeline.session
        said = frame(wire.encode_open(self._service, session))
        if not self._stream.post(said):
            await self._stream.send_all(said)

    async def hear(self) -> None:
        """Wait for the answer. Raises `ServiceRefused`, each time, or `WireError`; if cancelled, nothing is lost."""
        if self._refusal is not None:
            raise self._refusal
        stream, answer = self._stream, None
        try:
            while (answer := self._answer.receive_nowait()) is None and isinstance(stream, Libp2pStream):
                await stream.wait_receivable()  # a `receive` may take a turn of the scheduler for each piece
            if answer is None:
                answer = await self._answer.receive()
            refusal = wire.decode_opened(answer)
            if self._lifeline is not None:
                self._lifeline.agreed(resumable=is_resumable(answer))
        except ServiceRefused as exc:
            refusal = exc.reason
        except WireError:
            self._stream.reset()
            raise
        if refusal is not None:
            self._stream.reset()
            why = _REFUSALS.get(refusal, "it refused the service {service!r}").format(service=self._service)
            self._refusal = ServiceRefused(f"the peer {self.peer} declined: {why}", reason=refusal)
            raise self._refusal
        self.opened = self._stream

    @property
    def connection_lost(self) -> bool:
        return self._stream.connection_lost

    async def settle(self) -> Stream:
        """See `splice`: wait for the answer, and return the stream of the service's bytes."""
        if self.opened is None:
            try:
                await self.hear()
            except WireError as exc:
                raise StreamReset(f"the peer {self.peer} did not answer as a mesh does: {exc}") from exc
        return self._stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        stream = await self.settle()
        return await stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    def receive_nowait(self, max_bytes: int | None = None) -> bytes | None:
        return None if self.opened is None else self._stream.receive_nowait(max_bytes)

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        return self._stream.send_nowait(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def reset(self) -> None:
        self._stream.reset()


async def expose(
    mesh: Mesh,
    service: str,
    host: str,
    port: int,
    *,
    scope: Scope = Scope.CLIENT,
    door: Door | None = None,
    framing: Callable[[], Framing] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Offer what listens at `host:port`, seen from this machine, to members as `service`, until cancelled.

    Each stream becomes one TCP connection, once `door` lets it through. If none can be made within 10 s the opener is
    refused with `unavailable`. Streams that wait before the door, for their first bytes, end with the call.

    With `framing`, which is called for each exchange, a stream may carry several, each over a connection of its own and once
    `door` lets it through. It is accepted at once, and reset where it would be refused, or when it has been idle for
    `IDLE_LIMIT`. Streams without an exchange end with the call, the others when theirs is over.

    Raises `ValueError` for a bad or repeated name, and for what is no port.
    """
    if not 0 < port <= 65535:
        raise ValueError(f"port {port}: from 1 to 65535")
    if not isinstance(host, str):
        raise TypeError(f"a host is a text, not {host!r}")
    if door is not None and not callable(door):
        raise TypeError(f"a door is a function that takes a peer and returns a context manager, not {door!r}")
    if framing is not None and not callable(framing):
        raise TypeError(f"a framing is a function that returns one, or its class, not {framing!r}")
    if framing is not None:
        exchanges = Exchanges(
            host,
            port,
            door=door,
            framing=framing,
            counter=mesh.tunnel_counter,
            connect_limit=OPEN_LIMIT,
            idle_limit=IDLE_LIMIT,
        )
        with mesh.offer_raw(service, accepting(exchanges.serve, mesh.resumption), scope=scope):
            task_status.started()
            await exchanges.run()
    idle: set[trio.CancelScope] = set()

    async def serve(stream: Stream, accept: Accept) -> None:
        if door is None:
            await carry(stream, accept, host, port)
            return
        first: bytes | bytearray = b""
        with trio.move_on_after(IDLE_LIMIT) as waiting:
            idle.add(waiting)
            try:
                first = await stream.receive_some()
            finally:
                idle.discard(waiting)
            if first:
                waiting.deadline = inf
                stream.when_lost(waiting)
                async with AsyncExitStack() as inside:
                    elsewhere = await inside.enter_async_context(door(stream.peer))
                    stream.when_lost(None)
                    await carry(stream, accept, *(elsewhere or (host, port)), inside.aclose, first)
        if waiting.cancelled_caught or not first:
            stream.reset()

    async def carry(
        stream: Stream,
        accept: Accept,
        host: str,
        port: int,
        ended: Callable[[], Awaitable[None]] | None = None,
        first: bytes | bytearray = b"",
    ) -> None:
        try:
            sock = await connect(host, port, OPEN_LIMIT)
        except OSError as exc:
            raise ServiceRefused(f"{host}:{port} does not answer: {exc}", reason="unavailable") from exc
        with sock:
            rest = write_nowait(sock, first)  # before all else: whoever reads it begins to work
            lifeline = mesh.resumption.far(stream.peer, accept.session)
            count = mesh.tunnel_counter(stream.peer)
            if lifeline is not None:
                lifeline.carried_by(stream)
            with lifeline or nullcontext():
                try:
                    await accept(resumable=lifeline is not None)
                except BaseException:
                    reset_on_close(sock)
                    raise
                await splice(stream, trio.SocketStream(sock), lifeline, ended, first, rest, count)

    try:
        with mesh.offer_raw(service, serve, scope=scope):
            task_status.started()
            await trio.sleep_forever()
    finally:
        for waiting in idle:
            waiting.cancel()


async def serve_tunnel(
    mesh: Mesh,
    peer: PeerId,
    service: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    handler_nursery: trio.Nursery | None = None,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Carry connections to a local TCP port to `service` of `peer`, until cancelled.

    Reports the port through `task_status`; 0 takes a free one. It stays the same however often the path to the peer
    changes. A connection that cannot be carried is reset, and what was wrong is logged. Connections end with the call, or
    live in `handler_nursery` if there is one (as with `trio.serve_listeners`), and go on until they end by themselves.
    Raises `AddressUnavailable` if the port is taken, `ValueError` for what is none or names no service, and
    `MeshClosed`.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port {port}: from 0 to 65535")
    check_service(service)
    if mesh.closed:
        raise MeshClosed
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as exc:
        what = "is already in use" if exc.errno == errno.EADDRINUSE else f"cannot be used: {exc.strerror}"
        raise AddressUnavailable(f"the port {port} of {host} {what}") from exc
    task_status.started(listeners[0].socket.getsockname()[1])
    async with trio.open_nursery() as own:
        tasks = handler_nursery or own

        def take(sock: trio.SocketStream) -> None:
            tasks.start_soon(_carry, mesh, peer, service, sock)

        for listener in listeners:
            own.start_soon(accept_all, listener, take)


async def _carry(mesh: Mesh, peer: PeerId, service: str, sock: trio.SocketStream) -> None:
    with sock.socket:
        try:
            stream, lifeline = await mesh.open_tunnel(peer, service)
        except (MeshError, trio.BrokenResourceError) as exc:
            log.info("tunnel to %r: %s", service, exc)
            reset_on_close(sock.socket)
            return
        try:
            with lifeline or nullcontext():
                await splice(stream, sock, lifeline, count=mesh.tunnel_counter(peer))
        except MeshError as exc:
            log.info("tunnel to %r: %s", service, exc)
            reset_on_close(sock.socket)

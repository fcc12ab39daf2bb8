"""Sessions of the first mesh's fork of llama.cpp: its bytes pass as they are, but for the addresses in REGISTER_PEER.

    host's llama-server ─▶ 127.0.0.1:P ═══ session ═══ worker A's rpc-server
                                                          │ "peer B is at 127.0.0.1:Q", Q the host's port to B; becomes R
                                                          ▼
                                             127.0.0.1:R ═══ 0x88, B's token ═══ worker B's rpc-server

The fork pushes results from worker to worker by itself, and only lacks the way. So with the request for a session each
worker is told by which port the host reaches every other one, and by which token that one's server can be reached; it
opens a port of its own for each, and puts both into its `PortMap`. Nothing else is understood of the fork's bytes, so
nothing is checked, spared or answered here: a host of the fork's has all that rpc-server can do.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial

import trio

from libmesh import MeshError, Stream
from libmesh_node.llama.rpc.frames import Link, ProtocolError, frame
from libmesh_node.llama.rpc.opening import Neighbour
from libmesh_node.llama.rpc.register_peer import RegisterPeerRewriter

log = logging.getLogger(__name__)

MAX_REACHING = 8
"""Connections at once to one neighbour. More are reset: the fork needs one."""

READ_BYTES = 256 * 1024

Filter = Callable[[bytes], bytes]
OpenStream = Callable[[str], Awaitable[Stream]]

_BROKEN = (MeshError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)


def unchanged(data: bytes) -> bytes:
    """What has come."""
    return data


async def converse(
    one: trio.abc.HalfCloseableStream,
    other: trio.abc.HalfCloseableStream,
    there: Filter = unchanged,
    back: Filter = unchanged,
    first: bytes = b"",
) -> bool:
    """Carry bytes both ways until either side has ended, through the filters. Closes neither.

    `first` has come from `one` already. Returns whether it was `one` that ended; raises what a filter raises, in an
    `ExceptionGroup`, and nothing for what either side does. A side that reads slowly slows the other one down; at most one read is held.
    """
    ended: trio.abc.HalfCloseableStream = one

    async def pump(
        source: trio.abc.HalfCloseableStream, sink: trio.abc.HalfCloseableStream, change: Filter, data: bytes
    ) -> None:
        nonlocal ended
        at = sink
        try:
            while True:
                if changed := change(data):
                    await sink.send_all(changed)
                at = source
                if not (data := bytes(await source.receive_some(READ_BYTES))):
                    break
                at = sink
        except _BROKEN:
            pass  # lint: whose end it was is all that there is to know
        ended = at
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump, one, other, there, first)
        nursery.start_soon(pump, other, one, back, b"")
    return ended is one


class Neighbourhood:
    """The ports of this machine that lead to other workers' servers.

    Args:
        open_stream: to a worker's lender, by its peer id.

    Attributes:
        ports: from a host and its port to ours; a `PortMap`.
    """

    def __init__(self, open_stream: OpenStream | None) -> None:
        self._open_stream = open_stream
        self.ports: dict[tuple[str, int], int] = {}

    def rewriter(self, host: str) -> RegisterPeerRewriter:
        """For one connection of a host's."""
        return RegisterPeerRewriter(host, self.ports)

    @asynccontextmanager
    async def open(self, host: str, own: bytes, neighbours: Iterable[Neighbour]) -> AsyncIterator[None]:
        """Have a port for each of a host's workers but that with the token `own`, while the context lasts. Raises `OSError`.

        Where the same host has two sessions here that name the same port, the later one counts.
        """
        others = [each for each in neighbours if each.token != own] if self._open_stream is not None else []
        mine: dict[tuple[str, int], int] = {}
        async with trio.open_nursery() as nursery:
            for each in others:
                listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
                mine[host, each.port] = listeners[0].socket.getsockname()[1]
                places = trio.CapacityLimiter(MAX_REACHING)
                nursery.start_soon(trio.serve_listeners, partial(self._reach, each, places), listeners)
            self.ports |= mine
            try:
                yield
            finally:
                for key, port in mine.items():
                    if self.ports.get(key) == port:
                        del self.ports[key]
                nursery.cancel_scope.cancel()

    async def _reach(
        self, neighbour: Neighbour, places: trio.CapacityLimiter, sock: trio.SocketStream
    ) -> None:
        assert self._open_stream is not None
        async with sock:
            try:
                places.acquire_nowait()
            except trio.WouldBlock:
                log.warning("more connections to a neighbour than there may be")
                return
            try:
                stream = await self._open_stream(neighbour.peer)
                try:
                    await stream.send_all(frame(Link.REACH, neighbour.token))
                    await converse(sock, stream)
                finally:
                    stream.reset()
            except (*_BROKEN, ProtocolError) as exc:
                log.info("the peer %s is not reached for our rpc-server: %s", neighbour.peer, exc)
            finally:
                places.release()


class Doors:
    """The servers of this machine that neighbours may reach, by their sessions' tokens."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[frozenset[str], int]] = {}

    def add(self, token: bytes, neighbours: Iterable[Neighbour], port: int) -> None:
        """A session's server listens at `port`. It takes the place of an earlier one with the same token."""
        self._known[token] = frozenset(each.peer for each in neighbours), port

    def remove(self, token: bytes, port: int) -> None:
        """It has ended."""
        if self._known.get(token, (None, None))[1] == port:
            del self._known[token]

    async def serve(self, stream: Stream, token: bytes, first: bytes) -> None:
        """A neighbour's stream, from behind its first frame to its end. Raises `ProtocolError` for strangers."""
        peers, port = self._known.get(token, (frozenset(), 0))
        if stream.peer not in peers:
            raise ProtocolError("it knows no session here")
        try:
            sock = await trio.open_tcp_stream("127.0.0.1", port)
        except OSError as exc:
            raise ProtocolError(f"the session's rpc-server takes no further connection: {exc}") from exc
        async with sock:
            await converse(stream, sock, first=first)
        stream.reset()

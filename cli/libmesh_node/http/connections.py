"""TCP connections to servers, all of which are ports of this machine; and some to tunnels, which wait for requests.

What a tunnel adds to a request's first byte is mostly the making of its parts: a connection, a stream of the mesh, and what
the other node does about it. A stream on which nothing is asked holds no place at the server (`libmesh.Door`), so a request can
find one ready: one that was made in advance, or one that has served another request (`http_framing.py`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest, ConnectionKey
from yarl import URL

log = logging.getLogger("libmesh_node.http")

P = TypeVar("P", bound=asyncio.Protocol)

READY = 2
"""Connections to one tunnel that are made in advance. A request that finds none ready makes its own."""

AFTER = 0.005
"""Seconds after which they are made: what has come for a client just then goes first."""

READY_FOR = 60.0
"""Seconds after which one that nobody needed is closed: half of what the other end allows (`libmesh.doors.IDLE_LIMIT`)."""


def cut(transport: asyncio.Transport) -> None:
    """Close a connection with a reset, at once. By itself, `abort` sends an end of file."""
    with suppress(OSError):  # of one that was reset by its other end, on some systems
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


class Reader(Protocol):
    """Takes what a connection brings after a request."""

    def feed(self, data: bytes) -> None:
        """More bytes came."""

    def lost(self, exc: Exception | None) -> None:
        """The connection is over; `exc` as `asyncio` tells it."""


class Connection(asyncio.Protocol):
    """To a server.

    Attributes:
        transport: while it stands.
        answer: of the request under way.
        used: it has served a request already, so its other end may have given it up.
        server: stands for the server that it leads to. Ports are used again.
    """

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answer: Reader | None = None
        self.used = False
        self.server: object = None

    @property
    def is_usable(self) -> bool:
        """Whether a request can be sent."""
        return self.transport is not None and not self.transport.is_closing()

    def send(self, request: bytes, answer: Reader) -> None:
        """Send all of `request`, of which there is no more than fits into memory. Raises `aiohttp.ServerDisconnectedError`."""
        if self.transport is None or not self.is_usable:
            raise aiohttp.ServerDisconnectedError
        self.answer = answer
        self.transport.write(request)

    def close(self) -> None:
        """Once what was sent has left. Harmless to repeat."""
        if self.transport is not None:
            self.transport.close()

    def cut(self) -> None:
        """Close it as one that failed, so that nobody serves what was asked on it: a mere end may follow any request."""
        if self.transport is not None:
            cut(self.transport)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self.answer is None:
            self.close()  # nobody asked for it
        else:
            self.answer.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self.transport = None
        if self.answer is not None:
            self.answer.lost(exc)


class Loopback(aiohttp.BaseConnector):
    """Connections of aiohttp's client to `http://127.0.0.1:PORT`, where there is no name to resolve. To be made in a running loop.

    As aiohttp's own connectors are, it is an override of `_create_connection`.
    """

    def __init__(self, *, keep: float | None = None) -> None:
        """With `keep`, connections are used again, for as many seconds; otherwise each serves one request."""
        if keep is None:
            super().__init__(limit=0, force_close=True)
        else:
            super().__init__(limit=0, keepalive_timeout=keep)

    async def _create_connection(
        self, req: ClientRequest, traces: list[aiohttp.tracing.Trace], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        return await _connect(partial(ResponseHandler, self._loop), _address(req.url), timeout.sock_connect)


class Pool:
    """Connections to tunnels at `http://127.0.0.1:PORT`, for requests that are sent at once (`single.py`), not in slices.

    A connection that broke while it was ready is not given out; one that breaks in the very moment fails its request as
    any does.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready: dict[tuple[str, int], deque[_Ready]] = {}
        self._making: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._servers: dict[tuple[str, int], object] = {}

    def prepare(self, url: str) -> None:
        """Have connections ready for coming requests to the server at `url`. Returns at once, and never fails."""
        where = _address(URL(url))
        if where not in self._making and self._living(where) < READY:
            task = self._making[where] = asyncio.create_task(self._make(where))
            task.add_done_callback(lambda _: self._making.pop(where, None))

    def ready(self, url: str) -> int:
        """Connections that wait for requests to `url`."""
        return self._living(_address(URL(url)))

    def forget(self, present: Collection[str]) -> None:
        """Close what is ready for servers that are gone (`present`: base URLs that are there)."""
        there = {_address(URL(url)) for url in present}
        for where in self._making.keys() - there:
            self._making[where].cancel()
        for where in self._servers.keys() - there:
            del self._servers[where]
            self.drop(*where)

    def drop(self, host: str, port: int) -> None:
        """Close what is ready for one server."""
        for one in self._ready.pop((host, port), ()):
            one.expiry.cancel()
            one.connection.close()

    async def take(
        self, host: str, port: int, limit: float | None = None, *, used: bool = True
    ) -> Connection:
        """A connection that is ready, or a new one, which may take `limit` seconds. With `used` it may have served others.

        The caller closes it, or gives it `back`. Raises `aiohttp.ClientConnectorError` or `TimeoutError`.
        """
        where = host, port
        if self._living(where):
            for ready in self._ready[where]:
                if used or not ready.connection.used:
                    ready.expiry.cancel()
                    self._ready[where].remove(ready)
                    return ready.connection
        return await self._connect(where, limit)

    def back(self, host: str, port: int, connection: Connection) -> None:
        """Take back a connection to a tunnel on which an exchange is over, for the next one."""
        connection.used = True
        if connection.server is self._servers.get((host, port)):
            self._keep((host, port), connection)
        else:
            connection.close()

    def _keep(self, where: tuple[str, int], connection: Connection) -> None:
        expiry = self._loop.call_later(READY_FOR, self._expire, where, connection)
        self._ready.setdefault(where, deque()).appendleft(_Ready(connection, expiry))

    async def _connect(self, where: tuple[str, int], limit: float | None = None) -> Connection:
        connection = await _connect(Connection, where, limit)
        connection.server = self._servers.setdefault(where, object())
        return connection

    async def _make(self, where: tuple[str, int]) -> None:
        await asyncio.sleep(AFTER)
        try:
            while self._living(where) < READY:
                self._keep(where, await self._connect(where))
        except aiohttp.ClientError as exc:
            log.debug("no connection to port %d was made in advance: %s", where[1], exc)

    def _expire(self, where: tuple[str, int], connection: Connection) -> None:
        connection.close()
        if not self._living(where):
            self._ready.pop(where, None)

    def _living(self, where: tuple[str, int]) -> int:
        """How many are ready at `where`. Those that broke are dropped, and those where something came that nobody asked for."""
        waiting = self._ready.get(where, ())
        for one in [one for one in waiting if not one.connection.is_usable]:
            one.expiry.cancel()
            one.connection.close()
            self._ready[where].remove(one)
        return len(waiting)


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    connection: Connection
    expiry: asyncio.TimerHandle


async def _connect(factory: Callable[[], P], where: tuple[str, int], limit: float | None) -> P:
    """A connection within `limit` seconds. Raises `aiohttp.ClientConnectorError` or `TimeoutError`."""
    try:
        async with asyncio.timeout(limit):
            return (await asyncio.get_running_loop().create_connection(factory, *where))[1]
    except TimeoutError:
        raise
    except OSError as exc:
        raise aiohttp.ClientConnectorError(ConnectionKey(*where, False, True, None, None, None), exc) from exc


def _address(url: URL) -> tuple[str, int]:
    return url.host or "", url.port or 0

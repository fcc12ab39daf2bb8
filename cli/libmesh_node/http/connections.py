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
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest, ConnectionKey
from yarl import URL

log = logging.getLogger("libmesh_node.http")

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


class Connection(ResponseHandler):
    """To a server.

    Attributes:
        used: it has served a request already, so its other end may have given it up.
        server: stands for the server that it leads to. Ports are used again.
    """

    used = False
    server: object = None

    def cut(self) -> None:
        """Close it as one that failed, so that nobody serves what was asked on it: a mere end may follow any request."""
        if self.transport is not None:
            cut(self.transport)


class Loopback(aiohttp.BaseConnector):
    """Connections to `http://127.0.0.1:PORT`. To be made in a running loop.

    A connection that broke while it was ready is not given out; one that breaks in the very moment fails its request as
    any does. As aiohttp's own connectors are, it is an override of `_create_connection`.
    """

    def __init__(self, *, keep: float | None = None) -> None:
        """With `keep`, connections are used again, for as many seconds; otherwise each serves one request."""
        if keep is None:
            super().__init__(limit=0, force_close=True)
        else:
            super().__init__(limit=0, keepalive_timeout=keep)
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

    async def _create_connection(
        self, req: ClientRequest, traces: list[aiohttp.tracing.Trace], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        return await self.take(*_address(req.url), timeout.sock_connect, used=False)

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
        try:
            async with asyncio.timeout(limit):
                return await self._connect(where)
        except TimeoutError:
            raise
        except OSError as exc:
            key = ConnectionKey(host, port, False, True, None, None, None)
            raise aiohttp.ClientConnectorError(key, exc) from exc

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

    async def _connect(self, where: tuple[str, int]) -> Connection:
        _, connection = await self._loop.create_connection(partial(Connection, self._loop), *where)
        connection.server = self._servers.setdefault(where, object())
        return connection

    async def _make(self, where: tuple[str, int]) -> None:
        await asyncio.sleep(AFTER)
        try:
            while self._living(where) < READY:
                self._keep(where, await self._connect(where))
        except OSError as exc:
            log.debug("no connection to port %d was made in advance: %s", where[1], exc)

    def _expire(self, where: tuple[str, int], connection: Connection) -> None:
        connection.close()
        if not self._living(where):
            self._ready.pop(where, None)

    def _living(self, where: tuple[str, int]) -> int:
        """How many are ready at `where`. Those that broke are dropped, and those where something came that nobody asked for."""
        waiting = self._ready.get(where, ())
        for one in [
            one for one in waiting if not one.connection.is_connected() or one.connection.should_close
        ]:
            one.expiry.cancel()
            one.connection.close()
            self._ready[where].remove(one)
        return len(waiting)


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    connection: Connection
    expiry: asyncio.TimerHandle


def _address(url: URL) -> tuple[str, int]:
    return url.host or "", url.port or 0

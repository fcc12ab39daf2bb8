"""Listen, and keep answering whatever comes in: the two ports of a node.

`serve_http` is what the node starts. All of this runs in the bridge's HTTP thread.

What a stranger's connection may cost is bounded here: how many there are, how long one may stay without a complete
request, how long its headers are. Bodies are bounded in `intake.py`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError
from aiohttp.web_protocol import RequestHandler

from libmesh_node.bridge import Bridge
from libmesh_node.http.api import Api, refuse
from libmesh_node.http.console import Console
from libmesh_node.http.errors import ApiError, encode_error
from libmesh_node.http.proxy import Proxy
from libmesh_node.http.relay import LAST_WORDS

if TYPE_CHECKING:
    import trio

log = logging.getLogger("libmesh_node.http")

IDLE_TIMEOUT = 60.0
"""Seconds that a connection may stay open without a complete request, from the start or from the last answer. nginx
gives 60 for headers and 75 between requests."""

MAX_CONNECTIONS = 4096
"""Client connections to one port, or half of the file descriptors that the system allows, if that is less: each may
need a second one, to a server. One more takes the place of the oldest without a request; if all have one, it gets 503."""

MAX_HEADER = 16 << 10
"""Bytes of the request line and of each header line. llama-server's own limit is 8 KiB, h11's 16."""

MAX_HEADERS = 100

BACKLOG = 1024

SHUTDOWN_GRACE = 0.8
"""Seconds that answers under way have left when the node ends; then they are cut off."""

_FULL_BODY = encode_error(
    ApiError(503, "node_busy", "This node has all the connections it has room for."), "/"
)
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(_FULL_BODY), _FULL_BODY)
)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class PortTaken(OSError):
    """A port cannot be listened on. The text names the port and the flag that chooses another."""

    def __init__(self, port: int, flag: str, cause: OSError) -> None:
        if cause.errno == errno.EADDRINUSE:
            why = f"port {port} is in use by another program or another node"
        else:
            why = f"port {port} cannot be used: {cause.strerror or cause}"
        super().__init__(cause.errno, f"{why}; choose another with {flag} PORT")
        self.port = port
        self.flag = flag

    def __str__(self) -> str:
        return str(self.strerror)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """The ports in use, once both are."""

    api_port: int
    console_port: int


async def serve_http(
    bridge: Bridge,
    *,
    api: tuple[str, int],
    console: tuple[str, int],
    listen_all: bool = False,
    origins: Collection[str] = (),
    task_status: trio.TaskStatus[Listening],
) -> None:
    """Serve the API and the console until cancelled; to be started in trio with `nursery.start`.

    `api` and `console` are (host, port); port 0 lets the system choose, and `Listening` tells. With `listen_all` the
    hosts are ignored, both ports listen on all addresses, and requests may name any `Host`; commands are still taken
    from this machine only. `origins` are further web origins that may use the API.

    Raises `PortTaken`, having served nobody. Cancellation: `Bridge.run`'s; answers under way have `SHUTDOWN_GRACE`.
    """

    async def main(started: Callable[[Listening], None], stop: asyncio.Event) -> None:
        async with AsyncExitStack() as stack:
            with_flags = ((api, "--port"), (console, "--console"))
            opened = [_listen(*_address(where, listen_all), flag, stack) for where, flag in with_flags]
            proxy = Proxy()
            stack.push_async_callback(proxy.aclose)
            routes = Api(bridge, proxy, any_host=listen_all, origins=origins, tell=bridge.tell)
            pages = Console(bridge, routes, proxy, any_host=listen_all)
            limit = _raise_connection_limit()
            runners = [
                await _start(routes.handle, opened[0], limit),
                await _start(pages.handle, opened[1], limit),
            ]
            try:
                started(Listening(api_port=_port(opened[0]), console_port=_port(opened[1])))
                await stop.wait()
            finally:
                asyncio.get_running_loop().call_later(SHUTDOWN_GRACE - LAST_WORDS, proxy.end)
                await asyncio.gather(*(runner.cleanup() for runner in runners))

    await bridge.run(main, task_status=task_status)


class _Connection(RequestHandler):
    """aiohttp's connection, with errors in our shape and without a stack trace for every port scan."""

    __slots__ = ()

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        """What aiohttp would log as its own failure; a body that a client broke is none."""
        level = (
            logging.DEBUG if isinstance(kwargs.get("exc_info"), web.RequestPayloadError) else logging.ERROR
        )
        log.log(level, *args, **kwargs)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):
            log.debug("the client of a request for %s has gone: %s", request.path, exc)
        elif status >= 500:
            log.error("a request for %s failed", request.path, exc_info=exc)
        else:
            log.debug("no HTTP from %s: %s", request.remote, message)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        if isinstance(exc, ContentEncodingError):
            error = ApiError(415, "unsupported_encoding", "This Content-Encoding is not supported; use gzip.")
        elif status >= 500:
            error = ApiError(status, "internal", "The node failed at this; its log says why.")
        else:
            error = ApiError(status, "bad_request", "This is not a valid HTTP request.")
        response = refuse(error, request.path, {})
        response.force_close()
        return response


class _Front(web.Server):
    """One port's connections. Knows which have a request under way, and makes room among the others."""

    def __init__(self, handler: Handler, limit: int) -> None:
        super().__init__(
            self._handle,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=IDLE_TIMEOUT,
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
            max_headers=MAX_HEADERS,
        )
        self._answer = handler
        self._limit = limit
        self._busy: set[RequestHandler] = set()

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=asyncio.get_running_loop(), **self._kwargs)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._connections) <= self._limit:
            return
        idle = next((one for one in self._connections if one not in self._busy and one is not handler), None)
        if idle is None:
            transport.write(_FULL)
            idle = handler
        idle.force_close()
        # It ends later. Of a burst that was accepted at once, each must find another one to close.
        self._connections.pop(idle, None)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection: Any = request.protocol
        self._busy.add(connection)
        try:
            return await self._answer(request)
        finally:
            self._busy.discard(connection)


async def _start(handler: Handler, sockets: list[socket.socket], limit: int) -> web.ServerRunner:
    runner = web.ServerRunner(_Front(handler, limit), handle_signals=False, shutdown_timeout=SHUTDOWN_GRACE)
    await runner.setup()
    for each in sockets:
        await web.SockSite(runner, each, backlog=BACKLOG).start()
    return runner


def _address(where: tuple[str, int], listen_all: bool) -> tuple[str, int]:
    return ("0.0.0.0", where[1]) if listen_all else where


def _listen(host: str, port: int, flag: str, stack: AsyncExitStack) -> list[socket.socket]:
    """Sockets bound to `host` and its counterpart in the other IP version, as `localhost` may mean either.

    Only the first is needed: many systems have no IPv6.
    """
    opened: list[socket.socket] = []
    twin = {"127.0.0.1": "::1", "0.0.0.0": "::"}.get(host)
    try:
        opened.append(_bound(host, port))
    except OSError as exc:
        raise PortTaken(port, flag, exc) from exc
    stack.callback(opened[0].close)
    if twin is not None:
        with suppress(OSError):
            opened.append(_bound(twin, _port(opened)))
            stack.callback(opened[1].close)
    return opened


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port))
        bound.listen(BACKLOG)  # here, so that a port in use by another socket of ours is found out now
        bound.setblocking(False)
    except BaseException:
        bound.close()
        raise
    return bound


def _port(sockets: list[socket.socket]) -> int:
    return int(sockets[0].getsockname()[1])


def _raise_connection_limit() -> int:
    """Let this process open as many files as the system allows it, and say how many connections a port may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        goal = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (goal, hard))
            soft = goal
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(64, min(MAX_CONNECTIONS, soft // 4))

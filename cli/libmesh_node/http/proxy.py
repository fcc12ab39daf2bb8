"""Carry one request to a llama-server and its answer back, byte for byte and as it comes.

Until the client has been sent something, a failed server is no failure: the next one is tried. After that the answer
must not end as if it were complete: an event stream gets an error event, and the connection is closed without the end
that HTTP asks for, so that every client notices.

A client that goes away cancels the handler (`handler_cancellation`), which closes the connection to the server; that is
how llama-server learns to stop generating.
"""

from __future__ import annotations

import logging
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from yarl import URL

from libmesh_node.http.answers import TAIL, refined_error
from libmesh_node.http.errors import ApiError, encode_stream_error
from libmesh_node.http.exposure import forwarded_headers, returned_headers
from libmesh_node.http.routing import RETRY_AFTER, choose_server, no_server
from libmesh_node.snapshot import Model, Server

log = logging.getLogger("libmesh_node.http")

CONNECT_TIMEOUT = 5.0
"""Seconds to connect to a loopback port. More than one means a stopped process."""

MAX_ATTEMPTS = 4
"""Servers tried for one request, so that one which kills its server does not kill them all."""

IDLE_CONNECTION = 4.0
"""Seconds that an unused connection to a server is kept. llama-server closes after 5 (cpp-httplib,
CPPHTTPLIB_KEEPALIVE_TIMEOUT_SECOND); closing first means hardly ever to write into a closed one."""

WHOLE_ANSWER = 1 << 20
"""Answers announced to be no longer than this are read in full before the client is sent anything, so that a server
that dies while sending one can still be replaced."""

_STREAM = b'"stream"'
"""In a body that may ask for a stream; if it does not, nothing is lost. Such a request has a connection of its own:
llama-server 0.5.0 announces `Keep-Alive` with a stream and then closes all the same, so that a request which follows
on the same connection fails whenever it is faster."""

_SLICE = 1 << 18

_UPSTREAM_FAILURES = (aiohttp.ClientError, OSError, TimeoutError)


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request on its way. What has a default is filled in as it goes, for the log, the headers and the metrics.

    Attributes:
        id: names the request in the log, at the server and to the client.
        headers: for the answer: the id, and CORS.
        began: when its head had been read, by `time.perf_counter`.
        first: when the first bytes of a streamed answer came, by the same clock.
        received: bytes of the answer so far, and `tail` the last of them.
    """

    request: web.BaseRequest
    id: str
    body: bytes
    headers: dict[str, str]
    began: float
    attempts: int = 0
    model: str = ""
    server: Server | None = None
    first: float | None = None
    received: int = 0
    tail: bytes = b""

    def saw(self, data: bytes) -> None:
        """More of the answer came."""
        self.received += len(data)
        self.tail = (self.tail + data[-TAIL:])[-TAIL:]


class Proxy:
    """Sends exchanges to servers and counts what is under way. To be made in a running loop."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._kept = _new_session(aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION))
        self._fresh = _new_session(aiohttp.TCPConnector(limit=0, force_close=True))
        self._rng = rng or random.Random()
        self.in_flight: Counter[str] = Counter()
        self.waiting = 0

    async def aclose(self) -> None:
        """Close the connections to all servers."""
        await self._kept.close()
        await self._fresh.close()

    async def forward(self, exchange: Exchange, find: Callable[[], Model]) -> web.StreamResponse:
        """Answer `exchange` from a server of the model that `find` returns, which is asked before each try.

        Raises `ApiError` 503 if nobody serves it, 502 if servers were tried and none could answer; in both cases the
        client has been sent nothing.
        """
        tried: set[str] = set()
        hung_up: set[str] = set()
        failure: Exception | None = None
        while exchange.attempts < MAX_ATTEMPTS:
            model = find()
            server = choose_server(model.servers, self.in_flight, tried, self._rng)
            if server is None:
                break
            exchange.attempts += 1
            exchange.server, exchange.model = server, model.name
            with self._occupied(server):
                try:
                    upstream, start = await self._open(exchange, server, fresh=server.base_url in hung_up)
                except _UPSTREAM_FAILURES as exc:
                    failure = exc
                    log.warning("%s at %s did not answer: %s", model.name, server.peer, _in_words(exc))
                    # A kept connection may have been closed under us. That says nothing of the server: ask once more.
                    if _hung_up(exc) and server.base_url not in hung_up:
                        hung_up.add(server.base_url)
                    else:
                        tried.add(server.base_url)
                    continue
                with closing(upstream):
                    tried.add(server.base_url)
                    if upstream.status == 503 and choose_server(model.servers, {}, tried, self._rng):
                        continue
                    return await self._relay(exchange, upstream, start)
        if failure is None and exchange.attempts == 0:
            raise no_server(find())
        message = (
            f"The servers of `{find().name}` that were asked broke off or could not be reached; try again."
        )
        raise ApiError(502, "server_failed", message, retry_after=RETRY_AFTER)

    async def _open(
        self, exchange: Exchange, server: Server, *, fresh: bool
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """Send the request and wait for the start of the answer: its whole if it is short, else the first bytes.

        With `fresh`, on a connection of its own.
        """
        request = exchange.request
        headers = forwarded_headers(request.headers)
        headers["X-Request-Id"] = exchange.id
        data: bytes | AsyncIterator[bytes] | None = exchange.body or None
        if len(exchange.body) > _SLICE:
            headers["Content-Length"] = str(len(exchange.body))
            data = _slices(exchange.body)
        session = self._fresh if fresh or _STREAM in exchange.body else self._kept
        self.waiting += 1
        try:
            upstream = await session.request(
                request.method,
                URL(server.base_url + request.rel_url.raw_path_qs, encoded=True),
                data=data,
                headers=headers,
                allow_redirects=False,
            )
            try:
                if upstream.content_length is not None and upstream.content_length <= WHOLE_ANSWER:
                    return upstream, await upstream.read()
                return upstream, await upstream.content.readany()
            except BaseException:
                upstream.close()
                raise
        finally:
            self.waiting -= 1

    async def _relay(
        self, exchange: Exchange, upstream: aiohttp.ClientResponse, start: bytes
    ) -> web.StreamResponse:
        request = exchange.request
        headers = returned_headers(upstream.headers.items())
        headers.update(exchange.headers)
        headers["X-Libmesh-Node"] = exchange.server.peer if exchange.server else ""
        headers["X-Libmesh-Attempts"] = str(exchange.attempts)
        if upstream.content.at_eof() and request.method != "HEAD":
            headers.popall("Content-Length", None)
            exchange.saw(start)
            if upstream.status >= 400:
                status, body = refined_error(upstream.status, start, request.path)
                return web.Response(status=status, headers=headers, body=body)
            return web.Response(status=upstream.status, reason=upstream.reason, headers=headers, body=start)
        exchange.first = time.perf_counter()
        response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
        await response.prepare(request)
        try:
            chunk = start
            while chunk:
                exchange.saw(chunk)
                await response.write(chunk)
                chunk = await _next(upstream)
        except _Broken as broken:
            await self._break_off(exchange, response, broken)
        return response

    async def _break_off(self, exchange: Exchange, response: web.StreamResponse, broken: _Broken) -> None:
        """End the answer so that no client can take it for complete."""
        request = exchange.request
        peer = exchange.server.peer if exchange.server else "?"
        log.warning("the answer of %s to %s broke off: %s", peer, request.path, broken)
        if response.content_type == "text/event-stream":
            message = "The server broke off in the middle of its answer. What came before is all there is."
            await response.write(encode_stream_error(ApiError(502, "server_failed", message), request.path))
        transport = request.transport
        if transport is None:
            return
        if request.version < aiohttp.HttpVersion11:
            # Its answers end with the connection, so only a reset is not an end; without the linger abort() sends none.
            linger = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            transport.abort()
        else:
            transport.close()  # after what was written, and without the last chunk

    @contextmanager
    def _occupied(self, server: Server) -> Iterator[None]:
        self.in_flight[server.base_url] += 1
        try:
            yield
        finally:
            self.in_flight[server.base_url] -= 1
            if self.in_flight[server.base_url] <= 0:
                del self.in_flight[server.base_url]


def _new_session(connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    """A client for servers: adds nothing to requests, decodes nothing, waits as long as it takes."""
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        read_bufsize=_SLICE,
    )


class _Broken(Exception):
    """The server's side of an answer ended early."""


def _in_words(failure: Exception) -> str:
    """For the log: the text of aiohttp's own error for a failed connection is full of its parameters."""
    if isinstance(failure, aiohttp.ClientConnectorError):
        return f"cannot connect: {failure.os_error.strerror or failure.os_error}"
    return str(failure) or type(failure).__name__


def _hung_up(failure: Exception) -> bool:
    """Whether a connection that stood was closed before any answer."""
    if isinstance(failure, aiohttp.ClientConnectorError):
        return False
    return isinstance(failure, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError)


async def _next(upstream: aiohttp.ClientResponse) -> bytes:
    try:
        return await upstream.content.readany()
    except _UPSTREAM_FAILURES as exc:
        raise _Broken(str(exc) or type(exc).__name__) from exc


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    view = memoryview(body)
    for start in range(0, len(body), _SLICE):
        yield bytes(view[start : start + _SLICE])

"""Requests to llama-servers: connections, what counts as a failure, and answers as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial

import aiohttp
from yarl import URL

from libmesh_node.http.connections import Loopback, Pool
from libmesh_node.http.single import SingleAnswer, ask, encode_post
from libmesh_node.http.sse import MAX_EVENT, holds_event, skip_comments

CONNECT_TIMEOUT = 5.0
"""Seconds to connect to a loopback port. More than one means a stopped process."""

IDLE_CONNECTION = 4.0
"""Seconds that an unused connection to a server is kept. llama-server closes after 5 (cpp-httplib,
CPPHTTPLIB_KEEPALIVE_TIMEOUT_SECOND); closing first means hardly ever to write into a closed one."""

WHOLE_ANSWER = 1 << 20
"""Answers announced to be no longer than this are read in full before the client is sent anything, so that a server
that dies while sending one can still be replaced."""

STALL = 60.0
"""Seconds without a byte of an answer that has begun. llama-server sends a comment every 30, whatever it does meanwhile."""

ONLY_COMMENTS = 600.0
"""Seconds with nothing but comments in an event stream that has begun: as long as the SDKs of OpenAI and Anthropic wait. A
server may be computing another request's long prompt."""

Answer = aiohttp.ClientResponse | SingleAnswer

FAILURES = (aiohttp.ClientError, OSError, TimeoutError)

_STREAM = b'"stream"'
"""In a body that may ask for a stream; if it does not, nothing is lost. Such a request has a connection of its own:
llama-server 0.5.0 announces `Keep-Alive` with a stream and then closes all the same, so that a request which follows
on the same connection fails whenever it is faster."""

_SLICE = 1 << 18


class Broken(Exception):
    """The server's side of an answer ended early."""


class Overdue(TimeoutError):
    """A server has said nothing for so long that another one is asked."""


class Stale(aiohttp.ServerDisconnectedError):
    """A connection that had served another request was closed before any answer, which says nothing of the server."""


class Upstream:
    """Connections to servers. To be made in a running loop.

    Attributes:
        waiting: requests that have had no byte of an answer yet.
        connections: to tunnels.
        fresh: a client each of whose requests has a connection to itself.
        kept: a client whose connections serve one request after the other.
    """

    def __init__(self) -> None:
        self.kept = _new_session(Loopback(keep=IDLE_CONNECTION))
        self.fresh = _new_session(Loopback())
        self.connections = Pool()
        self.waiting = 0

    async def aclose(self) -> None:
        """Close the connections to all servers."""
        self.connections.forget(())
        await self.kept.close()
        await self.fresh.close()

    @staticmethod
    def wants_own(body: bytes) -> bool:
        """Whether a request has a connection of its own, which nobody can have closed before."""
        return _STREAM in body

    async def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        fresh: bool,
        tunnel: bool = False,
        headed: Callable[[Answer], object] = lambda answer: None,
    ) -> tuple[Answer, bytes]:
        """Send a request and wait for the start of the answer: its whole if it is short, else the first bytes.

        Of an event stream that is at least one whole event, so that a server which dies before has sent nothing. Comments
        are none: a server that hangs sends them, too.

        With `fresh`, on a connection of its own; through a `tunnel` that may have served others before. `headed` is told of the
        answer when its head is there: for what can be done until the first of its body comes. Raises one of `FAILURES`, and what `headed` does. The caller closes the answer.
        """
        self.waiting += 1
        try:
            own = fresh or self.wants_own(body)
            answer: Answer | None = None
            if own and method == "POST" and len(body) <= _SLICE:
                answer = await self._ask_alone(url, headers, body, tunnel, headed)
            if answer is None:
                answer = await self._ask(self.fresh if own else self.kept, method, url, headers, body)
            try:
                if isinstance(answer, aiohttp.ClientResponse):
                    headed(answer)
                if answer.content_length is not None and answer.content_length <= WHOLE_ANSWER:
                    return answer, await answer.read()
                start = await answer.content.readany()
                if answer.status == 200 and answer.content_type == "text/event-stream":
                    start = await _first_event(answer, start)
                return answer, start
            except BaseException:
                answer.close()
                raise
        finally:
            self.waiting -= 1

    async def _ask_alone(
        self,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        tunnel: bool,
        headed: Callable[[Answer], object],
    ) -> SingleAnswer | None:
        """`None`, and nothing was asked, for headers that would be more than that."""
        where, _, path = url.removeprefix("http://").partition("/")
        host, _, port = where.rpartition(":")
        if (request := encode_post(where, f"/{path}", headers, body)) is None:
            return None
        connection = await self.connections.take(host, int(port), CONNECT_TIMEOUT, used=tunnel)
        back = partial(self.connections.back, host, int(port)) if tunnel else None
        try:
            return await ask(connection, request, _SLICE, back, headed)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as exc:
            if not connection.used:
                raise
            self.connections.drop(host, int(port))  # they may be no better
            raise Stale(str(exc)) from exc

    @staticmethod
    async def _ask(
        session: aiohttp.ClientSession, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> aiohttp.ClientResponse:
        headers = dict(headers)
        data: bytes | AsyncIterator[bytes] | None = body or None
        if len(body) > _SLICE:
            headers["Content-Length"] = str(len(body))
            data = _slices(body)
        return await session.request(
            method, URL(url, encoded=True), data=data, headers=headers, allow_redirects=False
        )


async def _first_event(answer: Answer, start: bytes) -> bytes:
    while not holds_event(start := skip_comments(start)) and len(start) <= MAX_EVENT:
        async with asyncio.timeout(STALL):
            more = await answer.content.readany()
        if not more:
            raise aiohttp.ClientPayloadError("it ended before its first event")
        start += more
    return start


class Listening:
    """Reads on in an answer that has begun. To be closed, which closes no answer.

    One timer looks now and then for how long it has waited: one for each piece costs more than all else that is done about it.
    """

    def __init__(self, answer: Answer, *, events: bool) -> None:
        """With `events`, what has no data in it is a comment."""
        self._answer, self._events = answer, events
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()  # something else than a comment
        self._waits_since: float | None = None
        self._due: asyncio.TimerHandle | None = None

    async def next(self) -> bytes:
        """The next bytes; empty at the end. Raises `Broken`."""
        now = self._waits_since = self._loop.time()
        if self._due is None:
            self._due = self._loop.call_at(now + STALL, self._look)
        try:
            if now - self._heard >= ONLY_COMMENTS:
                raise Broken(f"nothing but comments came for {now - self._heard:.0f} s")
            data = await self._answer.content.readany()
        except FAILURES as exc:
            raise Broken(in_words(exc)) from exc
        finally:
            self._waits_since = None
        if not self._events or b"data:" in data:
            self._heard = self._loop.time()
        return data

    def _look(self) -> None:
        now = self._loop.time()
        since = now if self._waits_since is None else self._waits_since
        if now - since < STALL:
            self._due = self._loop.call_at(since + STALL, self._look)
        else:
            self._answer.content.set_exception(TimeoutError(f"nothing came for {STALL:g} s"))

    def finish(self) -> None:
        """Nothing more of the answer is wanted; see `SingleAnswer.finish`."""
        if isinstance(self._answer, SingleAnswer):
            self._answer.finish()

    def close(self) -> None:
        """Look no more. Harmless to repeat."""
        if self._due is not None:
            self._due.cancel()


def in_words(failure: Exception) -> str:
    """For the log: the texts of aiohttp's own errors for a failed connection and for half an answer are full of its parts."""
    if isinstance(failure, aiohttp.ClientConnectorError):
        return f"cannot connect: {failure.os_error.strerror or failure.os_error}"
    if str(failure).startswith("Response payload is not completed"):
        return "it was cut off"
    return str(failure) or type(failure).__name__


def hung_up(failure: Exception) -> bool:
    """Whether a connection that stood was closed before any answer."""
    if isinstance(failure, aiohttp.ClientConnectorError):
        return False
    return isinstance(failure, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError)


def _new_session(connector: Loopback) -> aiohttp.ClientSession:
    """A client for servers: adds nothing to requests, decodes nothing, waits as long as it takes."""
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        read_bufsize=_SLICE,
    )


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    view = memoryview(body)
    for start in range(0, len(body), _SLICE):
        yield bytes(view[start : start + _SLICE])

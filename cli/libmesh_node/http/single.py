"""One request on a connection that it has to itself, or has for the moment.

What goes through the mesh goes this way (`connections.py`). aiohttp's client is made for cookies, redirects, proxies and
connections that are shared, and takes longer for one request than all else that a node does about it. Its parser here is
llhttp alone, which calls what is needed and nothing else; what fails, fails with aiohttp's errors. It is strict: what RFC 9112
lets a client tolerate in a head (2.2, 5.1, 5.2), and llama-server does not send, is none.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum, auto

import aiohttp
import httptools
from multidict import CIMultiDict

from libmesh_node.http.connections import Connection

Back = Callable[[Connection], None]

END_LIMIT = 1.0
"""Seconds for the end of an answer of which nothing more is wanted."""

MOST_FRAMING = 64 * 1024
"""Bytes in a row that are no part of an answer's body: of its head, or of what HTTP puts around the pieces of a body."""

MOST_PIECES = 1024
"""Pieces of a body that are read ahead, however short they are."""


class _Stage(Enum):
    HEAD = auto()
    BODY = auto()
    WHOLE = auto()


class SingleAnswer:
    """The head of an answer, and its body as it comes: what `aiohttp.ClientResponse` has of the same names.

    Whoever has it must `close` it. If it has come whole, or what is left is only its end (`finish`), `back` is called, so that the
    connection may serve another request; otherwise it is closed. `headed` is called with it once its head is there.

    About `buffer` bytes of the body are read ahead; of one of which nothing more is wanted (`finish`), none.
    """

    def __init__(
        self,
        connection: Connection,
        buffer: int,
        back: Back | None,
        headed: Callable[[SingleAnswer], object] | None,
    ) -> None:
        self._connection, self._buffer, self._back, self._headed = connection, buffer, back, headed
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._stage = _Stage.HEAD
        self._failure: BaseException | None = None  # before it was whole
        self._reason, self._head = b"", list[tuple[str, str]]()
        self._pieces, self._size = deque[bytes](), 0
        self._framing = 0  # bytes since the last of the body
        self._until_end = False  # of the connection
        self._may_follow = False  # another answer on the connection
        self._paused = self._finished = self._closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._limit: asyncio.TimerHandle | None = None
        self.status = 0
        self.reason = ""
        self.headers: CIMultiDict[str] = CIMultiDict()

    # ── for whoever asked ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def content_type(self) -> str:
        """Without its parameters."""
        return self.headers.get("Content-Type", "application/octet-stream").partition(";")[0].strip().lower()

    @property
    def content_length(self) -> int | None:
        """As announced."""
        length = self.headers.get("Content-Length")
        return None if length is None else int(length)

    @property
    def content(self) -> SingleAnswer:
        """What has `readany`, `at_eof` and `set_exception`."""
        return self

    async def read(self) -> bytes:
        """The whole body. Raises what `readany` does."""
        pieces = []
        while piece := await self.readany():
            pieces.append(piece)
        return b"".join(pieces)

    async def readany(self) -> bytes:
        """More of the body; empty at its end. Raises `aiohttp.ClientError`. If cancelled, nothing is lost."""
        await self.begun()
        if not self._pieces:
            return b""
        data = self._pieces.popleft() if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        if self._paused and self._connection.transport is not None:
            self._paused = False
            self._connection.transport.resume_reading()
        return data

    async def begun(self) -> None:
        """Wait for its head, and then for more of its body, or its end. Raises what `readany` does."""
        while not self._pieces and self._stage is not _Stage.WHOLE:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def at_eof(self) -> bool:
        """Whether all of it was read."""
        return self._stage is _Stage.WHOLE and not self._pieces

    def set_exception(self, failure: BaseException) -> None:
        """Have `readany` raise it."""
        if self._failure is None and self._stage is not _Stage.WHOLE:
            self._failure = failure
        self._wake()

    def finish(self) -> None:
        """Nothing more of it is wanted. Its end may still have to come, as it does of an event stream after the last event."""
        self._finished = True

    def close(self) -> None:
        """Give the connection back, or close it, at once. Harmless to repeat."""
        if self._closed:
            return
        self._closed = True
        if self._back is None or not (self._finished or self.at_eof()):
            self._connection.close()
        elif self._stage is _Stage.WHOLE:
            self._give_back()
        else:
            self._limit = asyncio.get_running_loop().call_later(END_LIMIT, self._connection.close)

    # ── for the connection ───────────────────────────────────────────────────────────────────────────────────────

    def feed(self, data: bytes) -> None:
        """More bytes came."""
        if self._parser is None:
            return
        self._framing += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail("it goes on with another protocol than HTTP")
        except httptools.HttpParserError as exc:
            self._fail(f"it does not speak HTTP: {exc}")
        else:
            if self._framing > MOST_FRAMING:
                self._fail("it sends more around its answer than an answer needs")
        if self._stage is not _Stage.HEAD and self._headed is not None:
            headed, self._headed = self._headed, None
            try:
                headed(self)
            except Exception as exc:  # noqa: BLE001 - it is raised where somebody waits for the answer
                self._stage, self._failure = _Stage.BODY, exc
                self._pieces.clear()
                self._wake()
        if self._pieces or self._stage is _Stage.WHOLE:
            self._wake()
        if self._stage is _Stage.WHOLE and self._limit is not None:
            self._give_back()

    def lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._let_go()
        if self._stage is _Stage.BODY and self._until_end and exc is None:
            self._stage = _Stage.WHOLE
        elif self._stage is not _Stage.HEAD:
            self.set_exception(aiohttp.ClientPayloadError("Response payload is not completed"))
        elif isinstance(exc, OSError):
            self.set_exception(aiohttp.ClientOSError(exc.errno, exc.strerror))
        else:
            self.set_exception(aiohttp.ServerDisconnectedError())
        self._wake()

    # ── for the parser ───────────────────────────────────────────────────────────────────────────────────────────

    def on_message_begin(self) -> None:
        """Of a second answer, nobody asked for it."""
        if self._stage is _Stage.WHOLE:
            self._connection.close()

    def on_status(self, reason: bytes) -> None:
        """May come in pieces."""
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """One at the end of the body is of no use."""
        if self._stage is _Stage.HEAD:
            self._head.append(
                (name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape"))
            )

    def on_headers_complete(self) -> None:
        """After them comes the body, or the end, of an answer that is only a provisional one, too (RFC 9110, 15.2)."""
        assert self._parser is not None
        status = self._parser.get_status_code()
        if self._stage is not _Stage.HEAD or 100 <= status <= 199:
            self._reason, self._head = b"", []
            return
        if status < 100:
            raise ValueError(f"there is no status {status}")  # which the parser makes an error of its own
        self._stage = _Stage.BODY
        self.status, self.reason = status, self._reason.decode("utf-8", "replace")
        self.headers.extend(self._head)
        # RFC 9112, 6.3
        codings = ",".join(self.headers.getall("Transfer-Encoding", ())).lower()
        is_chunked = codings.rpartition(",")[2].strip() == "chunked"
        self._until_end = not is_chunked and (bool(codings) or "Content-Length" not in self.headers)

    def on_body(self, data: bytes) -> None:
        """A piece of it."""
        if self._stage is not _Stage.BODY or self._finished:
            return
        self._framing = 0
        self._pieces.append(data)
        self._size += len(data)
        is_much = self._size > self._buffer or len(self._pieces) > MOST_PIECES
        if is_much and not self._paused and self._connection.transport is not None:
            self._paused = True
            self._connection.transport.pause_reading()

    def on_message_complete(self) -> None:
        """The end of the answer, or of a provisional one."""
        if self._stage is _Stage.BODY:
            assert self._parser is not None
            self._stage, self._may_follow = _Stage.WHOLE, self._parser.should_keep_alive()

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, why: str) -> None:
        self.set_exception(aiohttp.ClientPayloadError(why))
        self._connection.close()

    def _let_go(self) -> None:
        """Nothing more comes for it. The parser knows this answer, too: that would be garbage that only the collector finds."""
        self._connection.answer = self._parser = None
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _give_back(self) -> None:
        self._let_go()
        may_follow = self._may_follow and not self._paused and self._connection.is_usable
        if self._back is not None and may_follow:
            self._back(self._connection)
        else:
            self._connection.close()


def encode_post(host: str, path: str, headers: Mapping[str, str], body: bytes) -> bytes | None:
    """A whole POST request; `None` if a header would be more than a header."""
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    lines.append(f"Content-Length: {len(body)}")
    head = "\n".join(lines)
    if "\r" in head or "\0" in head or head.count("\n") != len(lines) - 1:
        return None
    return head.replace("\n", "\r\n").encode(errors="surrogateescape") + b"\r\n\r\n" + body


async def ask(
    connection: Connection,
    request: bytes,
    buffer: int,
    back: Back | None = None,
    headed: Callable[[SingleAnswer], object] | None = None,
) -> SingleAnswer:
    """Send `request`, and wait for the first bytes of the answer's body, or for its end; `headed` is told of its head before.

    `back` takes the connection when the exchange is over, for another one; without, it is closed. Takes over `connection`, and
    resets it on error and if cancelled. Raises `aiohttp.ClientError`, and what `headed` does.
    """
    try:
        answer = SingleAnswer(connection, buffer, back, headed)
        connection.send(request, answer)
        await answer.begun()
    except BaseException:
        connection.cut()
        raise
    return answer

"""One request on a connection that it has to itself.

What goes through the mesh goes this way (`connections.py`), and aiohttp's client, made for cookies, redirects, proxies and
connections that are shared, takes longer for one request than all else that a node does about it. Of its parts these are here
the connection, the parser and the reader; so what fails, fails with the same errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDictProxy

from libmesh_node.http.connections import Connection

Back = Callable[[Connection], None]

END_LIMIT = 1.0
"""Seconds for the end of an answer of which nothing more is wanted."""


class SingleAnswer:
    """The head of an answer, and its body as it comes: what `aiohttp.ClientResponse` has of the same names.

    Whoever has it must `close` it. If it has come whole, or what is left is only its end (`finish`), `back` is called, so that the
    connection may serve another request; otherwise it is closed.
    """

    def __init__(
        self,
        connection: Connection,
        status: int,
        reason: str | None,
        headers: CIMultiDictProxy[str],
        content: aiohttp.StreamReader,
        back: Back | None,
    ) -> None:
        self._connection, self._back = connection, back
        self.status, self.reason, self.headers, self.content = status, reason, headers, content
        self._finished = self._closed = False

    @property
    def content_type(self) -> str:
        """Without its parameters."""
        return self.headers.get("Content-Type", "application/octet-stream").partition(";")[0].strip().lower()

    @property
    def content_length(self) -> int | None:
        """As announced."""
        length = self.headers.get("Content-Length")
        return None if length is None else int(length)

    async def read(self) -> bytes:
        """The whole body. Raises what `content` does."""
        return await self.content.read()

    def finish(self) -> None:
        """Nothing more of it is wanted. Its end may still have to come, as it does of an event stream after the last event."""
        self._finished = True

    def close(self) -> None:
        """Give the connection back, or close it, at once. Harmless to repeat."""
        if self._closed:
            return
        self._closed = True
        if self._back is not None and (self._finished or self.content.at_eof()):
            limit = asyncio.get_running_loop().call_later(END_LIMIT, self._connection.close)
            self.content.on_eof(lambda: self._give_back(limit))
        else:
            self._connection.close()

    def _give_back(self, limit: asyncio.TimerHandle) -> None:
        limit.cancel()
        if self._back is None or self._connection.should_close:
            self._connection.close()
        else:
            self._back(self._connection)


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


async def ask(connection: Connection, request: bytes, buffer: int, back: Back | None = None) -> SingleAnswer:
    """Send `request`, and wait for the head of the answer, of whose body about `buffer` bytes are read ahead.

    `back` takes the connection when the exchange is over, for another one; without, it is closed. Takes over `connection` and closes it on error and if cancelled. Raises `aiohttp.ClientError` or `OSError`.
    """
    try:
        if connection.transport is None:
            raise aiohttp.ServerDisconnectedError
        connection.set_response_params(read_until_eof=True, auto_decompress=False, read_bufsize=buffer)
        connection.transport.write(request)
        while True:
            try:
                message, content = await connection.read()
            except HttpProcessingError as exc:
                raise aiohttp.ClientPayloadError(f"it does not speak HTTP: {exc.message}") from exc
            if not 100 <= message.code <= 199 or message.code == 101:
                return SingleAnswer(connection, message.code, message.reason, message.headers, content, back)
    except BaseException:
        connection.cut()
        raise

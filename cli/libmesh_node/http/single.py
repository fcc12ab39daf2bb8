"""One request on a connection of its own, which serves no other.

What goes through the mesh goes this way (`connections.py`), and aiohttp's client, made for cookies, redirects, proxies and
connections that are shared, takes longer for one request than all else that a node does about it. Of its parts these are here
the connection, the parser and the reader; so what fails, fails with the same errors.
"""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDictProxy


class SingleAnswer:
    """The head of an answer, and its body as it comes: what `aiohttp.ClientResponse` has of the same names.

    Whoever has it must `close` it, which closes the connection unless the end of the body did.
    """

    def __init__(
        self,
        connection: ResponseHandler,
        status: int,
        reason: str | None,
        headers: CIMultiDictProxy[str],
        content: aiohttp.StreamReader,
    ) -> None:
        self._connection = connection
        self.status, self.reason, self.headers, self.content = status, reason, headers, content
        content.on_eof(connection.close)

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

    def close(self) -> None:
        """Close the connection, at once. Harmless to repeat."""
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


async def ask(connection: ResponseHandler, request: bytes, buffer: int) -> SingleAnswer:
    """Send `request`, and wait for the head of the answer, of whose body about `buffer` bytes are read ahead.

    Takes over `connection` and closes it on error and if cancelled. Raises `aiohttp.ClientError` or `OSError`.
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
                return SingleAnswer(connection, message.code, message.reason, message.headers, content)
    except BaseException:
        connection.close()
        raise

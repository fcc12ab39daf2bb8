"""Take in request bodies, and never more of them than fits.

A body is read in full before it is passed on: `model` may stand anywhere in it, and another server may have to be
asked. So bodies are bounded each and all together, and a sender may be slow, but not for ever.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from libmesh_node.http.errors import ApiError

MAX_BODY = 64 << 20
"""Bytes of one body, after decompression; more gets 413. A dozen large photographs in base64."""

MAX_HELD = 512 << 20
"""Bytes of all bodies held at once; more gets 503. Eight of the largest."""

SILENCE = 60.0
"""Seconds without a byte of an announced body before 408. nginx and Apache have the same."""

_DECODED = frozenset({"identity", "gzip", "x-gzip", "deflate"})
"""Content encodings that the server underneath has undone by the time the body gets here."""


class Intake:
    """Counts what is held. `limit` and `total` are bytes."""

    def __init__(self, limit: int = MAX_BODY, total: int = MAX_HELD) -> None:
        self.limit = limit
        self.total = total
        self.held = 0

    def hold(self) -> Hold:
        """Room for one body."""
        return Hold(self)


class Hold:
    """One body's share of an `Intake`, given back at the end of a `with` block."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self.size = 0

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self._intake.held -= self.size

    async def read(self, request: web.BaseRequest) -> bytes:
        """The whole body. Raises `ApiError`: 413 too large, 503 no room, 408 too slow, 400 broken, 415, 417."""
        limit = self._intake.limit
        if (request.content_length or 0) > limit:
            raise _too_large(limit)
        encoding = request.headers.get("Content-Encoding", "identity").lower()
        if encoding not in _DECODED:
            raise ApiError(
                415, "unsupported_encoding", f"Content-Encoding {encoding[:40]} is not supported; use gzip."
            )
        await _agree_to_continue(request)
        content = request.content
        chunks: list[bytes] = []
        try:
            if content.is_eof():  # it came with its head, as short ones do
                whole = content.read_nowait()
                self._take(len(whole))
                return whole
            async with asyncio.timeout(SILENCE) as patience:
                while chunk := await content.readany():
                    self._take(len(chunk))
                    chunks.append(chunk)
                    patience.reschedule(asyncio.get_running_loop().time() + SILENCE)
        except TimeoutError:
            raise ApiError(408, "body_too_slow", f"No byte of the body came for {SILENCE:g} s.") from None
        except web.RequestPayloadError as exc:
            raise ApiError(400, "invalid_body", f"The body cannot be read: {exc}.") from exc
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _take(self, size: int) -> None:
        intake = self._intake
        if self.size + size > intake.limit:
            raise _too_large(intake.limit)
        if intake.held + size > intake.total:
            message = "This node holds as many request bodies as it has room for; try again in a moment."
            raise ApiError(503, "node_busy", message, retry_after=1)
        self.size += size
        intake.held += size


async def _agree_to_continue(request: web.BaseRequest) -> None:
    """Ask for the body of a client that waits to be asked (RFC 9110, 10.1.1)."""
    expectation = request.headers.get("Expect")
    if expectation is None:
        return
    if expectation.lower() != "100-continue":
        raise ApiError(417, "expectation_failed", "Only `Expect: 100-continue` is understood.")
    if request.transport is not None and request.version >= (1, 1):
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "request_too_large", f"The request body is larger than {limit >> 20} MiB.")

"""Keep the client of a stream that waits long for its first byte: with comments, which every reader of events skips.

Before `SILENCE` has passed, a request that cannot be answered gets its status. After that the answer has begun, and what
goes wrong is an event of it. Its headers name who was asked by then; if another one answers, a comment says so.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from aiohttp import web

from libmesh_node.http.errors import ApiError, encode_stream_error
from libmesh_node.http.exchange import Exchange
from libmesh_node.http.sse import comment

SILENCE = 25.0
"""Seconds until the first comment: longer than any refusal takes that does not wait for a model to be loaded. Proxies and
clients give up after 30 at the earliest, most after 60."""

SAY_EVERY = 10.0
"""Seconds between two comments."""


class Kept:
    """Keeps the client of a request that asked for a stream until it is closed, and tells it why it waits.

    What is said is written by another task, and not said any more once this is closed.
    """

    def __init__(self, exchange: Exchange, seeking: str, asked: str) -> None:
        """The reasons: that no server has room, and that one was asked."""
        self._exchange, self._seeking, self._asked = exchange, seeking, asked
        self._task: asyncio.Task[None] | None = None
        self._due: asyncio.Handle = asyncio.get_running_loop().call_later(SILENCE, self._talk)

    def close(self) -> None:
        """Harmless to repeat."""
        self._due.cancel()
        if self._task is not None:
            self._task.cancel()

    def _talk(self) -> None:
        if not self._exchange.wanted.streams or self._exchange.request.method != "POST":
            return
        why = self._seeking if self._exchange.seeking else self._asked
        self._task = asyncio.create_task(_talk(self._exchange, why))


async def _talk(exchange: Exchange, why: str) -> None:
    with suppress(OSError):  # the client has left, which cancels its request
        while True:
            await _say(exchange, why)
            await asyncio.sleep(SAY_EVERY)


async def _say(exchange: Exchange, why: str) -> None:
    said = ""
    if exchange.response is None:
        asked = exchange.server if not exchange.seeking else None
        exchange.labelled = exchange.labels(asked.peer if asked else "")
        headers = exchange.headers | exchange.labelled
        headers |= {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        exchange.response = web.StreamResponse(headers=headers)
        await exchange.response.prepare(exchange.request)
        said = why
    await exchange.response.write(comment(said))


async def refuse_late(exchange: Exchange, error: ApiError) -> web.StreamResponse:
    """End an answer that has begun with comments with `error`. Raises it if none has begun."""
    if exchange.response is None:
        raise error
    exchange.broken = True
    await exchange.response.write(encode_stream_error(error, exchange.request.path))
    return exchange.response

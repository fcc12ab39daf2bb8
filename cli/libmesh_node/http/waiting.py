"""Keep the client of a stream that waits long for its first byte: with comments, which every reader of events skips.

Before `SILENCE` has passed, a request that cannot be answered gets its status. After that the answer has begun, and what
goes wrong is an event of it. Its headers name who was asked by then; if another one answers, a comment says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from aiohttp import web

from libmesh_node.http.errors import ApiError, encode_stream_error
from libmesh_node.http.exchange import Exchange
from libmesh_node.http.sse import comment

T = TypeVar("T")

SILENCE = 25.0
"""Seconds until the first comment: longer than any refusal takes that does not wait for a model to be loaded. Proxies and
clients give up after 30 at the earliest, most after 60."""

SAY_EVERY = 10.0
"""Seconds between two comments."""


async def kept(
    exchange: Exchange,
    waiting: Coroutine[Any, Any, T],
    why: str,
    drop: Callable[[T], object] = lambda result: None,
) -> T:
    """What `waiting` returns or raises; meanwhile its client is kept, if it asked for a stream, and told `why`.

    Cancelling cancels `waiting` and waits for its end. A result that comes all the same is given to `drop`.
    """
    if not exchange.wanted.streams or exchange.request.method != "POST":
        return await waiting
    task = asyncio.create_task(waiting)
    pause = SILENCE if exchange.response is None else SAY_EVERY
    try:
        while not (await asyncio.wait((task,), timeout=pause))[0]:
            await _say(exchange, why)
            pause = SAY_EVERY
    except BaseException:
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled() and task.exception() is None:
            drop(task.result())
        raise
    return task.result()


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

"""Find out what a request wants, and whether its answer could be continued."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

from libmesh_node.http.body import LONG, read_object
from libmesh_node.http.exchange import Exchange
from libmesh_node.http.replay import follow
from libmesh_node.http.wanted import MARK, Wanted, read_wanted

GENERATING = frozenset({"completions", "completion", "messages", "responses", "infill"})
"""Ends of the paths whose answers are generated; the others only compute a prompt, if that."""


async def understand(exchange: Exchange) -> None:
    """Fill in `wants` and `transcript`, and the body that is sent to servers. A long body is read in another thread."""
    request, body = exchange.request, exchange.body
    if request.method != "POST" or request.content_type == "multipart/form-data":
        return
    if len(body) <= LONG:
        _read(exchange)
    else:
        exchange.said = exchange.said or await asyncio.to_thread(read_object, body)
        await asyncio.to_thread(_read, exchange)
        await asyncio.to_thread(lambda: exchange.wanted.prefixes)


def _read(exchange: Exchange) -> None:
    said, body, request = exchange.said or {}, exchange.body, exchange.request
    marked = MARK.encode() in body

    def wants() -> Wanted:
        wanted = read_wanted(said, request.headers, marked=marked)
        computes_only = request.path.rpartition("/")[2] not in GENERATING
        return replace(wanted, max_tokens=0) if computes_only else wanted

    exchange.wants = wants
    with suppress(RecursionError):  # it was read where less of the stack was in use: it goes as it came
        if (transcript := follow(request.path, said, body)) is not None:
            exchange.transcript, exchange.body = transcript, transcript.body
    exchange.said = None  # which takes several times what the body does

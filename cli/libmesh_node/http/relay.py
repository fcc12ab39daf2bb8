"""Carry an answer to the client, whatever becomes of its server.

What was sent cannot be taken back. So an event stream that breaks off goes on from another server where that is right
(`transcript.py`), and ends with an error event where it is not. Any other answer is closed without the end that HTTP asks
for. No client can take a part for the whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import closing, suppress

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from libmesh_node.http.answers import refined_error
from libmesh_node.http.balance import Balance, Seat
from libmesh_node.http.connections import cut
from libmesh_node.http.continuing import PATIENCE, SAY_EVERY, NobodyGoesOn, Succession
from libmesh_node.http.errors import ApiError, encode_stream_error
from libmesh_node.http.exchange import Exchange
from libmesh_node.http.exposure import returned_headers
from libmesh_node.http.replay import Replay
from libmesh_node.http.retelling import Diverged
from libmesh_node.http.sse import EventTooLong, comment
from libmesh_node.http.transcript import BrokenOff, Transcript
from libmesh_node.http.upstream import Answer, Broken, Listening
from libmesh_node.http.waiting import refuse_late

log = logging.getLogger("libmesh_node.http")

MAX_BARREN = 4
"""Servers in a row that took an answer over and broke off before they had added a byte."""

MAX_SUCCESSORS = 16
"""Servers in all that may go on with one answer, so that one which kills its servers comes to an end."""

LAST_WORDS = 0.2
"""Seconds that a client may take to hear that the node ends."""


def heading(exchange: Exchange, upstream: Answer) -> CIMultiDict[str]:
    """The headers for an answer that is `upstream`'s."""
    headers = returned_headers(upstream.headers.items())
    headers.update(exchange.headers | _labels(exchange))
    return headers


def _labels(exchange: Exchange) -> dict[str, str]:
    return exchange.labels(exchange.server.peer if exchange.server else "")


async def relay(
    exchange: Exchange,
    upstream: Answer,
    start: bytes,
    succession: Succession,
    balance: Balance,
    seat: Seat,
) -> web.StreamResponse:
    """Send the client `upstream`'s answer, of which `start` was read already, and whatever must follow it.

    Closes the answers of further servers, not `upstream`, and moves `seat` to them. Tells `balance` of servers that broke
    off; `exchange.broken` says whether the client's answer did.
    """
    headers = exchange.heading
    status, reason, request = upstream.status, upstream.reason, exchange.request
    streams = upstream.content_type == "text/event-stream" and status == 200
    transcript = exchange.transcript if streams else None
    if exchange.response is not None and not streams:
        error = ApiError(
            502, "server_failed", f"The server answered {status}: {start[:500].decode(errors='replace')}"
        )
        return await refuse_late(exchange, error)
    if (
        exchange.response is None
        and transcript is None
        and upstream.content.at_eof()
        and request.method != "HEAD"
    ):
        headers.popall("Content-Length", None)
        exchange.saw(start)
        if status >= 400:
            status, start = refined_error(status, start, request.path)
            reason = None
        return web.Response(status=status, reason=reason, headers=headers, body=start)
    exchange.first = time.perf_counter()
    response = exchange.response
    if response is None:
        response = _Begun(status=status, reason=reason, headers=headers)
        await response.prepare(request)
    elif (labels := _labels(exchange)) != exchange.labelled:
        await response.write(comment("; ".join(f"{name}: {value}" for name, value in labels.items())))
    if transcript is not None:
        carrier = _Carrier(exchange, transcript, response, succession, balance, seat)
        try:
            await carrier.carry(upstream, start)
        except (Broken, BrokenOff, Diverged, EventTooLong) as exc:
            await _break_off(exchange, response, exc)
        except asyncio.CancelledError:
            await _tell_of_the_end(exchange, response)
            raise
        return response
    try:
        with closing(Listening(upstream, events=streams)) as listening:
            chunk = start
            while chunk:
                exchange.saw(chunk)
                await response.write(chunk)
                chunk = await listening.next()
    except Broken as exc:
        if exchange.server is not None:
            balance.failed(exchange.server, time.monotonic())
        await _break_off(exchange, response, exc)
    return response


class _Begun(web.StreamResponse):
    """An answer whose head leaves with the first of its body, which is there: one call less for both sides."""

    _send_headers_immediately = False


class _Carrier:
    """Carries one event stream over as many servers as it takes."""

    def __init__(
        self,
        exchange: Exchange,
        transcript: Transcript | Replay,
        response: web.StreamResponse,
        succession: Succession,
        balance: Balance,
        seat: Seat,
    ) -> None:
        self._exchange, self._transcript, self._response = exchange, transcript, response
        self._succession, self._balance, self._seat = succession, balance, seat
        self._told = False
        self._passed_on = 0  # bytes

    async def carry(self, upstream: Answer, start: bytes) -> None:
        """Until the client has the whole. Raises what stopped it if nobody can go on."""
        try:
            await self._drain(upstream, start)
            return
        except (Broken, BrokenOff, EventTooLong) as exc:
            broken: Exception = exc
        barren = 0
        while True:
            failed = self._exchange.server
            assert failed is not None
            self._balance.failed(failed, time.monotonic())
            self._seat.move(None)
            if (
                (self._transcript.begun and not self._transcript.can_resume)
                or barren >= MAX_BARREN
                or self._exchange.resumed >= MAX_SUCCESSORS
            ):
                raise broken
            log.warning(
                "the answer of %s broke off: %s; looking for a server that goes on", failed.peer, broken
            )
            before, began = self._passed_on, time.monotonic()
            try:
                server, answer = await self._succession.next(
                    self._transcript, failed.base_url, self._keep_waiting, self._seat.move
                )
            except NobodyGoesOn:
                raise broken from None
            log.info("%s goes on with it, after %.1f s", server.peer, time.monotonic() - began)
            self._exchange.server = server
            self._exchange.resumed += 1
            try:
                with closing(answer):
                    await self._drain(answer, b"")
                return
            except (Broken, BrokenOff, EventTooLong) as exc:
                broken = exc
                barren = 0 if self._passed_on > before else barren + 1

    async def _drain(self, answer: Answer, start: bytes) -> None:
        transcript, loop = self._transcript, asyncio.get_running_loop()
        told = loop.time()
        with closing(Listening(answer, events=True)) as listening:
            chunk = start or await listening.next()
            while True:
                if not chunk:
                    raise Broken("it ended without an end")
                self._exchange.saw(chunk)
                if out := transcript.feed(chunk):
                    # The last of it leaves with the end of the answer.
                    write = self._response.write_eof if transcript.finished else self._response.write
                    await write(out)
                    told = loop.time()
                    if b"data:" in out:
                        self._passed_on += len(out)
                    transcript.feed(b"")
                elif loop.time() - told >= SAY_EVERY:  # what comes now, the client has
                    told = loop.time()
                    await self._response.write(comment(""))
                if transcript.finished:
                    listening.finish()
                    return
                chunk = await listening.next()

    async def _keep_waiting(self) -> None:
        """Say once what is waited for and how long at most; after that only what keeps the connection."""
        said = (
            ""
            if self._told
            else f"the server broke off; waiting up to {PATIENCE:g} s for another that goes on"
        )
        self._told = True
        await self._response.write(comment(said))


async def _tell_of_the_end(exchange: Exchange, response: web.StreamResponse) -> None:
    """A client that is still there when its request is cancelled is left by us: the node ends."""
    request = exchange.request
    if request.transport is None or request.transport.is_closing():
        return
    if exchange.transcript is not None and exchange.transcript.finished:  # it has all
        return
    message = "This node is ending. What came before is all there is."
    event = encode_stream_error(ApiError(503, "node_ending", message), request.path)
    with suppress(TimeoutError, OSError):
        async with asyncio.timeout(LAST_WORDS):
            await response.write(event)


async def _break_off(exchange: Exchange, response: web.StreamResponse, broken: Exception) -> None:
    """End the answer so that no client can take it for complete."""
    exchange.broken = True
    request = exchange.request
    peer = exchange.server.peer if exchange.server else "?"
    log.warning(
        "the answer of %s to %s broke off: %s", peer, request.path, str(broken) or type(broken).__name__
    )
    if response.content_type == "text/event-stream":
        message = "The server broke off in the middle of its answer. What came before is all there is."
        await response.write(encode_stream_error(ApiError(502, "server_failed", message), request.path))
    transport = request.transport
    if transport is None:
        return
    if request.version < aiohttp.HttpVersion11:
        cut(transport)  # its answers end with the connection, so only a reset is not an end
    else:
        transport.close()  # after what was written, and without the last chunk

"""Find each request a server, and another one if that fails, until the client has been sent something.

A client that goes away cancels the handler (`handler_cancellation`), which closes the connection to the server; that is
how llama-server learns to stop generating.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import aiohttp
from aiohttp import web

from libmesh_node.http.affinity import Affinity
from libmesh_node.http.answers import refined_error, told
from libmesh_node.http.balance import Balance, Seat
from libmesh_node.http.continuing import Succession
from libmesh_node.http.errors import ApiError
from libmesh_node.http.exchange import Exchange
from libmesh_node.http.exposure import forwarded_headers
from libmesh_node.http.queue import Queues
from libmesh_node.http.relay import heading, relay
from libmesh_node.http.routing import RETRY_AFTER, no_server
from libmesh_node.http.understanding import understand
from libmesh_node.http.upstream import FAILURES, Answer, Overdue, Stale, Upstream, hung_up, in_words
from libmesh_node.http.waiting import Kept, refuse_late
from libmesh_node.http.wanted import NOTHING
from libmesh_node.snapshot import Model, Server

log = logging.getLogger("libmesh_node.http")

MAX_DEATHS = 4
"""Servers that may break off on one request before it is given up, so that one which kills its server does not kill
them all."""

PATIENCE = 20.0
"""Seconds that a request waits for a server of a model that is known, while none answers: one may be loading, or be
started again. Then it is refused."""

LOADING_PATIENCE = 300.0
"""Seconds that it waits while a node says that it is loading the model: a large one takes minutes from a slow disk."""

FALLING_SILENT = 5.0
"""Seconds until the mesh knows that a peer is gone which vanished without a word."""

WAITING = f"no server has room yet; waiting up to {LOADING_PATIENCE:g} s for one that is being started"
COMPUTING = "the server computes the prompt, or others go before"
"""What a client is told that waits long for its first byte."""

PAUSE = 0.1
"""Seconds between two looks at who serves a model."""

BEGIN = 0.001
"""Seconds after which it is worked out when a server that was asked is overdue: until then, its request is on its way, and there
are other things to do for it. What a short request wants may never have to be understood."""

LOOK = 1.0
"""Seconds between two looks for another server, while one says nothing for too long."""

BACKLOG = 2
"""Requests sent to a server beyond its slots, so that none of them is ever idle. Further ones wait here."""

_FAULTS = frozenset({500, 502, 504})
"""Answers of a server that fails, unless the request makes every server fail."""


class Proxy:
    """Sends exchanges to servers. To be made in a running loop.

    Attributes:
        balance: what is known of the servers.
        queues: who waits for which model.
        upstream: the connections.
    """

    def __init__(self, rng: random.Random | None = None) -> None:
        self.upstream = Upstream()
        self.balance = Balance(rng or random.Random())
        self.queues = Queues()
        self._affinity = Affinity()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def in_flight(self) -> Mapping[str, int]:
        """Requests under way by the base URL of the server that has them now."""
        return self.balance.in_flight

    def forget_gone(self, models: Iterable[Model]) -> None:
        """Drop what is known of servers that none of `models` has any more."""
        present = {server.base_url for model in models for server in model.servers}
        self.balance.forget(present)
        self.upstream.connections.forget(present)

    @property
    def waiting(self) -> int:
        """Requests that have had no byte of an answer yet."""
        return self.upstream.waiting

    def end(self) -> None:
        """Cancel all requests under way; clients of streams are told why."""
        for task in self._tasks:
            task.cancel()

    async def aclose(self) -> None:
        """Close the connections to all servers."""
        await self.upstream.aclose()

    async def forward(self, exchange: Exchange, find: Callable[[], Model]) -> web.StreamResponse:
        """Answer `exchange` from a server of the model that `find` returns, which is asked before each try.

        Raises `ApiError` 429 if too many wait, 503 if nobody serves it for `PATIENCE` seconds, 502 if servers were tried
        and none could answer; in all cases the client has been sent nothing.
        """
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await self._forward(exchange, find)
        except ApiError as error:
            return await refuse_late(exchange, error)
        finally:
            self._tasks.discard(task)

    async def _forward(self, exchange: Exchange, find: Callable[[], Model]) -> web.StreamResponse:
        search = _Search(exchange, find)
        if exchange.request.method == "POST":
            model = search.model
            self.queues.check(
                model.name, has_room=lambda: self._has_room(model), slots=lambda: _slots(model.servers)
            )
        await understand(exchange)
        with closing(Kept(exchange, WAITING, COMPUTING)) as kept:
            while True:
                exchange.seeking = True
                server = await self._next(search)
                exchange.seeking = False
                exchange.attempts += 1
                exchange.server, exchange.model = server, search.model.name
                search.asked = time.perf_counter()
                began = time.monotonic()
                with self._occupied(server, exchange.model) as seat:
                    try:
                        upstream, start = await self._open_in_time(search, server)
                    except FAILURES as exc:
                        self._note_failure(search, server, exc)
                        continue
                    with closing(upstream):
                        search.tried.add(server.base_url)
                        if self._is_for_another(search, upstream, start):
                            continue
                        kept.close()
                        path = exchange.request.path
                        succession = Succession(
                            self.upstream.kept, find, self._successor, server.digest, path
                        )
                        response = await relay(exchange, upstream, start, succession, self.balance, seat)
                        if not exchange.broken:
                            self._learn(exchange, search, response.status)
                            self.queues.took(exchange.model, time.monotonic() - began)
                        return response

    # ── who is next ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _next(self, search: _Search) -> Server:
        """The server for the next try, once there is one with room."""
        exchange, model = search.exchange, search.look()
        if (same := search.again) is not None:
            search.again = None
            return same
        if exchange.request.method == "POST" and (
            self.queues.waiting(model.name) or not self._has_room(model)
        ):
            await self.queues.turn(
                model.name,
                batch=exchange.wanted.batch,
                has_room=lambda: self._has_room(search.look()),
                slots=lambda: _slots(search.model.servers),
                again=exchange.attempts > 0,
            )
            model = search.look()
        while True:
            search.check_deaths()
            server = self._best(model, search.tried, exchange)
            if server is not None:
                return server
            search.check_time()
            search.tried.clear()
            await asyncio.sleep(PAUSE)
            model = search.look()

    def _best(self, model: Model, tried: Collection[str], exchange: Exchange) -> Server | None:
        """The server to try next, if there is one. Only where there are several it matters what is wanted of it."""
        if len(model.servers) == 1:
            return None if model.servers[0].base_url in tried else model.servers[0]
        wanted, now = exchange.wanted, time.monotonic()
        warm = self._affinity.warm(model.digest or model.name, wanted.prefixes, wanted.session, now)
        return self.balance.choose(model.servers, tried, wanted, now, warm, BACKLOG)

    def _has_room(self, model: Model) -> bool:
        return not model.servers or self.balance.has_room(model.servers, BACKLOG, time.monotonic())

    def _successor(self, servers: Collection[Server], refused: Collection[str]) -> Server | None:
        """One with a free slot, if there is any: a client is waiting in the middle of a sentence."""
        return self.balance.choose(servers, refused, NOTHING, time.monotonic(), backlog=0)

    def _is_for_another(self, search: _Search, upstream: Answer, start: bytes) -> bool:
        """Whether an answer is a refusal that another server may not repeat."""
        if upstream.status == 503:
            return True
        if upstream.status == 429:  # this node has more than its share there
            return any(other.base_url not in search.tried for other in search.look().servers)
        exchange, server = search.exchange, search.exchange.server
        assert server is not None
        if (
            upstream.status in _FAULTS
            and refined_error(upstream.status, start, exchange.request.path)[0] >= 500
        ):
            again = server.base_url in search.erred  # and nobody else could be asked in the meantime
            search.erred[server.base_url] = server
            return not again and any(other.base_url not in search.tried for other in search.look().servers)
        if upstream.status == 400 and b"exceed_context_size_error" in start:
            larger = [
                other for other in search.look().servers if other.context_length > server.context_length
            ]
            return any(other.base_url not in search.tried for other in larger)
        return False

    # ── what came of it ──────────────────────────────────────────────────────────────────────────────────────────

    def _note_failure(self, search: _Search, server: Server, failure: Exception) -> None:
        log.warning("%s at %s did not answer: %s", search.model.name, server.peer, in_words(failure))
        # A kept connection may have been closed under us. That says nothing of the server: ask the same once more.
        was_asked_again = server.base_url in search.hung_up
        has_own = not server.local or self.upstream.wants_own(search.exchange.body)
        is_stale = isinstance(failure, Stale) or (hung_up(failure) and not has_own)
        if is_stale and not was_asked_again:
            search.hung_up.add(server.base_url)
            search.again = server
            return
        search.tried.add(server.base_url)
        search.failed = True
        alive = isinstance(failure, aiohttp.ClientConnectorError | Overdue)
        if was_asked_again or not alive:
            search.note_death(server, time.monotonic())
        self.balance.failed(server, time.monotonic())

    def _learn(self, exchange: Exchange, search: _Search, status: int) -> None:
        server, said = exchange.server, told(exchange.tail)
        if server is None or status >= 500:
            return
        if status >= 400:  # it is alive, and refused
            self.balance.answered(server)
            return
        for url, erred in search.erred.items():
            if url != server.base_url:
                log.warning("%s at %s failed at what %s answered", search.model.name, erred.peer, server.peer)
                self.balance.failed(erred, time.monotonic())
        first = None if exchange.first is None or exchange.resumed else exchange.first - search.asked
        self.balance.answered(server, first=first, speed=said.speed)
        wanted, model = exchange.wanted, search.model
        self._affinity.learn(
            model.digest or model.name, wanted.prefixes, wanted.session, server.peer, time.monotonic()
        )

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _open_in_time(self, search: _Search, server: Server) -> tuple[Answer, bytes]:
        """As `_open`. Raises `Overdue` if nothing comes for longer than its line explains while another could be asked."""
        exchange, loop, task = search.exchange, asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        overdue = False
        due = loop.call_later(BEGIN, lambda: begin())

        def begin() -> None:
            nonlocal due
            due = loop.call_later(self.balance.first_byte_limit(server, exchange.wanted), look)

        def look() -> None:
            nonlocal due, overdue
            if exchange.request.method == "POST" and self._has_other(search, server):
                overdue = task.cancel()
            else:
                due = loop.call_later(LOOK, look)

        try:
            return await self._open(search, server)
        except asyncio.CancelledError:
            if overdue and not task.uncancel():  # by nobody else
                raise Overdue(f"nothing came for {time.perf_counter() - search.asked:.0f} s") from None
            raise
        finally:
            due.cancel()

    def _has_other(self, search: _Search, server: Server) -> bool:
        """Whether a server has room that was not asked yet."""
        try:
            present = search.look().servers
        except ApiError:
            return False
        others = [other for other in present if other.base_url not in search.tried | {server.base_url}]
        return bool(others) and self.balance.has_room(others, BACKLOG, time.monotonic())

    async def _open(self, search: _Search, server: Server) -> tuple[Answer, bytes]:
        exchange = search.exchange
        headers = forwarded_headers(exchange.request.headers) | {"X-Request-Id": exchange.id}
        endpoint = exchange.transcript.endpoint if exchange.transcript is not None else None
        url = server.base_url + (endpoint or exchange.request.rel_url.raw_path_qs)

        def headed(answer: Answer) -> None:
            exchange.heading = heading(exchange, answer)
            if not server.local:
                loop.call_soon(self.upstream.connections.prepare, server.base_url)

        method, body, loop = exchange.request.method, exchange.body, asyncio.get_running_loop()
        again = server.base_url in search.hung_up  # over a kept connection it was in vain
        fresh, tunnel = again or not server.local, not again and not server.local
        return await self.upstream.open(method, url, headers, body, fresh=fresh, tunnel=tunnel, headed=headed)

    @contextmanager
    def _occupied(self, server: Server, model: str) -> Iterator[Seat]:
        try:
            with self.balance.seat(server) as seat:
                yield seat
        finally:
            self.queues.nudge(model)


def _slots(servers: Iterable[Server]) -> int:
    return sum(server.slots for server in servers)


class _Search:
    """One request's search for a server.

    Attributes:
        tried: base URLs that refused or failed since the last pause.
        erred: servers that answered with a fault, by base URL; it is theirs if another one can answer.
        hung_up: base URLs of servers that closed a kept connection.
        again: the server to ask once more before any other.
        deaths: servers that broke off on this request.
        failed: whether any server was asked in vain.
        model: as it was served when last looked for.
        asked: when the last server was asked, by `time.perf_counter`.
    """

    def __init__(self, exchange: Exchange, find: Callable[[], Model]) -> None:
        self.exchange, self._find = exchange, find
        self.tried: set[str] = set()
        self.erred: dict[str, Server] = {}
        self.hung_up: set[str] = set()
        self.again: Server | None = None
        self.deaths = 0
        self.failed = False
        self.asked = time.perf_counter()
        self.model = find()
        self._began = time.monotonic()
        self._died: dict[str, float] = {}

    def look(self) -> Model:
        """The model as it is served now. Raises `ApiError` when it is no more."""
        self.model = self._find()
        return self.model

    def check_time(self) -> None:
        """Raise `ApiError` if this has gone on for long enough."""
        model = self.look()
        patience = PATIENCE if not model.coming or model.servers else LOADING_PATIENCE
        if time.monotonic() >= self._began + (patience if self.exchange.request.method == "POST" else 0.0):
            raise self._in_vain() if self.failed else no_server(model)

    def note_death(self, server: Server, now: float) -> None:
        """A server broke off. That a tunnel leads nowhere, however often it is tried, is one death of its server."""
        if server.local or now - self._died.get(server.base_url, -math.inf) >= FALLING_SILENT:
            self._died[server.base_url] = now
            self.deaths += 1

    def check_deaths(self) -> None:
        """Raise `ApiError` if this has cost enough servers."""
        if self.deaths >= MAX_DEATHS:
            raise self._in_vain()

    def _in_vain(self) -> ApiError:
        model = self.model
        message = (
            f"The servers of `{model.name}` that were asked broke off or could not be reached; try again."
        )
        return ApiError(502, "server_failed", message, retry_after=RETRY_AFTER)

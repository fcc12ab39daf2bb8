"""Counts the requests that come in at this node, by model, and tells the node of them."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from libmesh_node.asked import Asked
from libmesh_node.http.exchange import Exchange
from libmesh_node.snapshot import Model

EVERY = 1.0
"""Seconds between two reports. Of a request for a model that nobody serves the node hears at once, or `SOONEST` after."""

SOONEST = 0.1
"""Seconds from one report to the next, whatever is asked for."""

MAX_MODELS = 64
"""Models in a report. When full, requests for further ones wait for the next."""


class Asking:
    """To be used in one running loop. `tell` must not block."""

    def __init__(self, tell: Callable[[tuple[Asked, ...]], None]) -> None:
        self._tell = tell
        self._new: Counter[str] = Counter()
        self._names: dict[str, str] = {}
        self._open: dict[int, tuple[Exchange, str]] = {}
        self._due: asyncio.TimerHandle | None = None
        self._reported = -math.inf
        self._said_waiting = False

    @contextmanager
    def counted(self, exchange: Exchange, model: Model) -> Iterator[None]:
        """Count a request for `model`, whose digest must be known to count, and see that it waits while it has no server."""
        if not model.digest or (model.digest not in self._new and len(self._new) >= MAX_MODELS):
            yield
            return
        self._new[model.digest] += 1
        self._names[model.digest] = model.name
        self._open[id(exchange)] = exchange, model.digest
        self._report_in(EVERY if model.servers else 0.0)
        try:
            yield
        finally:
            del self._open[id(exchange)]

    def _report_in(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        when = max(loop.time() + seconds, self._reported + SOONEST)
        if self._due is not None:
            if self._due.when() <= when:
                return
            self._due.cancel()
        self._due = loop.call_at(when, self._report)

    def _report(self) -> None:
        self._due, self._reported = None, asyncio.get_running_loop().time()
        waiting = Counter(digest for exchange, digest in self._open.values() if exchange.seeking)
        digests = {*self._new, *waiting}
        if self._new or waiting or self._said_waiting:
            self._tell(
                tuple(
                    Asked(
                        digest=digest,
                        name=self._names[digest],
                        requests=self._new[digest],
                        waiting=waiting[digest],
                    )
                    for digest in sorted(digests)
                )
            )
        self._said_waiting = bool(waiting)
        self._new.clear()
        self._names = {digest: self._names[digest] for _, digest in self._open.values()}
        if self._open:  # one that has a server may lose it
            self._report_in(EVERY)

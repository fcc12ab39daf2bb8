"""This node's part in demand: it tells the mesh what it is asked for, and serves what the mesh wants.

`placement/demand.py` decides, from the same announcements on every node; here its decisions are carried out. A node that
was started with `--model` serves what it was told to and takes nothing by itself; nor does one that has a part in a split.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress

import trio

from libmesh import PeerId, View
from libmesh_node.announced import MAX_ON_DISK, MAX_WISHES, NodeStatus, OnDisk, Wish
from libmesh_node.asked import Asked
from libmesh_node.entries import Entry
from libmesh_node.errors import NodeError
from libmesh_node.options import NodeOptions
from libmesh_node.placement import demand
from libmesh_node.placement.demand import Demand, Failed, Forgotten, Looked, Row, Settled, Take
from libmesh_node.placement.rows import rows_of
from libmesh_node.serving import LocalModels
from libmesh_node.shelf import Shelf

log = logging.getLogger(__name__)

LOAD_LIMIT = 1800.0
"""Seconds that a model may take to load. Then it counts as one that could not be loaded, and others may take it."""

FORGET_WAITING = 4.0
"""Seconds after which requests that were said to wait count no more, unless that was said again."""

MAX_TELLERS = 256
"""Who may tell at a time: this node's API and clients that follow. Further ones are not heard."""

TOO_SOON = 0.25
"""Seconds after what a client told within which nothing more is heard of it."""

_CALM = 0.05  # seconds between two looks, however much happens


class Standby:
    """Counts, tells and takes. `run` until cancelled; `look` whenever the view or this node changed.

    Args:
        me: this node.
        models: its own.
        shelf: what lies on its disk.
        options: the command line.
        seen: the mesh and what this node announces; `None` while it is in no mesh.
        on_change: called in trio's thread when there is news to announce.
    """

    def __init__(
        self,
        me: PeerId,
        models: LocalModels,
        shelf: Shelf,
        options: NodeOptions,
        seen: Callable[[], tuple[View, NodeStatus] | None],
        on_change: Callable[[], None],
    ) -> None:
        self._me, self._models, self._shelf, self._options = me, models, shelf, options
        self._seen, self._on_change = seen, on_change
        self._demand = Demand(me)
        self._names: dict[str, str] = {}
        self._waiting: dict[str, tuple[float, dict[str, int]]] = {}
        self._heard: dict[str, float] = {}
        self._declined: set[str] = set()
        self._news = trio.Event()

    # ── what the others are told ─────────────────────────────────────────────────────────────────────────────────

    def told(self, source: str, asked: tuple[Asked, ...]) -> None:
        """Requests came in at `source`, this node's API or a client that only follows; and so many of them wait."""
        now = trio.current_time()
        if len(self._heard) >= MAX_TELLERS:
            self._heard = {teller: when for teller, when in self._heard.items() if now - when < TOO_SOON}
        too_soon = now - self._heard.get(source, -math.inf) < TOO_SOON
        if source and (too_soon or len(self._heard) >= MAX_TELLERS):
            return
        self._heard[source] = now
        for one in asked[:MAX_WISHES]:
            self._names[one.digest] = one.name
            if one.requests:
                self._demand.handle(demand.Asked(one.digest, one.requests), now)
        if source in self._waiting or len(self._waiting) < MAX_TELLERS:
            waiting = {one.digest: one.waiting for one in asked if one.waiting}
            self._waiting[source] = (now + FORGET_WAITING, waiting)
        self._on_change()

    def wishes(self) -> tuple[Wish, ...]:
        """What this node asks of the mesh."""
        now = trio.current_time()
        counts = self._demand.announced(Row(peer=self._me), now).asked
        named = {digest: name for name, digest in self._models.named.items() if digest}
        waiting = self._all_waiting(now)
        self._names = {
            digest: name for digest, name in self._names.items() if digest in counts or digest in waiting
        }
        names = self._names | named
        return tuple(
            Wish(
                digest=digest,
                name=names.get(digest, ""),
                requests=counts.get(digest, 0.0),
                waiting=1 << (waiting[digest] - 1).bit_length() if digest in waiting else 0,
                named=digest in named,
            )
            for digest in sorted({*counts, *named, *waiting})
        )[:MAX_WISHES]

    def _all_waiting(self, now: float) -> dict[str, int]:
        self._waiting = {source: told for source, told in self._waiting.items() if told[0] > now}
        found: dict[str, int] = {}
        for _, waiting in self._waiting.values():
            for digest, count in waiting.items():
                found[digest] = min(found.get(digest, 0) + count, 65536)
        return found

    def on_disk(self) -> tuple[OnDisk, ...]:
        """What it would serve."""
        if not self._takes:
            return ()
        refused = self._demand.announced(Row(peer=self._me), trio.current_time()).refused
        offered = [held for held in self._shelf.models.values() if held.model.name not in self._declined]
        return tuple(
            OnDisk(
                digest=held.digest,
                name=held.model.name,
                size_bytes=held.model.size_bytes,
                needed_bytes=held.needed,
                context_length=held.context,
                refused=held.digest in refused,
            )
            for held in offered[:MAX_ON_DISK]
        )

    @property
    def rests(self) -> bool:
        """Whether it has just taken something."""
        return self._demand.announced(Row(peer=self._me), trio.current_time()).rests

    @property
    def _takes(self) -> bool:
        return not (
            self._options.client
            or self._options.models
            or any(not entry.alone for entry in self._models.entries.values())
        )

    # ── what its operator says ───────────────────────────────────────────────────────────────────────────────────

    def accept(self, name: str) -> None:
        """The operator wants this model here: if it was declined, it is no more."""
        self._declined.discard(name)

    def decline(self, name: str) -> None:
        """Take this model no more, until the operator loads it, or the node is started again."""
        self._declined.add(name)

    def forget(self, digest: str) -> None:
        """The requests for this model that came in here count no more."""
        self._demand.handle(Forgotten(digest), trio.current_time())

    # ── acting ───────────────────────────────────────────────────────────────────────────────────────────────────

    def look(self) -> None:
        """Something changed. Never blocks."""
        self._news.set()

    async def run(self) -> None:
        """Look and take until cancelled."""
        async with trio.open_nursery() as nursery:
            if not self._options.client and not self._options.models:
                nursery.start_soon(self._shelf.run)
            if self._options.idle_unload is not None:
                nursery.start_soon(self._rest_idle, self._options.idle_unload)
            while True:
                self._news = trio.Event()
                self._step(nursery)
                await trio.sleep(_CALM)
                deadline = self._demand.deadline()
                with trio.move_on_at(math.inf if deadline is None else deadline):
                    await self._news.wait()

    def _step(self, nursery: trio.Nursery) -> None:
        now = trio.current_time()
        if (seen := self._seen()) is None:
            return
        rows = rows_of(*seen)
        for digest in {digest for row in rows for digest in row.queued}:
            self._models.wake(digest)
        for entry in self._models.entries.values():
            if entry.failed and entry.name not in self._models.named and not entry.leaving:
                self._demand.handle(Failed(entry.digest), now)
                nursery.start_soon(self._give_up, entry)
        for take in self._demand.handle(Looked(rows), now):
            nursery.start_soon(self._take, take)

    async def _take(self, take: Take) -> None:
        taken = False
        try:
            taken = await self._make_room_and_load(take)
        except (NodeError, OSError) as exc:
            log.warning("cannot serve what the mesh wants: %s", exc)
        finally:
            self._demand.handle(Settled(take.model, failed=not taken), trio.current_time())
            self._on_change()

    async def _make_room_and_load(self, take: Take) -> bool:
        held = self._shelf.models.get(take.model)
        if held is None:
            return False
        dropped = [entry for entry in self._models.entries.values() if entry.digest in take.drops]
        why = "nobody serves it" if take.urgent else "its servers are too busy"
        room = "".join(f", instead of {entry.name}" for entry in dropped)
        log.info("serving %s%s: the mesh wants it, and %s", held.model.name, room, why)
        for entry in dropped:
            await self._models.unload(entry.name)
        await self._models.squeeze(held.needed)
        entry = await self._models.load(held.model, named=False, digest=held.digest)
        if not entry.servers:
            return False
        with trio.move_on_after(LOAD_LIMIT):
            while not (entry.base_url or entry.failed or entry.unloading):  # noqa: ASYNC110 - servers change
                await trio.sleep(0.05)
        if entry.base_url is None:
            await self._give_up(entry)
            return False
        return True

    async def _give_up(self, entry: Entry) -> None:
        if self._models.entries.get(entry.name) is entry:
            log.warning("%s cannot be served here; leaving it to others for a while", entry.name)
            with suppress(NodeError):  # the node is ending
                await self._models.unload(entry.name)

    async def _rest_idle(self, after: float) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(min(after, 1.0))
                for entry in self._models.entries.values():
                    if (
                        entry.alone
                        and entry.base_url
                        and trio.current_time() - entry.servers[0].used_at >= after
                    ):
                        entry.servers[
                            0
                        ].used_at = trio.current_time()  # looked at again after as long, if it is busy
                        nursery.start_soon(self._models.rest, entry)

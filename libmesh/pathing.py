"""Finds and keeps the best path to each peer: does what the machine of `core.paths` asks, over a network."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import trio

from libmesh.alarm import Alarm
from libmesh.core import paths as core
from libmesh.core import paths_io as io
from libmesh.core.ways import PUNCH, relay_of
from libmesh.errors import MeshError, PeerUnreachable
from libmesh.net import base as net
from libmesh.net.base import Network
from libmesh.peers import Attempt, Path, PathKind, PeerId

log = logging.getLogger(__name__)

ATTEMPT_LIMIT = 20.0
"""Seconds after which an attempt is given up, whatever it waits for. Networks have shorter limits of their own."""

MAX_ATTEMPTS = 512
"""Attempts under way to all peers together, each a socket or two. Further ones wait for a place."""


@dataclass(slots=True)
class _Outcome:
    """What those who wait for one peer wait for."""

    waiting: int = 0
    known: trio.Event = field(default_factory=trio.Event)
    failed: tuple[Attempt, ...] | None = None


class Pathing:
    """Drives one `Paths` machine.

    Args:
        network: the transport.
        addresses_of: what a peer says it can be reached at.
        approach: called with a relay and its address before a circuit through it is dialled; makes sure that the relay,
            where it is a member, takes us for one. Raises `MeshError`.
        changed: called when the path to a peer has become another one.
        wall_clock: seconds since the epoch.
        config: the times.
        rng: draws the pauses.
    """

    def __init__(
        self,
        network: Network,
        *,
        addresses_of: Callable[[PeerId], tuple[str, ...]],
        approach: Callable[[PeerId, tuple[str, ...]], Awaitable[None]],
        changed: Callable[[PeerId], None],
        wall_clock: Callable[[], float],
        config: io.PathsConfig,
        rng: random.Random,
    ) -> None:
        self._network, self._addresses_of, self._approach = network, addresses_of, approach
        self._changed, self._wall_clock = changed, wall_clock
        self._machine = core.Paths(network.peer, config, rng=rng)
        self._outcomes: dict[PeerId, _Outcome] = {}
        self._attempts: dict[tuple[PeerId, str], trio.CancelScope] = {}
        self._since: dict[PeerId, tuple[PathKind, str, float]] = {}
        self._silent: dict[PeerId, tuple[PathKind, str]] = {}
        self._mine: tuple[str, ...] = ()
        self._places = trio.CapacityLimiter(MAX_ATTEMPTS)
        self._alarm = Alarm()
        self._tasks: trio.Nursery | None = None

    # ── what is asked ────────────────────────────────────────────────────────────────────────────────────────────

    def path(self, peer: PeerId) -> Path | None:
        """The path in use, since when, and, if it is relayed or punched, why there is no better one."""
        path = self._network.path(peer)
        if path is None:
            return None
        kind, address, since = self._since.get(peer, (None, "", 0.0))
        reasons = self._machine.reasons(peer) if path.kind is not PathKind.DIRECT else ()
        known = (kind, address) == (path.kind, path.address)
        return replace(path, since_unix=since if known else self._wall_clock(), attempts=reasons)

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> Path:
        """The path to `peer`, found at any of `addresses` if there is none yet. The first that works, not the best.

        A better one is looked for in the background. Several callers share one search, which ends when all were
        cancelled. Raises `PeerUnreachable` with the reason for each way that was tried.
        """
        if (path := self.path(peer)) is not None:
            await trio.lowlevel.checkpoint()
            return path
        outcome = self._outcomes.setdefault(peer, _Outcome())
        outcome.waiting += 1
        self._refresh_mine()
        self._handle(io.Wanted(peer, tuple(addresses)))
        try:
            await outcome.known.wait()
        finally:
            outcome.waiting -= 1
            if not outcome.waiting and self._outcomes.get(peer) is outcome:
                del self._outcomes[peer]
                self._handle(io.Unwanted(peer))
        if outcome.failed is not None:
            raise _unreachable(peer, outcome.failed)
        if (path := self.path(peer)) is None:
            raise PeerUnreachable(f"the connection to the peer {peer} ended at once", {})
        return path

    # ── what happens ─────────────────────────────────────────────────────────────────────────────────────────────

    def heard(
        self, event: net.PeerConnected | net.PathChanged | net.PathSilent | net.PeerDisconnected
    ) -> None:
        """The network told of a connection."""
        if isinstance(event, net.PathSilent):
            log.info("no sign of life from %s: looking for another way", event.peer)
            if (known := self._since.get(event.peer)) is not None:
                self._silent[event.peer] = known[:2]
            self._refresh_mine()
            self._handle(io.PathDoubted(event.peer, self._addresses_of(event.peer)))
            return
        silent, path = self._silent.pop(event.peer, None), self._network.path(event.peer)
        if path is not None and silent == (path.kind, path.address):
            log.info("%s answers again", event.peer)
        inbound = isinstance(event, net.PeerConnected) and event.inbound
        self._look_at(event.peer, inbound=inbound)

    def peer_moved(self, peer: PeerId) -> None:
        """The addresses that `peer` announces may be others now."""
        path = self._network.path(peer)
        if path is not None and path.kind is PathKind.RELAYED:
            self._refresh_mine()
            self._handle(io.AddressesAre(peer, self._addresses_of(peer)))

    def here_changed(self) -> None:
        """The network that this node is in may be another one now: look for better paths at once."""
        self._mine = self._network.addresses()
        self._handle(io.HereChanged(self._mine))

    def _refresh_mine(self) -> None:
        if (mine := self._network.addresses()) != self._mine:
            self._mine = mine
            self._handle(io.HereChanged(mine))

    def _look_at(self, peer: PeerId, *, inbound: bool) -> None:
        """Tell the machine what the network says now, which is newer than any event."""
        path = self._network.path(peer)
        before = self._since.get(peer)
        if path is None:
            self._since.pop(peer, None)
        elif before is None or before[:2] != (path.kind, path.address):
            self._since[peer] = path.kind, path.address, self._wall_clock()
            # The first path may be a stranger's: `Admission` tells of it once it is a member's.
            level = logging.DEBUG if before is None else logging.INFO
            log.log(level, "path to %s: %s %s", peer, path.kind.value, path.address)
        self._handle(io.PathIs(peer, None if path is None else path.kind, inbound))
        if path is not None:
            self.peer_moved(peer)
        if before is not None and path is not None and before[:2] != (path.kind, path.address):
            self._changed(peer)

    # ── what is done ─────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Search until cancelled. `connect` works from `started` on."""
        async with trio.open_nursery() as nursery:
            self._tasks = nursery
            task_status.started()
            try:
                while True:
                    await self._alarm.due(self._machine.deadline)
                    self._handle(io.Wake())
            finally:
                self._tasks = None

    def _handle(self, event: io.Event) -> None:
        for effect in self._machine.handle(event, trio.current_time()):
            match effect:
                case io.Try(peer, way):
                    if self._tasks is not None:
                        scope = self._attempts[peer, way] = trio.CancelScope()
                        self._tasks.start_soon(self._attempt, peer, way, scope)
                case io.Stop(peer, way):
                    if (running := self._attempts.pop((peer, way), None)) is not None:
                        running.cancel()
                case io.Reached(peer):
                    self._settle(peer, None)
                case io.Unreachable(peer, attempts):
                    self._settle(peer, attempts)
        self._alarm.moved()

    def _settle(self, peer: PeerId, failed: tuple[Attempt, ...] | None) -> None:
        if (outcome := self._outcomes.pop(peer, None)) is not None:
            outcome.failed = failed
            outcome.known.set()

    async def _attempt(self, peer: PeerId, way: str, scope: trio.CancelScope) -> None:
        reason: str | None = f"no answer within {ATTEMPT_LIMIT:.0f} s"
        with scope:
            try:
                async with self._places:
                    with trio.move_on_after(ATTEMPT_LIMIT):
                        await self._make(peer, way)
                        reason = None
            except MeshError as exc:
                reason = str(exc)
        if reason is None:
            self._look_at(peer, inbound=False)  # before the end of the attempt, which could be the last one
        if self._attempts.get((peer, way)) is scope:
            del self._attempts[peer, way]
            self._handle(io.Ended(peer, way, reason))

    async def _make(self, peer: PeerId, way: str) -> None:
        if way == PUNCH:
            await self._network.punch(peer)
            return
        if (relay := relay_of(way)) is not None:
            await self._approach(relay[0], (relay[1],))
        await self._network.dial(peer, way)


def _unreachable(peer: PeerId, attempts: tuple[Attempt, ...]) -> PeerUnreachable:
    tried = "; ".join(f"{attempt.way}: {attempt.reason}" for attempt in attempts) or "no address is known"
    reasons = {attempt.way: attempt.reason for attempt in attempts}
    return PeerUnreachable(f"cannot reach the peer {peer} ({tried})", reasons)

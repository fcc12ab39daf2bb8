"""One split while it runs: sessions with the workers, their local ports, and the llama-server that uses them.

    opening ─▶ loading ─▶ ready ─▶ over
        └─────────┴──────────────────▲

A split lives once. When a worker is lost llama-server aborts, whatever it was doing; so there is nothing to keep, and the
next placement starts afresh. What is told at the end is the cause, not llama-server's death that follows from it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from libmesh import Mesh, MeshError, PeerId
from libmesh_node.entries import Entry
from libmesh_node.equipment import Equipment
from libmesh_node.errors import NodeError
from libmesh_node.llama.engine import Binary, cache_root
from libmesh_node.llama.restart import RestartConfig, RestartPolicy
from libmesh_node.llama.rpc.ahead import Chain
from libmesh_node.llama.rpc.borrower import Borrowed, SessionRefused
from libmesh_node.llama.rpc.frames import TOKEN, ProtocolError
from libmesh_node.llama.rpc.opening import Neighbour, SessionRequest, is_fork, read_protocol
from libmesh_node.llama.rpc.weights import LearnedHashes, open_weights
from libmesh_node.llama.server import DraftPlan, ServerPlan, SplitPlan
from libmesh_node.llama.supervisor import LlamaServer
from libmesh_node.models.digest import model_digest
from libmesh_node.models.reference import ModelFile
from libmesh_node.placement.machine import short
from libmesh_node.placement.seen import SERVICE
from libmesh_node.placement.shape import BATCH, ModelShape
from libmesh_node.placement.splitting import OVERHEAD, Placement, Share
from libmesh_node.snapshot import Process

log = logging.getLogger(__name__)

STALLED_AFTER = 300.0
"""Seconds that a worker may take for one answer. A batch of a long prompt takes the slowest machines tens."""

_STEP = 256  # llama.cpp pads its cache to multiples of this

MASK = 2 * BATCH
"""Bytes that each machine takes for each token of the cache, whatever its share: of the mask of a batch, in f16. It is part of the
compute buffer, of which `ModelShape.compute` is the rest; with a long context it is the most."""


class SplitFailed(Exception):
    """A split could not be started, or has ended. `peer`: whose fault it was; empty if nobody's or this node's.

    `later`: that peer's memory was taken; it may be free another time.
    """

    def __init__(self, reason: str, peer: str = "", *, later: bool = False) -> None:
        super().__init__(reason)
        self.peer = peer
        self.later = later


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSetting:
    """What all splits of one model share.

    Attributes:
        log: file for llama-server's output.
        own_devices: of this machine's own GPUs, as llama-server names them; empty on a processor.
        slots: requests at once.
    """

    mesh: Mesh
    binary: Binary
    model: ModelFile
    shape: ModelShape
    log: Path
    own_devices: tuple[str, ...]
    slots: int
    draft: DraftPlan | None = None


def setting_of(mesh: Mesh, equipment: Equipment, entry: Entry, log: Path) -> SplitSetting:
    """That of a node's model as it is now. The node has a llama-server."""
    assert equipment.engine is not None
    return SplitSetting(
        mesh=mesh,
        binary=equipment.engine.require_llama_server(),
        model=entry.model,
        shape=entry.shape,
        log=log,
        own_devices=equipment.own_devices,
        slots=entry.plan.slots,
        draft=entry.plan.draft,
    )


class SplitRun:
    """One split. `run` is its life.

    Args:
        memory: for each peer, bytes that it offers; no worker is asked for more.
        held: bytes of those that splits of this model have, beside which it starts.
        on_change: called when the server's state changed.

    Attributes:
        taken: for each member, bytes of its memory that this split takes, the cache included.
        server: its llama-server, once the workers are ready.
        ready_since: when it took over, by trio's clock.
        scope: cancel it to end the split.
    """

    def __init__(
        self,
        setting: SplitSetting,
        placement: Placement,
        memory: Mapping[str, int],
        held: Mapping[str, int],
        on_change: Callable[[], None],
    ) -> None:
        self.placement = placement
        self.server: LlamaServer | None = None
        self.ready_since: float | None = None
        self.scope = trio.CancelScope()
        self._setting, self._on_change = setting, on_change
        self._context, self.taken = reckon(setting, placement, memory, held)
        self._fork = is_fork(read_protocol(setting.binary.rpc_protocol or "0.0.0"))
        self._failure: SplitFailed | None = None
        self._told: int | None = None

    @property
    def ready(self) -> bool:
        """Whether it answers now."""
        return self.server is not None and self.server.base_url is not None

    @property
    def home_bytes(self) -> int:
        """Memory of this machine that it takes, the cache included."""
        return self.taken[self.placement.host]

    async def run(self) -> SplitFailed | None:
        """Live until cancelled by `scope`; then `None`. If it ends by itself, the reason."""
        with self.scope:
            try:
                await self._live()
            except* (OSError, NodeError) as group:
                self._fail(SplitFailed(str(group.exceptions[0])))
        return self._failure

    async def _live(self) -> None:
        setting = self._setting
        if self.placement.workers and setting.binary.rpc_protocol is None:
            raise NodeError("this machine's llama-server does not work together with its rpc-server")
        if await model_digest(setting.model.parts) != setting.shape.digest:
            raise NodeError(
                f"{setting.model.path} is not what it was when it was identified; restart the node."
            )
        hashes = await trio.to_thread.run_sync(
            LearnedHashes, cache_root() / "rpc-hashes" / f"{setting.shape.digest}.json"
        )
        with open_weights(setting.model.parts) as weights:
            shares = self.placement.workers
            foreseeable = len(shares) > 1 and not setting.shape.recurrent and not self._fork
            chain = Chain(len(shares)) if foreseeable else None
            workers = [
                Borrowed(
                    partial(setting.mesh.open_service, PeerId(share.peer), SERVICE, lasting=True),
                    request,
                    weights,
                    hashes,
                    chain,
                    place,
                )
                for place, (share, request) in enumerate(zip(shares, self._requests(chain), strict=True))
            ]
            try:
                if self._fork:
                    await self._introduce(workers)
                async with trio.open_nursery() as nursery:
                    for worker, share in zip(workers, self.placement.workers, strict=True):
                        nursery.start_soon(self._open, worker, share.peer, nursery.cancel_scope)
                if self._failure is None:
                    await self._serve(workers)
            finally:
                for worker in workers:
                    worker.close()

    async def _introduce(self, workers: list[Borrowed]) -> None:
        """The fork's workers reach each other by what they are told before they work."""
        for worker in workers:
            await worker.bind()
        pairs = zip(workers, self.placement.workers, strict=True)
        neighbours = tuple(Neighbour(worker.port, share.peer, worker.token) for worker, share in pairs)
        for worker in workers:
            worker.introduce(neighbours)

    async def _open(self, worker: Borrowed, peer: str, scope: trio.CancelScope) -> None:
        try:
            await worker.open()
        except SessionRefused as exc:
            self._fail(SplitFailed(str(exc), peer, later=exc.later))
        except (ProtocolError, MeshError, trio.BrokenResourceError) as exc:
            self._fail(SplitFailed(str(exc), peer))
        else:
            return
        scope.cancel()

    async def _serve(self, workers: list[Borrowed]) -> None:
        async with trio.open_nursery() as nursery:
            for worker, share in zip(workers, self.placement.workers, strict=True):
                await worker.listen(nursery)
                nursery.start_soon(self._watch, worker, share.peer, nursery.cancel_scope)
            self.server = LlamaServer(
                self._setting.binary,
                self._plan(workers),
                log=self._setting.log,
                environment=os.environ,
                on_change=self._changed,
                policy=RestartPolicy(RestartConfig(failures=1)),
                stalled_after=STALLED_AFTER
                * 1.2,  # a worker's silence is told by its own task, which comes first
            )
            await self.server.run()
            await trio.sleep(0.2)  # the loss of a worker, if that was the cause, is told by its own task
            short_of = next((worker for worker in workers if worker.denied), None)
            if short_of is not None:
                peer = self.placement.workers[workers.index(short_of)].peer
                self._fail(SplitFailed(f"{short_of.denied / 1e6:.0f} MB more than it was asked for", peer))
            self._fail(SplitFailed(self.server.process.failure))
            nursery.cancel_scope.cancel()

    async def _watch(self, worker: Borrowed, peer: str, scope: trio.CancelScope) -> None:
        self._fail(SplitFailed(await lost_or_silent(worker), peer))
        scope.cancel()

    def _fail(self, failure: SplitFailed) -> None:
        if self._failure is None:
            self._failure = failure

    def _changed(self, process: Process) -> None:
        if process.status == "ready" and process.pid != self._told:
            self._told = process.pid
            told = ", ".join(f"{short(share.peer)} ({share.layers})" for share in self.placement.workers)
            log.info("%s is ready, split over this node and %s", process.model, told)
        self._on_change()

    def _requests(self, chain: Chain | None) -> list[SessionRequest]:
        """What each worker is asked for; with a chain, also whom it gets results from, and passes its own on to."""
        requests = [self._request(share) for share in self.placement.workers]
        if self._fork:
            return [replace(request, token=os.urandom(TOKEN)) for request in requests]
        if chain is None:
            return requests
        tokens = [os.urandom(TOKEN) for _ in requests]
        peers = [share.peer for share in self.placement.workers]
        for at in range(1, len(requests)):
            requests[at] = replace(requests[at], token=tokens[at], previous=peers[at - 1])
            requests[at - 1] = replace(requests[at - 1], next=peers[at], next_token=tokens[at])
        return requests

    def _request(self, share: Share) -> SessionRequest:
        setting = self._setting
        return SessionRequest(
            digest=setting.shape.digest,
            memory_bytes=self.taken[share.peer],
            protocol=read_protocol(setting.binary.rpc_protocol or "0.0.0"),
            model=setting.model.name,
        )

    def _plan(self, workers: list[Borrowed]) -> ServerPlan:
        setting, placement = self._setting, self.placement
        layers: list[int] = []
        for worker, share in zip(workers, placement.workers, strict=True):
            layers += _over(share.layers, [device.free for device in worker.facts.devices])
        own = setting.own_devices if placement.home.layers else ()
        if own:
            layers += _over(placement.home.layers, [1] * len(own))
        return ServerPlan(
            model=setting.model,
            context=self._context,
            slots=setting.slots,
            cache=setting.shape.cache,
            split=SplitPlan(
                ports=tuple(worker.port for worker in workers),
                layers=tuple(layers),
                own_devices=own,
                home_layers=0 if setting.own_devices else placement.home.layers,
                logits_home=placement.logits_home,
            ),
            draft=setting.draft,
        )


async def lost_or_silent(worker: Borrowed) -> str:
    """Wait until a worker is lost, or has owed an answer for `STALLED_AFTER`. Returns what happened, in words."""
    while not worker.lost.is_set():
        with trio.move_on_after(STALLED_AFTER / 10):
            await worker.lost.wait()
        since = worker.waiting_since
        if since is not None and trio.current_time() - since > STALLED_AFTER:
            return f"it has not answered for {STALLED_AFTER:g} s"
    return worker.why


def _over(layers: int, room: list[int]) -> list[int]:
    """`layers` over the devices of one machine, in proportion to their room."""
    whole, given, counts = sum(room) or 1, 0, []
    reached = 0
    for free in room:
        reached += free
        count = round(layers * reached / whole) - given
        counts.append(count)
        given += count
    return counts


def _memory(share: Share, context: int, shape: ModelShape) -> int:
    """Bytes that a share takes with a cache for `context` tokens. The last one may also make logits."""
    logits = BATCH * 4 * shape.vocabulary
    cache = (share.kv_per_token + MASK) * context
    return int(share.weights * OVERHEAD) + cache + shape.compute + logits


def fits_beside(
    shape: ModelShape, placement: Placement, memory: Mapping[str, int], held: Mapping[str, int], context: int
) -> bool:
    """Whether a split may start beside those that have what is `held` of each machine, without loss.

    That is, whether every machine has room for its share with the least context, and for one as long as a request may have now,
    `context`, unless the split would not have that anyway. The same for every node, whatever its own machine and slots.
    """
    possible = _tokens(shape, placement, _offered(shape, placement, memory, {}))
    wanted = max(shape.context, min(context, possible))
    return all(
        _memory(share, wanted, shape) <= memory.get(share.peer, 0) - held[share.peer]
        for share in (*placement.workers, placement.home)
        if held.get(share.peer)
    )


def reckon(
    setting: SplitSetting, placement: Placement, memory: Mapping[str, int], held: Mapping[str, int]
) -> tuple[int, dict[str, int]]:
    """Tokens of cache that fit beside the weights on every machine, and for each member the bytes that it then takes.

    Where half of a machine's memory is enough it takes no more, so that the split which replaces it one day has room
    beside it, whatever the context. That is so of those that are forced: a model that no machine can hold takes more than half
    of each. Nor does it take what is `held` of a machine, by a split beside which it starts, as long as that leaves the least.
    """
    shape, offered = setting.shape, _offered(setting.shape, placement, memory, held)
    most = min((setting.model.header.context_length or shape.context) * setting.slots, 65536)
    context = max(shape.context, min(most, _tokens(shape, placement, offered)) // _STEP * _STEP)
    shares = (*placement.workers, placement.home)
    return context, {share.peer: min(_memory(share, context, shape), offered[share.peer]) for share in shares}


def _offered(
    shape: ModelShape, placement: Placement, memory: Mapping[str, int], held: Mapping[str, int]
) -> dict[str, int]:
    """What each member may take."""
    offered: dict[str, int] = {}
    for share in (*placement.workers, placement.home):
        whole = memory.get(share.peer, 0)
        enough = _memory(share, shape.context, shape) <= whole // 2
        offered[share.peer] = min(whole // 2 if enough else whole, max(0, whole - held.get(share.peer, 0)))
    return offered


def _tokens(shape: ModelShape, placement: Placement, offered: Mapping[str, int]) -> int:
    """Of cache, for which all shares that have a part of it have room."""
    room = [
        (offered[share.peer] - _memory(share, 0, shape)) // (share.kv_per_token + MASK)
        for share in (*placement.workers, placement.home)
        if share.kv_per_token
    ]
    return max(0, min(room, default=1 << 62))

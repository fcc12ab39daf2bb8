"""Nodes that host one model between them, or several, in virtual time: everything real but the mesh, and llama.cpp.

A split takes `LOAD` seconds to load, holds memory of its members for as long as it lives, and ends when one of them is gone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio
from libmesh_node import splits
from libmesh_node.announced import Distance, NodeStatus, encode_status
from libmesh_node.entries import Entry, announced
from libmesh_node.llama.gguf import GgufHeader, TensorInfo
from libmesh_node.llama.load import IDLE, UNABLE
from libmesh_node.llama.server import ServerPlan
from libmesh_node.models.reference import ModelFile
from libmesh_node.options import NodeOptions
from libmesh_node.placement.seen import SERVICE
from libmesh_node.placement.splitting import Placement
from libmesh_node.snapshot import Process
from libmesh_node.split_run import SplitFailed, SplitSetting, reckon

from libmesh import MeshId, PathKind, PeerId, PeerState, PeerView, Scope, Service, View
from libmesh import Path as Way
from tests.placement.machines import GB

DIGESTS = {"m": "ab" * 32, "n": "cd" * 32}
LAYERS, LAYER = 40, GB
LOAD = 5.0

TRAINED = 16384
"""Tokens of context that the models know; four requests at once may have so much, each."""


@dataclass
class Machine:
    """What a node has: GB of memory, its bandwidth in GB/s, seconds to everybody, and models."""

    memory: float
    bandwidth: float = 20.0
    rtt: float = 0.002
    models: tuple[str, ...] = ("m",)


class Run:
    """In place of `SplitRun`."""

    def __init__(
        self,
        world: World,
        setting: SplitSetting,
        placement: Placement,
        memory: dict[str, int],
        held: dict[str, int],
        on_change: Callable[[], None],
    ) -> None:
        self.context, self.taken = reckon(setting, placement, memory, held)
        self.digest = setting.shape.digest
        self.placement, self.scope = placement, trio.CancelScope()
        self.ready_since: float | None = None
        self.server: Any = None
        self.loaded = False
        self.lost = trio.Event()
        self.why: SplitFailed | None = None
        self._world, self._setting, self._on_change = world, setting, on_change

    @property
    def ready(self) -> bool:
        return self.loaded

    @property
    def home_bytes(self) -> int:
        return self.taken[self.placement.host]

    async def run(self) -> SplitFailed | None:
        with self.scope:
            await trio.sleep(0.05)
            for share in self.placement.workers:
                if share.peer not in self._world.nodes:
                    return SplitFailed("it is gone", share.peer)
                if self._world.free(share.peer) < self.taken[share.peer]:
                    return SplitFailed("its memory is taken", share.peer, later=True)
            self._world.runs.append(self)
            self._world.news()
            self._world.crowded |= {peer for peer in self.taken if self._world.free(peer) < 0}
            broken = self.placement.host in self._world.broken
            self._world.most = max(self._world.most, len(self._world.runs))
            try:
                self.server = _server(self, self._setting)
                with trio.move_on_after(LOAD):
                    await self.lost.wait()
                if broken:
                    self.why = SplitFailed("it exited with status 1")
                elif not self.lost.is_set():
                    self.loaded = True
                    self._world.note()
                    self._on_change()
                    await self.lost.wait()
            finally:
                self.loaded = False
                self._world.runs.remove(self)
                self._world.note()
        return self.why


def _server(run: Run, setting: SplitSetting) -> SimpleNamespace:
    class Server(SimpleNamespace):
        @property
        def base_url(self) -> str | None:
            return "http://127.0.0.1:1" if run.loaded else None

        @property
        def process(self) -> Process:
            status = "ready" if run.loaded else "loading"
            return Process(name="llama-server", pid=1, port=1, model=setting.model.name, status=status)

    return Server(plan=ServerPlan(model=setting.model, context=run.context), load=IDLE, abilities=UNABLE)


class Node:
    """One node, its part in the mesh, and the real `Splits` that decides for it."""

    def __init__(self, world: World, name: str, machine: Machine) -> None:
        self.world, self.name, self.machine = world, name, machine
        self.life = trio.CancelScope()
        self.incarnation = 1
        self.entries = {model: _entry(model, world.heads) for model in machine.models}
        self.entry = self.entries[machine.models[0]]
        engine = SimpleNamespace(rpc_server=None, require_llama_server=lambda: SimpleNamespace())
        models: Any = SimpleNamespace(
            entries=self.entries,
            equipment=SimpleNamespace(rpc_protocol="7.0.0", engine=engine, own_devices=("CUDA0",)),
            on_change=world.news,
            log_of=lambda _: Path("/dev/null"),
            spare_bytes=int(machine.memory * GB),
        )
        options = NodeOptions(data_dir=Path("/nowhere"), split=world.force)
        mesh: Any = self
        self.splits = splits.Splits(mesh, models, options, self.status, self._launch)  # type: ignore[arg-type]
        lent = partial(world.lent_by, name)
        lender: Any = SimpleNamespace(models={}, lent_on=lent, granted_on=lent)
        self.splits._lender = lender

    @property
    def view(self) -> View:
        return self.world.view_of(self.name)

    @property
    def scope(self) -> Scope:
        return Scope.WORKER

    def status(self) -> NodeStatus:
        machine = self.machine
        far = tuple(
            Distance(name, max(machine.rtt, other.machine.rtt))
            for name, other in sorted(self.world.nodes.items())
            if name != self.name
        )
        return NodeStatus(
            memory_bytes=int(machine.memory * GB), spare_bytes=0 if self.splits.unable else int(machine.memory * GB), models=tuple(map(announced, self.entries.values())),
            bandwidth=int(machine.bandwidth * GB), accelerated=True, rpc_protocol="7.0.0", distances=far,
        )  # fmt: skip

    def _launch(self, *about: Any) -> Run:
        self.world.launched += 1
        return Run(self.world, *about)


class World:
    """All nodes. Everybody sees at once what the others announce.

    Attributes:
        launched: splits that were begun; `most`: that lived at once.
        broken: nodes whose llama-server ends while it loads. idle: nodes that do nothing.
        lent: GB of a node's memory that work for another model, which nobody announces.
        crowded: nodes of whose memory splits ever had more than there is.
        heads: for the attention cache, of each layer: 256 bytes each for a token.
        outages: spans of time without a server, since there first was one.
    """

    def __init__(self, nursery: trio.Nursery, *, force: bool, heads: int) -> None:
        self.nodes: dict[str, Node] = {}
        self.runs: list[Run] = []
        self.force, self.heads = force, heads
        self.launched = self.most = 0
        self.outages: list[float] = []
        self.broken: set[str] = set()
        self.idle: set[str] = set()
        self.lent: dict[str, float] = {}
        self.crowded: set[str] = set()
        self._served_until: float | None = None
        self._served = False
        self._nursery = nursery

    def join(self, name: str, machine: Machine) -> Node:
        node = self.nodes[name] = Node(self, name, machine)
        if name not in self.idle:
            self._nursery.start_soon(self._live, node)
        self.news()
        return node

    def leave(self, name: str) -> None:
        """It is gone, and with it every split that it had a part in."""
        node = self.nodes.pop(name)
        node.life.cancel()
        for run in self.runs:
            if run.placement.host != name and name in run.placement.members:
                run.why = SplitFailed("it is gone", name)
                run.lost.set()
        self.news()

    def lose_worker(self, name: str) -> None:
        """Its rpc-server dies; its node stays."""
        for run in self.runs:
            if any(share.peer == name for share in run.placement.workers):
                run.why = SplitFailed("its rpc-server died", name)
                run.lost.set()

    async def _live(self, node: Node) -> None:
        with node.life:
            await node.splits.run()

    def free(self, name: str) -> int:
        taken = sum(run.taken.get(name, 0) for run in self.runs)
        return int((self.nodes[name].machine.memory - self.lent.get(name, 0)) * GB) - taken

    def lent_by(self, name: str, digest: str) -> int:
        """Bytes that work for other hosts of a model."""
        runs = (run for run in self.runs if run.digest == digest and run.placement.host != name)
        return sum(run.taken.get(name, 0) for run in runs)

    @property
    def serving(self) -> list[Run]:
        return [run for run in self.runs if run.loaded]

    def note(self) -> None:
        """A server began or ceased to answer."""
        now, served = trio.current_time(), bool(self.serving)
        if served and self._served_until is not None and now > self._served_until:
            self.outages.append(now - self._served_until)
        if served:
            self._served_until = None
        elif self._served:
            self._served_until = now
        self._served = served or (self._served and not served and self._served_until is None)

    def news(self) -> None:
        for node in self.nodes.values():
            node.splits.look()

    def view_of(self, name: str) -> View:
        me = self.nodes.get(name)
        others = tuple(
            PeerView(
                peer=PeerId(other.name), scope=Scope.WORKER, state=PeerState.ALIVE, addresses=(), since_unix=0.0,
                services=(Service(name=SERVICE, scope=Scope.WORKER),), attributes=encode_status(other.status()),
                path=Way(kind=PathKind.DIRECT, address="", rtt=other.machine.rtt), incarnation=other.incarnation,
            )
            for other in sorted(self.nodes.values(), key=lambda node: node.name)
            if other is not me
        )  # fmt: skip
        return View(mesh_id=MeshId("0" * 32), me=PeerId(name), scope=Scope.WORKER, peers=others)


@asynccontextmanager
async def world(*, force: bool, heads: int = 0) -> AsyncIterator[World]:
    """An empty one."""
    async with trio.open_nursery() as nursery:
        yield World(nursery, force=force, heads=heads)
        nursery.cancel_scope.cancel()


def _entry(name: str, heads: int) -> Entry:
    header = _header(heads)
    model = ModelFile(name=name, parts=(Path(f"/{name}.gguf"),), size_bytes=LAYERS * LAYER, header=header)
    plan = ServerPlan(model=model, context=4096)
    entry = Entry(model, (header,), plan, alone=False, digest=DIGESTS[name])
    entry.identified.set()
    return entry


def _header(heads: int) -> GgufHeader:
    tensors = tuple(TensorInfo(f"blk.{layer}.w", (1,), 0, 0, LAYER) for layer in range(LAYERS))
    return GgufHeader(
        architecture="llama", name="m", context_length=TRAINED, n_layers=LAYERS, embedding_length=64, vocabulary=100,
        heads=1, kv_heads=(heads,) * LAYERS, key_length=64, value_length=64, quantisation="F16", expert_count=0,
        pooling=None, has_chat_template=True, split_no=0, split_count=0, tensors=tensors, values={},
    )  # fmt: skip

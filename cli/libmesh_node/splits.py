"""This node's part in splits, for one stay in one mesh: it lends its rpc-server, and hosts what the election gives it.

Every node looks at the same announcements and elects the same host (`placement/`). The host acts: it asks the workers for
sessions, starts llama-server, and announces the model when it answers. A worker only answers. So nobody votes, and two
nodes that see things differently for a moment meet at a worker, which lends its memory once.

What a host does with its model is in `split_host.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace

import trio

from libmesh import Mesh, PeerId, Scope
from libmesh_node.announced import AnnouncedModel, NodeStatus
from libmesh_node.llama.rpc.lender import Lender, LentModel
from libmesh_node.models.digest import model_digest
from libmesh_node.options import NodeOptions
from libmesh_node.placement.seen import SERVICE, distances, machines_with
from libmesh_node.placement.shape import ModelShape
from libmesh_node.planning import likeliest, plan_json, protocols_of, rules_of
from libmesh_node.serving import LocalModels
from libmesh_node.snapshot import Process
from libmesh_node.split_host import Launch, SplitHost
from libmesh_node.split_run import SplitRun

log = logging.getLogger(__name__)


class Splits:
    """Lends and hosts. `run` until cancelled; `look` whenever the view or this node's status changed.

    Args:
        mesh: the mesh of this stay.
        models: this node's own; what is hosted here is entered there.
        options: the command line.
        status: what this node announces at the moment.
        launch: makes what runs a placement.
    """

    def __init__(
        self,
        mesh: Mesh,
        models: LocalModels,
        options: NodeOptions,
        status: Callable[[], NodeStatus],
        launch: Launch = SplitRun,
    ) -> None:
        self._launch = launch
        self._options, self._status = options, status
        self._mesh, self._models = mesh, models
        self._hosts: dict[str, SplitHost] = {}
        self._lender: Lender | None = None
        self._tasks: trio.Nursery | None = None

    @property
    def processes(self) -> tuple[Process, ...]:
        """The rpc-servers that work for others."""
        return self._lender.processes if self._lender is not None else ()

    @property
    def unable(self) -> bool:
        """Whether this node is to offer no memory for a while, since it could not load what it was elected for."""
        return any(host.unable_until > trio.current_time() for host in self._hosts.values())

    @property
    def notices(self) -> tuple[str, ...]:
        """What keeps a model from being served, in words."""
        return tuple(
            f"{host.name} is not served: {host.missing}."
            for host in self._hosts.values()
            if host.missing and not host.served
        )

    def look(self) -> None:
        """Something changed. Never blocks."""
        self._note_lent()
        self._keep_up()
        for host in self._hosts.values():
            host.look()
        if self._lender is not None:
            self._lender.models.clear()
            for entry in self._models.entries.values():
                if entry.digest and not entry.leaving:
                    name, parts = entry.model.name, entry.model.parts
                    self._lender.models[entry.digest] = LentModel(name=name, digest=entry.digest, parts=parts)

    def plan(self, name: str, shape: ModelShape) -> dict[str, object]:
        """How a model would be served now, this node included whether it runs with the model or not, unless it is a client."""
        view, mine, equipment = self._mesh.view, self._status(), self._models.equipment
        protocols = [equipment.rpc_protocol]
        if equipment.engine is None:  # a client, or there is no llama.cpp: what the others do between them
            protocols = protocols_of(shape.digest, view)
        elif all(model.digest != shape.digest for model in mine.models):
            models = (*mine.models, AnnouncedModel(name=name, digest=shape.digest))
            far = distances(view, (shape.digest,), ())  # it announces those to its own models' peers
            mine = replace(mine, models=models, distances=far)
        found = (
            machines_with(shape.digest, view, mine, name=name, protocol=protocol, refused={})
            for protocol in protocols
        )
        return likeliest(
            [plan_json(name, shape, machines, rules_of(self._options), view.me) for machines in found]
        )

    async def run(self) -> None:
        """Lend and host until cancelled; then all sessions and servers end."""
        async with trio.open_nursery() as nursery:
            self._tasks = nursery
            try:
                self.look()
                await trio.sleep_forever()
            finally:
                self._tasks = None
                self._note_lent()

    def _note_lent(self) -> None:
        """What this machine lends, by its own models, each under one name."""
        noted: set[str] = set()
        for entry in self._models.entries.values():
            lends = self._lender is not None and self._tasks is not None and entry.digest not in noted
            entry.lent_bytes = self._lender.granted_on(entry.digest) if lends and self._lender else 0
            noted.add(entry.digest)

    def _keep_up(self) -> None:
        """Models come and go while the node runs: host each that takes other nodes, and lend for all."""
        if self._tasks is None:
            return
        entries = self._models.entries
        for name, host in list(self._hosts.items()):
            if entries.get(name) is not host.entry:
                self._hosts.pop(name).scope.cancel()
        for name, entry in entries.items():
            if not entry.alone and name not in self._hosts:
                host = SplitHost(
                    self._mesh, self._models, entry, self._options, self._status, self._launch, self._lent
                )
                self._hosts[name] = host
                self._tasks.start_soon(host.run)
        if self._lender is None and self._mesh.scope >= Scope.WORKER:
            self._lender = _lender(self._mesh, self._models, self._options)
            if self._lender is not None:
                self._tasks.start_soon(self._lend, self._lender)

    def _lent(self, digest: str) -> int:
        return self._lender.lent_on(digest) if self._lender is not None else 0

    async def _lend(self, lender: Lender) -> None:
        with self._mesh.offer(SERVICE, lender.serve, scope=Scope.WORKER, lasting=True):
            await trio.sleep_forever()


def _lender(mesh: Mesh, models: LocalModels, options: NodeOptions) -> Lender | None:
    binary = models.equipment.engine.rpc_server if models.equipment.engine is not None else None
    if binary is None or not models.entries:
        return None

    def memory() -> int:
        hosted = sum(entry.split_bytes for entry in models.entries.values())
        return models.spare_bytes - hosted

    return Lender(
        binary,
        memory=memory,
        environment=os.environ,
        device=options.device,
        cpu=not models.equipment.own_devices,
        on_change=models.on_change,
        open_stream=lambda peer: mesh.open_service(PeerId(peer), SERVICE),
        identify=model_digest,
    )

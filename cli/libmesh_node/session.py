"""One stay in one mesh: what this node offers there, and a local port to each model that another node serves.

A session follows two things and needs no commands of its own: the mesh's view, and the node's own models. For each
ready model of ours there is a service `api/<name>` that leads to its llama-server; for each ready model of a live
peer there is a tunnel, so that to the proxy a model on another machine is just another base URL.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import urlsplit

import trio

from libmesh import (
    AddressUnavailable,
    Mesh,
    MeshError,
    PeerId,
    PeerState,
    PeerView,
    Scope,
    Stream,
    expose,
    serve_tunnel,
)
from libmesh_node.announced import SERVICE_PREFIX, AnnouncedModel, NodeStatus, decode_status, encode_status
from libmesh_node.asked import Asked
from libmesh_node.bridge import CommandFailed
from libmesh_node.door import Door
from libmesh_node.http_framing import HttpExchange
from libmesh_node.options import NodeOptions
from libmesh_node.picture import server
from libmesh_node.serving import LocalModels
from libmesh_node.snapshot import Server, Tunnel
from libmesh_node.splits import Splits
from libmesh_node.telling import SERVICE as DEMAND
from libmesh_node.telling import Teller, hear

log = logging.getLogger(__name__)

BELIEVED = (PeerState.ALIVE, PeerState.SUSPECT)

MAX_EXPOSED = 128
"""Services that people may expose: half of what a node may offer, so that its models always find room."""

RETRY_AFTER = 5.0
"""Seconds until a tunnel to a model, or the offer of one, is tried again for which this machine had no port."""

MAX_TUNNELS = 1024
"""Tunnels to models, and as many that people asked for. Further models of peers are left out, with a line in the log."""


@dataclass(eq=False)
class _Way:
    """The tunnel to a model of a peer.

    Attributes:
        taking: cancelled, it takes no new connections.
        all: cancelled, those that it has end, too.
    """

    taking: trio.CancelScope = field(default_factory=trio.CancelScope)
    all: trio.CancelScope = field(default_factory=trio.CancelScope)


class Session:
    """Keeps services and tunnels in step with what there is. `run` until cancelled.

    Args:
        mesh: the mesh, open.
        models: this node's own.
        options: the command line.
        on_change: called in trio's thread when a tunnel came or went, or the view changed.
        status: what this node announces at the moment.
        told: told of what clients that only follow are asked for.

    Attributes:
        splits: its part in models that are split over nodes.
        teller: of a client, tells a member what is asked for here.
    """

    def __init__(
        self,
        mesh: Mesh,
        models: LocalModels,
        options: NodeOptions,
        on_change: Callable[[], None],
        status: Callable[[], NodeStatus],
        told: Callable[[str, tuple[Asked, ...]], None],
    ) -> None:
        self.mesh = mesh
        self.teller = Teller(mesh)
        self._options, self._told = options, told
        self.splits = Splits(mesh, models, options, status)
        self._offering: dict[str, trio.Lock] = {}
        self._models, self._on_change = models, on_change
        self._offers: dict[tuple[str, int], trio.CancelScope] = {}
        self._tunnels: dict[tuple[PeerId, str], _Way] = {}
        self._leaving: set[tuple[PeerId, _Way]] = set()
        self._ports: dict[tuple[PeerId, str], int] = {}
        self._forwards: list[Tunnel] = []
        self._tasks: trio.Nursery | None = None

    @property
    def forwards(self) -> tuple[Tunnel, ...]:
        """The TCP forwards that people asked for."""
        return tuple(self._forwards)

    async def run(self) -> None:
        """Follow the view and keep in step, until cancelled."""
        async with trio.open_nursery() as nursery, self.mesh.watch() as views:
            self._tasks = nursery
            self.sync_offers()
            nursery.start_soon(self.splits.run)
            nursery.start_soon(self.teller.run if self._options.client else self._hear)
            try:
                async for _ in views:
                    self._sync_tunnels()
                    self._on_change()
                    self.splits.look()
            finally:
                self._tasks = None
                nursery.cancel_scope.cancel()

    def announce(self, status: NodeStatus) -> None:
        """Tell the others this node's status. If there is no room for it, they keep what they were told last."""
        try:
            self.mesh.announce(encode_status(status))
        except ValueError as exc:
            log.warning("the other nodes cannot be told of all that this one serves: %s", exc)

    async def _hear(self) -> None:
        async def serve(stream: Stream) -> None:
            await hear(stream, self._told)

        with self.mesh.offer(DEMAND, serve):
            await trio.sleep_forever()

    # ── what we offer ────────────────────────────────────────────────────────────────────────────────────────────

    def sync_offers(self) -> None:
        """Offer each model of ours that is ready, at the port where it is now."""
        if self._tasks is None:
            return
        urls = {model.name: self._models.base_url(model.name) for model in self._models.announced}
        slots = {model.name: model.slots for model in self._models.announced}
        wanted = {(name, urlsplit(url).port or 0) for name, url in urls.items() if url is not None}
        for offer in set(self._offers) - wanted:
            self._offers.pop(offer).cancel()
        for name, port in wanted - set(self._offers):
            scope = self._offers[name, port] = trio.CancelScope()
            door = self._models.entries[name].door = Door(name, slots[name])
            self._tasks.start_soon(self._offer, name, port, door, scope)

    async def _offer(self, name: str, port: int, door: Door, scope: trio.CancelScope) -> None:
        with scope:
            async with self._offering.setdefault(name, trio.Lock()):  # until its predecessor is withdrawn
                told = ""
                while True:
                    try:
                        async with trio.open_nursery() as nursery:
                            await nursery.start(door.run)
                            service = SERVICE_PREFIX + name
                            await expose(
                                self.mesh, service, "127.0.0.1", port, door=door, framing=HttpExchange
                            )
                    except* (ValueError, OSError) as group:
                        if told != (told := str(group.exceptions[0])):
                            log.warning("%s is served on this machine only, for now: %s", name, told)
                    await trio.sleep(RETRY_AFTER)

    # ── what others offer ────────────────────────────────────────────────────────────────────────────────────────

    def remote_models(self) -> dict[str, list[tuple[AnnouncedModel, Server | None]]]:
        """What other nodes serve, by the model's name, with the server where there is one to ask now.

        Models that are loading or restarting, and those of a node that broke off, are there without: that they are
        away for the moment is another answer than that nobody has ever heard of them.
        """
        found: dict[str, list[tuple[AnnouncedModel, Server | None]]] = {}
        for peer in self.mesh.view.peers:
            if peer.state is not PeerState.LEFT:
                for model in decode_status(peer.attributes).models:
                    found.setdefault(model.name, []).append((model, self._server(peer, model)))
        return found

    def _server(self, peer: PeerView, model: AnnouncedModel) -> Server | None:
        port = self._ports.get((peer.peer, model.name))
        if port is None or model not in _ready_models(peer):
            return None
        return server(
            model, peer.peer, f"http://127.0.0.1:{port}", rtt=_rounded(peer.path.rtt if peer.path else None)
        )

    def _sync_tunnels(self) -> None:
        if self._tasks is None:
            return
        peers = self.mesh.view.peers
        wanted = {(peer.peer, model.name) for peer in peers for model in _ready_models(peer)}
        for key in set(self._tunnels) - wanted:
            way = self._tunnels.pop(key)
            self._leaving.add((key[0], way))
            way.taking.cancel()
            if self._ports.pop(key, None) is not None:
                log.info("%s is no longer served by the peer %s", key[1], key[0])
        believed = {peer.peer for peer in peers if peer.state in BELIEVED}
        for peer, way in self._leaving:
            if peer not in believed:
                way.all.cancel()
        for key in sorted(wanted - set(self._tunnels)):
            if len(self._tunnels) >= MAX_TUNNELS:
                log.warning("more than %d models on other nodes; %s is left out", MAX_TUNNELS, key[1])
                break
            way = self._tunnels[key] = _Way()
            self._tasks.start_soon(self._tunnel, key, way)

    async def _tunnel(self, key: tuple[PeerId, str], way: _Way) -> None:
        """Until the model is withdrawn, and then until the answers under way are whole."""
        peer, name = key
        try:
            with way.all:
                async with trio.open_nursery() as answers:
                    with way.taking:
                        while True:
                            try:
                                await self._carry(key, answers)
                            except* AddressUnavailable as group:  # out of file descriptors, say
                                log.warning(
                                    "no way to %s of the peer %s: %s", name, peer, group.exceptions[0]
                                )
                            await trio.sleep(RETRY_AFTER)
        finally:
            self._leaving.discard((peer, way))
            self._on_change()

    async def _carry(self, key: tuple[PeerId, str], answers: trio.Nursery) -> None:
        peer, name = key
        async with trio.open_nursery() as nursery:
            service = SERVICE_PREFIX + name
            tunnel = partial(serve_tunnel, self.mesh, peer, service, handler_nursery=answers)
            self._ports[key] = await nursery.start(tunnel)
            log.info("%s is served by the peer %s", name, peer)
            self._on_change()

    # ── what people asked for ────────────────────────────────────────────────────────────────────────────────────

    async def expose(self, name: str, host: str, port: int, scope: Scope) -> None:
        """Offer a TCP service until the session ends. Raises `CommandFailed`."""
        tasks = self._ready_for_forward()
        if name.startswith(SERVICE_PREFIX):
            raise CommandFailed(
                "invalid", f"Names that begin with {SERVICE_PREFIX} are for models; choose another."
            )
        if any(forward.name == name and forward.direction == "expose" for forward in self._forwards):
            raise CommandFailed("conflict", f"This node exposes {name} already.")
        if sum(forward.direction == "expose" for forward in self._forwards) >= MAX_EXPOSED:
            raise CommandFailed("busy", f"This node exposes {MAX_EXPOSED} services, which is all it takes.")
        try:
            await tasks.start(partial(self._run_expose, name, host, port, scope))
        except (ValueError, MeshError) as exc:
            raise CommandFailed("invalid", f"{exc}.") from exc
        self._forwards.append(Tunnel(direction="expose", name=name, target=f"{host}:{port}"))
        self._on_change()

    async def _run_expose(
        self, name: str, host: str, port: int, scope: Scope, *, task_status: trio.TaskStatus[None]
    ) -> None:
        await expose(self.mesh, name, host, port, scope=scope, task_status=task_status)

    async def connect(self, peer: str, name: str, port: int) -> int:
        """Forward a local port to `name` at the peer whose id, or the end or hostname of whose id, is `peer`."""
        tasks = self._ready_for_forward()
        target = self._peer_named(peer)
        service = next((service for service in target.services if service.name == name), None)
        if service is None:
            offered = ", ".join(service.name for service in target.services) or "nothing"
            raise CommandFailed("not_found", f"The peer offers no {name}; it offers {offered}.")
        if self.mesh.scope < service.scope:
            needed, ours = service.scope.name.lower(), self.mesh.scope.name.lower()
            raise CommandFailed(
                "denied", f"{name} needs the scope {needed}; this node was invited as {ours}."
            )
        try:
            used = int(await tasks.start(partial(serve_tunnel, self.mesh, target.peer, name, port=port)))
        except MeshError as exc:
            raise CommandFailed("conflict", f"{exc}.") from exc
        self._forwards.append(
            Tunnel(direction="connect", name=name, target=f"127.0.0.1:{used}", peer=target.peer, port=used)
        )
        self._on_change()
        return used

    def _ready_for_forward(self) -> trio.Nursery:
        if self._tasks is None:
            raise CommandFailed("unreachable", "The node is not in a mesh now; try again in a moment.")
        if len(self._forwards) >= MAX_TUNNELS:
            raise CommandFailed("busy", f"This node has {MAX_TUNNELS} forwards, which is all it takes.")
        return self._tasks

    def _peer_named(self, text: str) -> PeerView:
        peers = [peer for peer in self.mesh.view.peers if peer.state in BELIEVED]
        matches = [
            peer
            for peer in peers
            if text == peer.peer
            or (len(text) >= 4 and peer.peer.endswith(text))
            or text == decode_status(peer.attributes).hostname
        ]
        if len(matches) != 1:
            what = "No live peer is" if not matches else f"{len(matches)} peers are"
            raise CommandFailed("not_found", f"{what} called {text}; `libmesh-node status` lists them.")
        return matches[0]


def _ready_models(peer: PeerView) -> list[AnnouncedModel]:
    """What a peer serves. Prompts go only to members who may be lent work: a guest could announce any name."""
    if peer.state not in BELIEVED or peer.scope < Scope.WORKER:
        return []
    offered = {service.name for service in peer.services}
    models = decode_status(peer.attributes).models
    return [model for model in models if model.ready and SERVICE_PREFIX + model.name in offered]


def _rounded(rtt: float | None) -> float | None:
    """Two digits are all that anybody acts on; more would make every measurement a new snapshot."""
    return None if rtt is None else float(f"{rtt:.2g}")

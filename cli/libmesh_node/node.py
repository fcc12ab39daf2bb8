"""The wiring diagram: opens, connects, supervises. What the parts do is in the parts.

    run_node ── data folder, log, signals (starting.py)
       └── Node.run
             ├── serve_http        API and console, in their own thread, behind the bridge
             ├── LocalModels.run   a llama-server for each model that is served
             ├── Standby.run       tells what is asked for, and serves what the mesh wants
             ├── Stays.run         one stay in one mesh after the other, with a Session each
             └── _tick             refreshes what changes without an event, such as round-trip times

All five are tasks of one nursery, so that cancelling it ends them at the same time, and the node within 3 s.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from functools import partial

import trio

import libmesh
from libmesh import (
    AdmissionRefused,
    InviteDenied,
    InviteError,
    Mesh,
    MeshError,
    MeshId,
    Scope,
    View,
    read_invite,
)
from libmesh_node import picture
from libmesh_node.announced import AnnouncedModel, Distance, NodeStatus
from libmesh_node.asked import Asked
from libmesh_node.bridge import Bridge, CommandFailed
from libmesh_node.datadir import DataDir, NodeInfo
from libmesh_node.ending import end_for_sure
from libmesh_node.errors import NodeError, sentence
from libmesh_node.finishing import finish
from libmesh_node.http.server import Listening, serve_http
from libmesh_node.inviting import Inviting
from libmesh_node.membership import Membership, secret_key
from libmesh_node.models.reference import model_folders
from libmesh_node.options import NodeOptions
from libmesh_node.placement.rows import asks_of, on_disks
from libmesh_node.placement.seen import distances
from libmesh_node.renewing import Renewal
from libmesh_node.runtime import Runtime
from libmesh_node.serving import LocalModels
from libmesh_node.session import Session
from libmesh_node.shelf import Shelf
from libmesh_node.snapshot import NodeSnapshot, Server
from libmesh_node.standby import Standby
from libmesh_node.stays import Stays

log = logging.getLogger(__name__)

TICK = 2.0
"""Seconds between looks at what changes without an event. The console and `status --watch` are no faster."""

_REPLY_TIME = 0.1  # seconds for the answer to `stop` to get out


class Node:
    """A node's parts, and the commands that the console may give it (`bridge.NodeCommands`).

    Args:
        options: the command line.
        folder: the data folder, held.
        ended: cancelled to end the node.
    """

    def __init__(self, options: NodeOptions, folder: DataDir, ended: trio.CancelScope) -> None:
        self.ended = ended
        self._options, self._folder = options, folder
        self._key = secret_key(folder, "identity")
        self._models = LocalModels(options, folder, self._models_changed)
        self._listening = Listening(api_port=options.api_port, console_port=options.console_port)
        self._session: Session | None = None
        self._inviting: Inviting | None = None
        self._renewal: Renewal | None = None
        self._invited = False
        self._unwritten = ""
        self._introduced: set[MeshId] = set()
        self._distances: tuple[Distance, ...] = ()
        self._announced: NodeStatus | None = None
        shelf = Shelf(model_folders(folder.path), self._models.equipment, self._models_changed)
        self._standby = Standby(self._key.peer, self._models, shelf, options, self._seen, self._view_changed)
        self._runtime = Runtime(self._models, shelf, self._standby, options)
        self._stays = Stays(
            options, folder, self._key, opened=self._opened, entered=self._entered, closed=self._closed
        )
        self._bridge = Bridge(self, self._picture())

    async def run(self) -> None:
        """Start everything, and run until cancelled. Raises what keeps it from starting."""
        log.info("node       %s", self._key.peer)
        first = self._stays.first()
        async with trio.open_nursery() as nursery:
            serve = partial(
                serve_http,
                self._bridge,
                api=("127.0.0.1", self._options.api_port),
                console=("127.0.0.1", self._options.console_port),
                listen_all=self._options.listen_all,
            )
            self._listening = await nursery.start(serve)
            self._write_info()
            await self._models.prepare()
            nursery.start_soon(self._models.run)
            nursery.start_soon(self._standby.run)
            nursery.start_soon(self._stays.run, first)
            nursery.start_soon(self._tick)

    def _write_info(self) -> None:
        ports = self._listening
        info = NodeInfo(
            pid=os.getpid(),
            api_port=ports.api_port,
            console_port=ports.console_port,
            version=libmesh.__version__,
            started_unix=time.time(),
        )
        self._folder.write_info(info)
        log.info("API        http://localhost:%d/v1", ports.api_port)
        log.info("console    http://localhost:%d", ports.console_port)

    # ── stays ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _opened(self, mesh: Mesh, membership: Membership, nursery: trio.Nursery) -> None:
        self._session = Session(
            mesh, self._models, self._options, self._view_changed, self._status, self._standby.told
        )
        self._inviting = Inviting(mesh, self._folder, self._options)
        self._invited = membership.token is not None
        self._renewal = Renewal(
            mesh, self._folder, self._options, invited=self._invited, renewed=self._renewed
        )
        nursery.start_soon(self._renewal.run)
        nursery.start_soon(self._session.run)
        self._models_changed()

    def _closed(self) -> None:
        self._session, self._inviting, self._announced, self._renewal = None, None, None, None

    def _renewed(self) -> None:
        if self._inviting is not None:
            self._inviting.show_again()
        self._refresh()

    def _entered(self, mesh: Mesh, membership: Membership) -> None:
        """Say in a few lines what a person needs to know now."""
        if self._inviting is not None:
            self._inviting.show()
        self._refresh()
        if mesh.mesh_id in self._introduced:
            log.info("back in the mesh %s", mesh.mesh_id)
            return
        self._introduced.add(mesh.mesh_id)
        how = "its own" if membership.token is None else f"joined as {mesh.scope.name.lower()}"
        log.info("mesh       %s (%s)", mesh.mesh_id, how)
        log.info("addresses  %s", "  ".join(mesh.addresses[:8]))
        if self._inviting is not None and self._inviting.token:
            token = self._inviting.token
            log.info("the next machine joins with:  libmesh-node --join %s", token, extra={"private": True})
        if self._options.models and mesh.scope < Scope.WORKER:
            log.warning(
                "this node may only use the mesh, so others will not use its models; ask for an invite with --scope worker"
            )
        if not self._options.models and not self._options.client and membership.token is None:
            log.info(
                "idle: nothing is served; start with --model PATH (or --model demo), or join a mesh with --join"
            )

    # ── what others see ──────────────────────────────────────────────────────────────────────────────────────────

    def _models_changed(self) -> None:
        """A server of ours came or went: offer, announce and show it."""
        if self._session is not None:
            self._session.sync_offers()
            self._session.splits.look()
        self._view_changed()

    def _view_changed(self) -> None:
        """Tell the others what is new of this node, if anything is, and show what there is now."""
        if self._session is not None:
            digests = [entry.digest for entry in self._models.entries.values() if entry.digest]
            self._distances = distances(self._session.mesh.view, digests, self._distances)
            if (status := self._status()) != self._announced:
                self._session.announce(status)
                self._announced = status
            self._standby.look()
        self._refresh()

    def _refresh(self) -> None:
        self._bridge.publish(self._picture())

    async def _tick(self) -> None:
        while True:
            await trio.sleep(TICK)
            if self._inviting is not None:
                self._keep(self._inviting)
            self._view_changed()

    def _keep(self, inviting: Inviting) -> None:
        """Write down what changed. A full disk is told once and does not end a node that serves."""
        try:
            inviting.keep()
            if inviting.token:
                inviting.show()
        except NodeError as exc:
            if str(exc) != self._unwritten:
                log.warning("%s What changed is lost if this node ends now.", exc)
            self._unwritten = str(exc)
        else:
            self._unwritten = ""

    def _status(self) -> NodeStatus:
        return NodeStatus(
            version=libmesh.__version__,
            hostname=socket.gethostname(),
            client=self._options.client,
            memory_bytes=self._models.equipment.memory_bytes,
            models=self._models.announced,
            node_status=self._word(),
            spare_bytes=0 if self._session and self._session.splits.unable else self._models.offered_bytes,
            bandwidth=self._models.equipment.bandwidth,
            accelerated=bool(self._models.equipment.own_devices),
            rpc_protocol=self._models.equipment.rpc_protocol,
            distances=self._distances,
            wishes=self._standby.wishes(),
            on_disk=self._standby.on_disk(),
            rests=self._standby.rests,
        )

    def _seen(self) -> tuple[View, NodeStatus] | None:
        """The mesh, and what this node announces to it; `None` while it is in none."""
        return (self._session.mesh.view, self._status()) if self._session is not None else None

    def _word(self) -> str:
        alone = self._session is None or not self._session.mesh.view.peers
        lends = self._session is not None and bool(self._session.splits.processes)
        own = self._models.announced
        return picture.node_status(client=self._options.client, own=own, alone=alone, lends=lends)

    def _picture(self) -> NodeSnapshot:
        session = self._session
        view = session.mesh.view if session is not None else None
        own = [(model, self._local_server(model)) for model in self._models.announced]
        seen = self._seen()
        return NodeSnapshot(
            node_id=self._key.peer,
            mesh_id=view.mesh_id if view is not None else "",
            version=libmesh.__version__,
            hostname=socket.gethostname(),
            node_status=self._word(),
            is_client=self._options.client,
            scope=view.scope.name.lower() if view is not None else "",
            token=self._inviting.token if self._inviting is not None else "",
            invites=self._inviting.invites if self._inviting is not None else (),
            api_port=self._listening.api_port,
            console_port=self._listening.console_port,
            my_vram_gb=self._models.equipment.memory_bytes / 1e9,
            addresses=session.mesh.addresses if session is not None else (),
            reachability=picture.reachability(session.mesh.reaching if session else None),
            models=picture.models(
                own,
                session.remote_models() if session is not None else {},
                on_disks(*seen) if seen else (),
                asks_of(*seen) if seen else {},
            ),
            peers=picture.peers(view, session.mesh.admission_of)
            if session is not None and view is not None
            else (),
            local_models=self._runtime.local(),
            processes=self._models.processes + (session.splits.processes if session is not None else ()),
            tunnels=session.forwards if session is not None else (),
            notices=self._notices(view),
        )

    def _notices(self, view: View | None) -> tuple[str, ...]:
        if self._session is None or self._renewal is None or view is None:
            return ("This node is between two meshes.",) if self._introduced else ()  # else it is starting
        ending = self._renewal.notices
        if ending and self._renewal.ended:
            return ending
        if self._invited and not any(peer.path is not None for peer in view.peers):
            refusal = self._session.mesh.refusal
            nobody = "Nobody in the mesh answers; this node keeps trying."
            return (nobody if refusal is None else sentence(str(refusal)), *ending)
        return (*self._session.splits.notices, *ending)

    def _local_server(self, model: AnnouncedModel) -> Server | None:
        url = self._models.base_url(model.name)
        if url is None:
            return None
        return picture.server(model, self._key.peer, url, local=True)

    def asked(self, asked: tuple[Asked, ...]) -> None:
        """See `NodeCommands.asked`."""
        if self._options.client and self._session is not None:
            self._session.teller.tell(asked)
        else:
            self._standby.told("", asked)

    # ── commands from the console ────────────────────────────────────────────────────────────────────────────────

    async def join(self, token: str) -> str:
        """See `NodeCommands.join`: another mesh's invite makes this node leave its own for it, if it is let in.

        One to the mesh that it is in takes the place of the old one if it allows more or holds longer; nothing is cut.
        """
        try:
            to = Membership.invited(token)
            here, renewal = self._session.mesh if self._session is not None else None, self._renewal
            if here is None or renewal is None or to.mesh_id != here.mesh_id:
                await self._stays.switch(to)
            elif renewal.gains(token):
                await renewal.by(token)
            else:
                await here.join(token)
        except (InviteError, AdmissionRefused) as exc:
            raise CommandFailed("denied", sentence(str(exc))) from exc
        except MeshError as exc:
            raise CommandFailed("unreachable", sentence(str(exc))) from exc
        return to.mesh_id

    async def invite(self, scope: str, ttl: float) -> tuple[str, float]:
        """See `NodeCommands.invite`."""
        self._present_session()
        assert self._inviting is not None
        try:
            token = self._inviting.make(Scope[scope.upper()], ttl)
        except InviteDenied as exc:
            raise CommandFailed("denied", sentence(str(exc))) from exc
        except NodeError as exc:
            raise CommandFailed("internal", str(exc)) from exc
        return token, float(read_invite(token).expires_unix or 0)

    async def revoke(self, name: str) -> str:
        """See `NodeCommands.revoke`."""
        self._present_session()
        assert self._inviting is not None
        return self._inviting.revoke(name)

    async def stop(self) -> None:
        """See `NodeCommands.stop`."""
        log.info("ending, as asked")
        end_for_sure()
        trio.lowlevel.spawn_system_task(self._stop_soon)

    async def _stop_soon(self) -> None:
        await trio.sleep(_REPLY_TIME)
        await self.end()

    async def end(self) -> None:
        """End the node, once it has finished or handed over what it is answering. Cancelling ends nothing."""
        await finish(self._models)
        self.ended.cancel()

    async def expose(self, name: str, host: str, port: int, scope: str) -> None:
        """See `NodeCommands.expose`."""
        await self._present_session().expose(name, host, port, Scope[scope.upper()])

    async def connect(self, peer: str, name: str, port: int) -> int:
        """See `NodeCommands.connect`."""
        return await self._present_session().connect(peer, name, port)

    async def tunnelled(self) -> Mapping[tuple[str, str], int]:
        """See `NodeCommands.tunnelled`."""
        carried = self._session.mesh.tunnelled if self._session is not None else {}
        return {(kind.value, direction): count for (kind, direction), count in carried.items()}

    async def plan(self, model: str) -> dict[str, object]:
        """See `NodeCommands.plan`."""
        session = self._present_session()
        try:
            name, shape = await self._models.shape_of(model)
        except (NodeError, OSError) as exc:
            raise CommandFailed("invalid", sentence(str(exc))) from exc
        return session.splits.plan(name, shape)

    async def load(self, model: str) -> dict[str, object]:
        """See `NodeCommands.load`."""
        return await self._runtime.load(model)

    async def unload(self, name: str, *, forget: bool) -> dict[str, object]:
        """See `NodeCommands.unload`."""
        return await self._runtime.unload(name, forget=forget)

    def _present_session(self) -> Session:
        if self._session is None:
            raise CommandFailed("unreachable", "The node is not in a mesh now; try again in a moment.")
        return self._session

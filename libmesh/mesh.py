"""The driver: one loop that turns what happens into events of the membership machine, and its effects into deeds.

`open_mesh` is the library's front door. Everything that is decided is decided in `core/`; everything that moves
bytes is behind `net/`; this file only carries between the two, and offers what applications call.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from libmesh import hello, tunnel, wire
from libmesh.admission import Admission, AdmissionConfig
from libmesh.core import membership as core
from libmesh.core import membership_io as io
from libmesh.core.announcement import Announcement
from libmesh.core.credentials import Authority, Invite
from libmesh.errors import (
    AdmissionRefused,
    InviteDenied,
    MeshError,
    ServiceRefused,
)
from libmesh.identity import SecretKey
from libmesh.invites import check_invite
from libmesh.net import base as net
from libmesh.net.base import Network, Stream
from libmesh.net.libp2p import Libp2pConfig, open_libp2p_network
from libmesh.peers import MeshId, PeerId, PeerState, Scope, Service, View
from libmesh.wire import WireError

log = logging.getLogger(__name__)

ServiceHandler = Callable[[Stream], Awaitable[None]]
"""Called in its own task for each stream that a member opened to a service. The stream is closed when it returns, and
reset if it raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """How a mesh behaves. The defaults suit a handful to some dozens of peers on a LAN or a WAN.

    Attributes:
        agent: name and version of the application, shown to peers; at most 128 bytes.
        farewell: seconds given to our goodbye to get out before connections are closed.
        admission: times of hellos and of seeking the first peer.
        membership: times of the membership machine.
    """

    agent: str = "libmesh"
    farewell: float = 0.3
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    membership: core.MembershipConfig = field(default_factory=core.MembershipConfig)


@dataclass(frozen=True, slots=True)
class _Offer:
    service: Service
    handler: tunnel.RawHandler


class Mesh:
    """A mesh that this process is a member of. Obtained from `open_mesh`; use from its trio thread only."""

    def __init__(
        self,
        network: Network,
        key: SecretKey,
        authority: Authority,
        config: MeshConfig,
        wall_clock: Callable[[], float],
    ) -> None:
        self._network, self._config, self._authority = network, config, authority
        self._wall_base = wall_clock() - trio.current_time()
        self._credential = authority.admit(key.public)
        incarnation = int(self._now() * 1000)
        self._membership = core.Membership(
            Announcement(
                peer=key.peer,
                credential=self._credential,
                incarnation=incarnation,
                sequence=0,
                addresses=network.addresses()[: wire.MAX_ADDRESSES],
            ),
            mesh_id=authority.mesh_id,
            seal=partial(wire.seal, seed=key.seed),
            config=config.membership,
        )
        self._admission = Admission(
            network,
            self._membership,
            credential=self._credential,
            agent=config.agent,
            config=config.admission,
            now=self._now,
            tell=self._handle,
        )
        self._topic = f"libmesh/1/{self.mesh_id}/peers"
        self._offers: dict[str, _Offer] = {}
        self._attributes = b""
        self._watchers: dict[trio.MemorySendChannel[View], trio.MemoryReceiveChannel[View]] = {}
        self._rearm = trio.Event()
        self._tasks: trio.Nursery
        self._outbox, self._outgoing = trio.open_memory_channel[bytes](256)

    # ── what applications ask ────────────────────────────────────────────────────────────────────────────────────

    @property
    def peer(self) -> PeerId:
        """This node's own id."""
        return self._network.peer

    @property
    def mesh_id(self) -> MeshId:
        """The mesh's id."""
        return self._authority.mesh_id

    @property
    def scope(self) -> Scope:
        """What this node may do."""
        return self._credential.scope

    @property
    def expires_unix(self) -> int | None:
        """When this node's membership ends; `None` never."""
        return self._credential.not_after_unix

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs at which others may reach this node, best first."""
        return self._network.addresses()

    @property
    def view(self) -> View:
        """The mesh as this node sees it now."""
        return self._membership.view(self._network.path)

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[trio.MemoryReceiveChannel[View]]:
        """Views as they change, the present one first.

            async with mesh.watch() as views:
                async for view in views: ...

        Keeps the newest view only: a slow reader skips, never lags.
        """
        send, receive = trio.open_memory_channel[View](1)
        send.send_nowait(self.view)
        self._watchers[send] = receive
        try:
            async with receive:
                yield receive
        finally:
            del self._watchers[send]
            send.close()

    def announce(self, attributes: bytes) -> None:
        """Tell all peers this node's attributes: opaque bytes, at most 48 KiB (`ValueError` beyond that).

        Changes close together go out as one. Everybody is told again and again; keep it small and calm.
        """
        if len(attributes) > wire.MAX_ATTRIBUTES:
            raise ValueError(
                f"attributes of {len(attributes)} bytes; at most {wire.MAX_ATTRIBUTES} are allowed"
            )
        self._attributes = attributes
        self._announce()

    @contextmanager
    def offer(self, name: str, handler: ServiceHandler, *, scope: Scope = Scope.CLIENT) -> Iterator[None]:
        """Offer the service `name` to members with `scope`, for as long as the context lasts.

        Streams that are open then live on until their handlers return. Raises `ValueError` for a bad name or one
        that is offered already.
        """

        async def accept_first(stream: Stream, accept: tunnel.Accept) -> None:
            await accept()
            await handler(stream)

        with self.offer_raw(name, accept_first, scope=scope):
            yield

    @contextmanager
    def offer_raw(
        self, name: str, handler: tunnel.RawHandler, *, scope: Scope = Scope.CLIENT
    ) -> Iterator[None]:
        """As `offer`, for handlers that decide themselves: they call `accept()`, or raise `ServiceRefused` first."""
        if not wire.valid_service_name(name):
            raise ValueError(f"{name!r} is no service name: 1 to 255 bytes, without control characters")
        if name in self._offers:
            raise ValueError(f"the service {name!r} is offered already")
        if len(self._offers) >= wire.MAX_SERVICES:
            raise ValueError(f"at most {wire.MAX_SERVICES} services can be offered")
        self._offers[name] = _Offer(Service(name=name, scope=scope), handler)
        self._announce()
        try:
            yield
        finally:
            del self._offers[name]
            self._announce()

    async def open_service(self, peer: PeerId, service: str, *, wait: bool = True) -> Stream:
        """A stream to `service` of `peer`, connecting to the peer first if need be. The caller closes it.

        With `wait` it returns when the peer has accepted. Without, at once, so that the first bytes travel with the
        request; a refusal then comes from the first receive. Raises `ServiceRefused` or `PeerUnreachable`.
        """
        if self._admission.credential_of(peer) is None:
            await self._admission.connect(peer, self._membership.addresses_of(peer))
        stream = await self._network.open_stream(peer, tunnel.PROTOCOL)
        return await tunnel.request(stream, service, wait=wait)

    def invite(self, *, scope: Scope, not_after_unix: float | None, name_contacts: bool = True) -> str:
        """A token that lets its holder join with `scope` until `not_after_unix` (cut to this node's own end).

        It names this node's addresses, and up to two connected peers', as ways in. Raises `InviteDenied`.
        """
        if self._membership.me.announcement.leaving:
            raise InviteDenied("this node is leaving the mesh")
        end = None if not_after_unix is None else int(not_after_unix)
        authority = self._authority.delegate(scope=scope, not_after_unix=end, seed=os.urandom(32))
        contacts = [(self.peer, self.addresses[:4])]
        if name_contacts:
            alive = [entry for entry in self.view.peers if entry.path is not None and entry.addresses]
            contacts += [(entry.peer, entry.addresses[:2]) for entry in alive[:2]]
        return wire.encode_invite(Invite(authority=authority, contacts=tuple(contacts)))

    async def join(self, token: str) -> None:
        """Reach one of the contacts of an invite to *this* mesh. Returns when the first one has admitted us.

        Raises `InviteError` for a token that cannot be used, `AdmissionRefused` if every contact that was reached
        refused, `PeerUnreachable` if none was reached. The contacts are tried again in the background whenever this
        node knows nobody.
        """
        invite = check_invite(token, now_unix=self._now())
        if invite.authority.mesh_id != self.mesh_id:
            raise AdmissionRefused(
                f"the invite is for the mesh {invite.authority.mesh_id}, this is {self.mesh_id}",
                reason="wrong_mesh",
                peer="",
            )
        await self.enter(invite, wait=True)

    async def enter(self, invite: Invite, *, wait: bool) -> None:
        """Use the contacts of a checked invite; with `wait`, return when one of them has admitted us."""
        self._admission.add_contacts(invite.contacts)
        if wait:
            await self._admission.seek()

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _now(self) -> float:
        """Seconds since the epoch, from a clock that does not jump."""
        return self._wall_base + trio.current_time()

    def _announce(self) -> None:
        services = tuple(offer.service for offer in self._offers.values())
        addresses = self._network.addresses()[: wire.MAX_ADDRESSES]
        self._handle(io.SelfChanged(services, addresses, self._attributes))

    def _handle(self, event: io.Event) -> None:
        changed = False
        for effect in self._membership.handle(event, self._now()):
            match effect:
                case io.Publish(record):
                    self._publish(wire.encode_record(record))
                case io.Dial(peer, addresses):
                    self._tasks.start_soon(self._admission.dial, peer, addresses)
                case io.Drop(peer, reason):
                    log.info("dropping the peer %s: %s", peer, reason)
                    self._admission.revoke(peer)
                    self._tasks.start_soon(self._network.disconnect, peer)
                case io.Changed(peer, before, state, reason):
                    changed = True
                    if before is not state:
                        _log_change(peer, state, reason)
        if changed:
            self._tell_watchers()
        self._rearm.set()

    def _tell_watchers(self) -> None:
        view = self.view
        for send, receive in self._watchers.items():
            try:
                send.send_nowait(view)
            except trio.WouldBlock:
                receive.receive_nowait()
                send.send_nowait(view)
            except trio.BrokenResourceError:
                continue

    def _publish(self, data: bytes) -> None:
        try:
            self._outbox.send_nowait(data)
        except trio.WouldBlock:
            log.debug("gossip is not keeping up; an announcement was left to the next digest exchange")

    async def _publish_loop(self) -> None:
        async for data in self._outgoing:
            await self._network.publish(self._topic, data)

    async def _timer_loop(self) -> None:
        while True:
            self._rearm = trio.Event()
            deadline = self._membership.deadline()
            with trio.move_on_after(float("inf") if deadline is None else max(0.0, deadline - self._now())):
                await self._rearm.wait()
                continue
            self._handle(io.Wake())

    async def _event_loop(self, events: trio.MemoryReceiveChannel[net.NetworkEvent]) -> None:
        async for event in events:
            match event:
                case net.PeerConnected(peer, _, inbound):
                    if inbound:
                        self._tasks.start_soon(self._admission.expect_hello, peer)
                case net.PeerDisconnected(peer):
                    self._admission.disconnected(peer)
                case net.PathChanged():
                    self._tell_watchers()
                case net.Message(topic, _, data) if topic == self._topic:
                    self._hear(data)

    def _hear(self, data: bytes) -> None:
        try:
            record = wire.decode_record(data)
        except WireError as exc:
            log.debug("ignored a malformed announcement: %s", exc)
            return
        self._handle(io.RecordHeard(record, gossiped=True))

    # ── services ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _answer_open(self, stream: Stream) -> None:
        credential = self._admission.credential_of(stream.peer)
        if credential is None:
            stream.reset()
            return

        def choose(service: str) -> tunnel.RawHandler:
            offer = self._offers.get(service)
            if offer is None:
                raise ServiceRefused(f"there is no service {service!r} here", reason="unknown_service")
            if credential.scope < offer.service.scope:
                raise ServiceRefused(f"{service!r} needs a wider scope", reason="scope")
            return offer.handler

        await tunnel.answer(stream, choose)

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take part for as long as the context lasts. `open_mesh` does this."""
        self._network.set_handler(hello.PROTOCOL, self._admission.answer_hello, admitted_only=False)
        self._network.set_handler(tunnel.PROTOCOL, self._answer_open)
        async with self._network.events() as events, trio.open_nursery() as nursery:
            self._tasks = nursery
            await self._network.subscribe(self._topic)
            for loop in (self._publish_loop, self._timer_loop, self._admission.seek_loop):
                nursery.start_soon(loop)
            nursery.start_soon(self._event_loop, events)
            try:
                yield
                if self._admission.anybody:
                    self._handle(io.Leave())
                    await trio.sleep(self._config.farewell)
            finally:
                nursery.cancel_scope.cancel()


def _log_change(peer: PeerId, state: PeerState | None, reason: str) -> None:
    log.info("peer %s is %s: %s", peer, "forgotten" if state is None else state.value, reason)


@asynccontextmanager
async def open_mesh(
    key: SecretKey,
    *,
    mesh_key: SecretKey | None = None,
    invite: str | None = None,
    network: Network | None = None,
    listen: Libp2pConfig | None = None,
    config: MeshConfig | None = None,
    wait: bool = True,
    wall_clock: Callable[[], float] = time.time,
) -> AsyncIterator[Mesh]:
    """Be a member of a mesh for as long as the context lasts.

    Args:
        key: this node's identity; makes its peer id.
        mesh_key: the mesh's own key, for whoever founds it or holds it. Exactly one of this and `invite`.
        invite: a token. It also says where the mesh can be reached.
        network: the transport to use. By default a libp2p network made from `key` and `listen`, and closed at the end.
        listen: where that one listens; all interfaces and a free port by default.
        config: times and limits.
        wait: with an invite, return only when a contact has admitted us. Without, keep trying in the background.
        wall_clock: seconds since the epoch; read once.

    Raises:
        InviteError: the token cannot be used.
        AddressUnavailable: the port is taken.
        AdmissionRefused, PeerUnreachable: with `wait`, no contact let us in.

    Leaving says goodbye, then ends all streams and connections. There is a trio nursery inside, so an error of the body
    comes out in an exception group; the errors above do not.
    """
    if (mesh_key is None) == (invite is None):
        raise ValueError("exactly one of mesh_key and invite is needed")
    opened = check_invite(invite, now_unix=wall_clock()) if invite is not None else None
    authority = opened.authority if opened is not None else Authority.of_mesh(_seed_of(mesh_key))
    config = config or MeshConfig()

    async def stay(leave: trio.Event, *, task_status: trio.TaskStatus[Mesh]) -> None:
        # Shielded, so that a goodbye can still be said when the caller is cancelled; bounded by `farewell` and by the
        # network's own closing.
        with trio.CancelScope(shield=True):
            async with AsyncExitStack() as stack:
                transport = network
                if transport is None:
                    transport = await stack.enter_async_context(open_libp2p_network(key.seed, listen))
                mesh = Mesh(transport, key, authority, config, wall_clock)
                await stack.enter_async_context(mesh.running())
                task_status.started(mesh)
                await leave.wait()

    kept_out: MeshError | None = None
    leave = trio.Event()
    async with trio.open_nursery() as nursery:
        try:
            mesh = await nursery.start(stay, leave)
            if opened is not None:
                await mesh.enter(opened, wait=wait)
        except MeshError as exc:
            kept_out = exc
        except BaseException:
            leave.set()
            raise
        else:
            try:
                yield mesh
            finally:
                leave.set()
        leave.set()
    if kept_out is not None:
        raise kept_out


def _seed_of(key: SecretKey | None) -> bytes:
    assert key is not None
    return key.seed

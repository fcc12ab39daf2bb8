"""The adapter: `Network` on py-libp2p 0.8.1.

What is used of py-libp2p: the swarm's book-keeping and its upgrade of connections (with our Noise and our yamux in
its plug points), identify, ping and gossipsub. What is ours, and why, is told in `tcp.py`, `muxer.py`, `noise.py`,
`negotiate.py` and `gossip.py`.

Foreign exceptions end here: everything that leaves is one of `libmesh.errors` or a `trio` stream error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

import trio
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from libmesh.core.ways import relay_of
from libmesh.core.yamux_frames import Options
from libmesh.errors import NetworkError, PeerUnreachable
from libmesh.net import tcp, websocket
from libmesh.net.base import (
    AddressesChanged,
    Approach,
    Message,
    Network,
    NetworkEvent,
    PeerDisconnected,
    Stream,
    StreamHandler,
)
from libmesh.net.connections import Connections
from libmesh.net.gossip import PROTOCOLS as GOSSIP_PROTOCOLS
from libmesh.net.gossip import Gossip
from libmesh.net.libp2p_config import Libp2pConfig as Libp2pConfig
from libmesh.net.negotiate import open_lazy_stream
from libmesh.net.punch import Puncher
from libmesh.net.reach import Reach
from libmesh.net.relaying import Relaying
from libmesh.net.serving import StreamServer
from libmesh.net.swarm import ConnectionNotifee, libp2p_id, new_mesh_swarm
from libmesh.net.watch import watch_network
from libmesh.peers import Path, PathKind, PeerId, Reaching

log = logging.getLogger(__name__)

_INTERFACES_HOLD = 5.0  # seconds


class Libp2pNetwork(Network):
    """See `Network`. Obtained from `open_libp2p_network`."""

    def __init__(self, seed: bytes, config: Libp2pConfig) -> None:
        self._config = config
        self._server = StreamServer(
            lambda: self._host.multiselect.handlers,
            GOSSIP_PROTOCOLS,
            lambda peer: self._connections.entry(peer),
            admission_limit=config.admission_limit,
            max_waiting=config.max_waiting,
        )
        self.relaying = Relaying(
            self, seed, config.relay, open_to_all=config.relay_open, changed=self.addresses_changed
        )
        self.reach = Reach(
            self,
            announced=config.announce,
            map_port=config.map_port,
            open_to_all=config.relay_open,
            trusted=self._is_relay,
            private_only=config.private_only,
        )
        self.watchers: list[Callable[[], None]] = []  # told when the network may be another one
        self.puncher = Puncher(self, guesses=self.reach.guesses, private_only=config.private_only)
        self._port, self._websocket_port = 0, config.websocket_port  # known once we listen
        self._interfaces: list[str] = []
        self._interfaces_stale = float("-inf")
        self._swarm = new_mesh_swarm(
            seed,
            max_connections=config.max_connections,
            handshake_limit=config.handshake_limit,
            options=Options(ping_interval=config.ping_interval, ping_timeout=config.ping_timeout),
            serve=self._server.take,
        )
        self._host = BasicHost(
            self._swarm,
            addrs_factory=lambda _: [Multiaddr(address) for address in self.addresses()],
            disable_identify_address_discovery=True,
        )
        for protocol in self._server.handlers:  # libp2p's own, so far: identify tells of them
            self._host.multiselect.add_handler(TProtocol(protocol), None)
        self._swarm.set_stream_handler(self._server.serve_handed_over)
        self._gossip = Gossip(self._host, self._deliver)
        self._me = PeerId(str(self._host.get_id()))
        self._connections = Connections(
            self._swarm, self._gossip, self._me, self._emit, max_handshakes=config.max_handshakes
        )
        self._swarm.register_notifee(
            ConnectionNotifee(self._connections.connected, self._connections.disconnected)
        )
        self._swarm._select_connection = self._connections.select
        self._dialling: dict[PeerId, trio.Lock] = {}
        self._events, self._event_reader = trio.open_memory_channel[NetworkEvent](float("inf"))
        self._tasks: trio.Nursery | None = None

    # ── what we are ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def peer(self) -> PeerId:
        """This node's own id."""
        return self._me

    @property
    def port(self) -> int:
        """The TCP port that is listened on."""
        return self._port

    def addresses(self) -> tuple[str, ...]:
        """See `Network.addresses`: announced ones first, then global, private and loopback ones."""
        own, circuits = self.own_addresses(), self.relaying.circuits()
        own += websocket.beside(own, self._websocket_port)
        return tuple(dict.fromkeys((*self._config.announce, *self.reach.addresses(), *own, *circuits)))

    def own_addresses(self) -> tuple[str, ...]:
        """Those of our interfaces: global, private and loopback ones."""
        interfaces = self._interface_hosts()
        hosts: list[str] = []
        for host in self._config.hosts:
            if host in ("0.0.0.0", "::"):
                hosts += [h for h in interfaces if (":" in h) == (":" in host)]
            else:
                hosts.append(host)
        order = {host: rank for rank, host in enumerate(interfaces)}
        hosts.sort(key=lambda host: order.get(host, -1))
        return tuple(tcp.multiaddr_of(host, self._port) for host in hosts)

    def _interface_hosts(self) -> list[str]:
        """Asking the system takes milliseconds, and this is asked often. If it cannot tell now, what it told last."""
        now = time.monotonic()
        if now >= self._interfaces_stale:
            self._interfaces_stale = now + _INTERFACES_HOLD
            try:
                self._interfaces = tcp.interface_hosts()
            except OSError as exc:  # out of file descriptors, say
                log.debug("cannot look at the interfaces now: %s", exc.strerror)
        return self._interfaces

    def events(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[NetworkEvent]]:
        """See `Network.events`."""
        return self._event_reader

    def _emit(self, event: NetworkEvent) -> None:
        if isinstance(event, PeerDisconnected):
            self.relaying.disconnected(event.peer)
        self.reach.heard(event)
        full = self._events.statistics().current_buffer_used >= self._config.max_events
        if full and isinstance(event, Message):
            return
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # the mesh is closing
            self._events.send_nowait(event)

    def _deliver(self, topic: str, origin: ID, data: bytes) -> None:
        self._emit(Message(topic, PeerId(str(origin)), data))

    # ── connections ──────────────────────────────────────────────────────────────────────────────────────────────

    def path(self, peer: PeerId) -> Path | None:
        """See `Network.path`."""
        return self._connections.path(peer)

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> Path:
        """See `Network.connect`."""
        if libp2p_id(peer) is None:
            raise PeerUnreachable(f"{peer!r} is no peer id")

        lock = self._dialling.setdefault(peer, trio.Lock())
        try:
            async with lock:
                if (path := self.path(peer)) is not None and self._connections.answers(peer):
                    return path
                _, failures = await tcp.first_success(addresses, partial(self.dial, peer))
                if (path := self.path(peer)) is not None:
                    return path
        finally:
            waiting = lock.statistics()
            if not waiting.locked and not waiting.tasks_waiting:
                self._dialling.pop(peer, None)
        tried = "; ".join(f"{address}: {why}" for address, why in failures.items()) or "no address is known"
        raise PeerUnreachable(f"cannot reach the peer {peer} ({tried})", failures)

    async def dial(self, peer: PeerId, address: str) -> Path:
        """See `Network.dial`."""
        if "/p2p-circuit" in address:
            return await self.relaying.dial(peer, address)
        try:
            with trio.fail_after(tcp.DIAL_LIMIT):
                opener = partial(websocket.dial, address)
                return await self.make(opener, peer=peer, address=address, kind=PathKind.DIRECT)
        except trio.TooSlowError as exc:
            raise NetworkError(f"no answer within {tcp.DIAL_LIMIT:.0f} s") from exc
        except (OSError, ValueError) as exc:
            raise NetworkError(tcp.reason(exc)) from exc

    async def make(
        self,
        bytes_to: Callable[[], Awaitable[trio.SocketStream | Stream]],
        *,
        peer: PeerId,
        address: str,
        kind: PathKind,
    ) -> Path:
        """See `Underlay.make`."""
        if self._tasks is None:
            raise NetworkError("this network is closed")
        return await self._connections.make(bytes_to, peer=peer, address=address, kind=kind)

    async def adopt(
        self,
        stream: trio.SocketStream | Stream,
        *,
        peer: PeerId | None,
        initiator: bool,
        address: str,
        kind: PathKind,
    ) -> Path:
        """See `Underlay.adopt`."""
        return await self._connections.adopt(
            stream, peer=peer, initiator=initiator, address=address, kind=kind
        )

    async def punch(self, peer: PeerId) -> Path:
        """See `Network.punch`."""
        return await self.puncher.punch(peer)

    def set_relays(self, relays: Sequence[str], approach: Approach | None = None) -> None:
        """See `Network.set_relays`."""
        self.relaying.client.set_relays(relays, approach)

    async def register(self, point: PeerId, namespace: str, addresses: tuple[str, ...]) -> float:
        """See `Network.register`."""
        return await self.relaying.rendezvous.register(point, namespace, addresses)

    async def discover(self, point: PeerId, namespace: str) -> dict[PeerId, tuple[str, ...]]:
        """See `Network.discover`."""
        return await self.relaying.rendezvous.discover(point, namespace)

    def relay_load(self) -> tuple[int, int, int]:
        """Of this node as a relay: peers that have a place here, circuits, and bytes carried by those that ended."""
        server = self.relaying.server
        return (
            (0, 0, 0) if server is None else (server.reservations, len(server.circuits), server.carried_bytes)
        )

    def reaching(self) -> Reaching:
        """See `Network.reaching`."""
        return replace(self.reach.picture(), relays=self.relaying.client.views())

    def local_port(self, peer: PeerId) -> int | None:
        """See `Ground.local_port`."""
        return self._connections.local_port(peer)

    def _is_relay(self, peer: PeerId) -> bool:
        relays = (relay_of(circuit) for circuit in self.relaying.circuits())
        return any(relay is not None and relay[0] == peer for relay in relays)

    def _moved(self) -> None:
        """The network of this machine is another one, or may be."""
        self._interfaces_stale = float("-inf")
        self._connections.vigil.ask_all()
        self.reach.moved()
        for watcher in list(self.watchers):
            watcher()
        self.addresses_changed()

    def addresses_changed(self) -> None:
        """Whoever adds to `addresses` says so."""
        self._emit(AddressesChanged())

    def idle(self, peer: PeerId) -> bool:
        """See `Network.idle`."""
        return self._connections.idle(peer)

    async def disconnect(self, peer: PeerId) -> None:
        """See `Network.disconnect`."""
        # Shielded: a half-closed SwarmConn would stay in the swarm's books. It takes 0.1 s by py-libp2p's own sleep.
        with trio.CancelScope(shield=True), trio.move_on_after(2):
            for connection in self._connections.of(peer):
                await connection.close()

    def _take(self, stream: trio.SocketStream, ws: bool = False) -> None:
        if self._tasks is None:
            stream.socket.close()
        elif ws or not self.puncher.take(stream):
            self._tasks.start_soon(self._accept, stream, ws)

    async def _accept(self, stream: trio.SocketStream, ws: bool) -> None:
        try:
            tcp.set_options(stream)
            address = tcp.remote_address(stream) + "/ws" * ws
            inner = websocket.WebSocket(stream) if ws else stream
            await self.adopt(inner, peer=None, initiator=False, address=address, kind=PathKind.DIRECT)
        except (NetworkError, OSError) as exc:  # whatever a stranger sends must not end the listener
            log.debug("inbound connection failed: %r", exc)
            stream.socket.close()

    def admit(self, peer: PeerId) -> None:
        """See `Network.admit`."""
        self._connections.admit(peer)

    def admitted(self, peer: PeerId) -> bool:
        """See `Underlay.admitted`."""
        return self._connections.admitted(peer)

    # ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def open_stream(self, peer: PeerId, protocol: str, *, kind: PathKind | None = None) -> Stream:
        """See `Network.open_stream` and `Underlay.open_stream`."""
        connections = self._connections.of(peer, kind)
        if not connections:
            raise PeerUnreachable(f"there is no connection to the peer {peer}")
        return await open_lazy_stream(connections[0].muxed_conn, peer, protocol)

    def set_handler(self, protocol: str, handler: StreamHandler, *, admitted_only: bool = True) -> None:
        """See `Network.set_handler`."""
        self._server.handlers[protocol] = (handler, admitted_only)

    # ── topics ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def subscribe(self, topic: str) -> None:
        """See `Network.subscribe`."""
        await self._gossip.subscribe(topic)

    async def publish(self, topic: str, data: bytes) -> None:
        """See `Network.publish`."""
        await self._gossip.publish(topic, data)

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listen and serve for as long as the context lasts; then close everything."""
        listeners = tcp.open_listeners(self._config.hosts, self._config.port)
        self._port = listeners[0].socket.getsockname()[1]
        try:
            websockets = websocket.open_listeners(self._config.hosts, self._config.websocket_port)
            listeners += websockets
            self._websocket_port = websocket.port_of(websockets)
            async with self._host.run([]), self._gossip.running(), trio.open_nursery() as nursery:
                self._tasks = self._connections.tasks = self._server.tasks = nursery
                for task in (self.relaying.run, self.reach.run, self._connections.vigil.run):
                    nursery.start_soon(task)
                nursery.start_soon(watch_network, self._moved)
                for listener in listeners:
                    nursery.start_soon(
                        tcp.accept_all, listener, partial(self._take, ws=listener in websockets)
                    )
                try:
                    yield
                finally:
                    self._tasks = self._connections.tasks = self._server.tasks = None
                    nursery.cancel_scope.cancel()
                    with trio.CancelScope(shield=True), trio.move_on_after(2):
                        await self._host.close()
        finally:
            for listener in listeners:
                listener.socket.close()
            self._events.close()


@asynccontextmanager
async def open_libp2p_network(
    seed: bytes, config: Libp2pConfig | None = None
) -> AsyncIterator[Libp2pNetwork]:
    """A running `Libp2pNetwork` whose peer id belongs to the Ed25519 `seed` (32 bytes).

    Raises `AddressUnavailable` if the port is taken, and `ValueError` for a time in `config` that cannot work.
    """
    network = Libp2pNetwork(seed, config or Libp2pConfig())
    async with network.running():
        yield network

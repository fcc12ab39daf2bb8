"""`MemoryHub`: networks in one process, without sockets, for tests of whatever is built on `Network`.

    hub = MemoryHub()
    async with hub.open_network(seed_a) as a, hub.open_network(seed_b) as b:
        await a.connect(b.peer, b.addresses())

It keeps the whole contract of `Network` and works under trio's `MockClock`. `hub.cut(a, b)` breaks connections and
`hub.partition({a}, {b})` forbids new ones, as a pulled cable would. `hub.hide(a)` puts a peer behind a router: nobody
can dial it, but it can be reached through relays (`Network.set_relays`; every peer in the hub is one) and by a punch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import trio

from libmesh import keys
from libmesh.core.ways import is_circuit, relay_of
from libmesh.errors import NetworkError, PeerUnreachable
from libmesh.net.base import (
    AddressesChanged,
    Approach,
    Message,
    Network,
    NetworkEvent,
    PathChanged,
    PeerConnected,
    PeerDisconnected,
    Stream,
    StreamHandler,
)
from libmesh.peers import Path, PathKind, PeerId
from libmesh.testing.memory_streams import MemoryStream, Pipe

ADMISSION_LIMIT = 5.0
"""Seconds that a stream of a peer which is not yet admitted is held."""


RETIRE_AFTER = 2.0
"""Seconds for which a connection that is not the best must have been idle to be closed."""


@dataclass(eq=False, slots=True)
class _Link:
    """One connection, as one of its ends sees it."""

    path: Path
    streams: list[MemoryStream] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        return all(stream.over for stream in self.streams)


class MemoryNetwork(Network):
    """See `Network`. Obtained from `MemoryHub.open_network`."""

    def __init__(self, hub: MemoryHub, peer: PeerId, tasks: trio.Nursery) -> None:
        self._hub, self._me, self.tasks = hub, peer, tasks
        self._send, self._receive = trio.open_memory_channel[NetworkEvent](float("inf"))
        self.handlers: dict[str, tuple[StreamHandler, bool]] = {}
        self.links: dict[PeerId, list[_Link]] = {}
        self.relays: tuple[PeerId, ...] = ()
        self.admitted: dict[PeerId, trio.Event] = {}
        self.topics: set[str] = set()
        self.closed = False

    @property
    def peer(self) -> PeerId:
        """This node's own id."""
        return self._me

    def addresses(self) -> tuple[str, ...]:
        """An address that is good in this hub only, and the circuits through the relays that hold us."""
        held = [relay for relay in self.relays if relay in self.links]
        return (_address(self._me), *(f"{_address(relay)}/p2p/{relay}/p2p-circuit" for relay in held))

    def events(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[NetworkEvent]]:
        """See `Network.events`."""
        return self._receive

    def emit(self, event: NetworkEvent) -> None:
        """Queue an event for this network's reader."""
        try:
            self._send.send_nowait(event)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.closed = True

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> Path:
        """See `Network.connect`."""
        await trio.lowlevel.checkpoint()
        failures: dict[str, str] = {}
        for address in addresses:
            if (path := self.path(peer)) is not None:
                return path
            try:
                return await self.dial(peer, address)
            except NetworkError as exc:
                failures[address] = str(exc)
        if (path := self.path(peer)) is not None:
            return path
        raise PeerUnreachable(f"cannot reach the peer {peer}", failures)

    async def dial(self, peer: PeerId, address: str) -> Path:
        """See `Network.dial`."""
        await trio.lowlevel.checkpoint()
        return self._hub.dial(self, peer, address)

    async def punch(self, peer: PeerId) -> Path:
        """See `Network.punch`."""
        await trio.lowlevel.checkpoint()
        return self._hub.punch(self, peer)

    def set_relays(self, relays: Sequence[str], approach: Approach | None = None) -> None:
        """See `Network.set_relays`. Held as long as there is a connection to the relay, which others must make."""
        before = self.addresses()
        self.relays = tuple(PeerId(relay.rpartition("/p2p/")[2]) for relay in relays)
        if self.addresses() != before:
            self.emit(AddressesChanged())

    async def disconnect(self, peer: PeerId) -> None:
        """See `Network.disconnect`."""
        await trio.lowlevel.checkpoint()
        self._hub.cut(self._me, peer)

    def idle(self, peer: PeerId) -> bool:
        """See `Network.idle`."""
        return all(link.idle for link in self.links.get(peer, ()))

    def path(self, peer: PeerId) -> Path | None:
        """See `Network.path`."""
        links = self.links.get(peer)
        return self.best(peer).path if links else None

    def best(self, peer: PeerId) -> _Link:
        """The link by which new streams go."""
        return min(self.links[peer], key=lambda link: link.path.kind is PathKind.RELAYED)

    async def retire(self, peer: PeerId) -> None:
        """Close the links to `peer` that are not the best, once idle."""
        while len(self.links.get(peer, ())) > 1:
            await trio.sleep(RETIRE_AFTER)
            if len(self.links.get(peer, ())) > 1:
                best = self.best(peer)
                for link in [link for link in self.links[peer] if link is not best and link.idle]:
                    self._hub.cut(self._me, peer, link.path.kind)

    def admit(self, peer: PeerId) -> None:
        """See `Network.admit`."""
        if peer in self.admitted:
            self.admitted[peer].set()

    def takes_part(self, peer: PeerId) -> bool:
        """Whether `peer` is connected and admitted."""
        return peer in self.admitted and self.admitted[peer].is_set()

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """See `Network.open_stream`."""
        await trio.lowlevel.checkpoint()
        if peer not in self.links:
            raise PeerUnreachable(f"there is no connection to the peer {peer}")
        return self._hub.open_stream(self, peer, protocol)

    def set_handler(self, protocol: str, handler: StreamHandler, *, admitted_only: bool = True) -> None:
        """See `Network.set_handler`."""
        self.handlers[protocol] = (handler, admitted_only)

    async def subscribe(self, topic: str) -> None:
        """See `Network.subscribe`."""
        await trio.lowlevel.checkpoint()
        self.topics.add(topic)

    async def publish(self, topic: str, data: bytes) -> None:
        """See `Network.publish`: reaches whoever is connected by admitted links, directly or through others."""
        await trio.lowlevel.checkpoint()
        self._hub.publish(self._me, topic, data)

    async def serve(self, stream: MemoryStream) -> None:
        """Run the handler of an inbound stream."""
        handler, admitted_only = self.handlers[stream.protocol]
        if admitted_only and not await self._may_proceed(stream.peer):
            stream.reset()
            return
        try:
            await handler(stream)
        except Exception:  # noqa: BLE001 - as in the real adapter, a handler's failure ends only its stream
            stream.reset()
        finally:
            await stream.aclose()

    async def _may_proceed(self, peer: PeerId) -> bool:
        """Hold a stream of a stranger for a while: its hello may be under way."""
        if (admitted := self.admitted.get(peer)) is None:
            return False
        with trio.move_on_after(ADMISSION_LIMIT):
            await admitted.wait()
        return admitted.is_set()


def _address(peer: PeerId) -> str:
    return f"/dns/{peer}.memory/tcp/1"


class MemoryHub:
    """A place where `MemoryNetwork`s find each other."""

    def __init__(self) -> None:
        self._networks: dict[PeerId, MemoryNetwork] = {}
        self._parts: tuple[frozenset[PeerId], ...] = ()
        self._hidden: dict[PeerId, bool] = {}

    @asynccontextmanager
    async def open_network(self, seed: bytes) -> AsyncIterator[MemoryNetwork]:
        """A network for the peer of the Ed25519 `seed`; leaving closes its connections."""
        async with trio.open_nursery() as nursery:
            network = MemoryNetwork(self, keys.peer_id_of(keys.public_key(seed)), nursery)
            self._networks[network.peer] = network
            try:
                yield network
            finally:
                network.closed = True
                for peer in list(network.links):
                    self.cut(network.peer, peer)
                if self._networks.get(network.peer) is network:
                    del self._networks[network.peer]
                network._send.close()
                nursery.cancel_scope.cancel()

    def partition(self, *parts: set[PeerId]) -> None:
        """Let only peers of one part connect to each other, and cut what connects two; no parts: heal."""
        self._parts = tuple(frozenset(part) for part in parts)
        for network in list(self._networks.values()):
            for peer in list(network.links):
                if not self._together(network.peer, peer):
                    self.cut(network.peer, peer)

    def hide(self, peer: PeerId, *, punchable: bool = True) -> None:
        """Put `peer` behind a router from now on. Its connections live on; between two, both must be punchable."""
        self._hidden[peer] = punchable

    def show(self, peer: PeerId) -> None:
        """Take `peer` out from behind its router."""
        self._hidden.pop(peer, None)

    def _together(self, a: PeerId, b: PeerId) -> bool:
        return not self._parts or any(a in part and b in part for part in self._parts)

    def dial(self, network: MemoryNetwork, peer: PeerId, address: str) -> Path:
        """Connect two networks by an address, or raise `NetworkError`."""
        me = network.peer
        if peer not in self._networks or not self._together(me, peer):
            raise NetworkError("nobody there")
        if not is_circuit(address):
            if address != _address(peer) or peer in self._hidden:
                raise NetworkError("no answer")
            return self._link(network, peer, PathKind.DIRECT, address, address)
        through = relay_of(address)
        relay = None if through is None else self._networks.get(through[0])
        if relay is None or not self._together(me, relay.peer):
            raise NetworkError("there is no such relay")
        if relay.peer not in self._networks[peer].relays or peer not in relay.links:
            raise NetworkError("the relay does not know the peer")
        if relay.peer not in network.links:
            self.dial(network, relay.peer, _address(relay.peer))
        return self._link(network, peer, PathKind.RELAYED, address, address)

    def punch(self, network: MemoryNetwork, peer: PeerId) -> Path:
        """Connect two networks that have a relayed connection directly, or raise `NetworkError`."""
        path = network.path(peer)
        if path is None:
            raise NetworkError("there is no connection to punch over")
        if path.kind is not PathKind.RELAYED:
            return path
        if not all(self._hidden.get(one, True) for one in (network.peer, peer)):
            raise NetworkError("the routers do not let it through")
        return self._link(network, peer, PathKind.PUNCHED, _address(peer), _address(network.peer))

    def _link(self, network: MemoryNetwork, peer: PeerId, kind: PathKind, there: str, back: str) -> Path:
        other = self._networks[peer]
        made = Path(kind=kind, address=there, rtt=0.0)
        ends = (network, other, made, False), (other, network, Path(kind=kind, address=back, rtt=0.0), True)
        for near, far, path, inbound in ends:
            links = near.links.setdefault(far.peer, [])
            before = near.best(far.peer) if links else None
            links.append(_Link(path))
            if before is None:
                near.admitted[far.peer] = trio.Event()
                near.emit(PeerConnected(far.peer, path, inbound))
            else:
                if near.best(far.peer) is not before:
                    near.emit(PathChanged(far.peer, near.best(far.peer).path))
                if not near.closed:
                    near.tasks.start_soon(near.retire, far.peer)
        return made

    def cut(self, a: PeerId, b: PeerId, kind: PathKind | None = None) -> None:
        """Break the connections (of one kind) between two peers; their streams are reset."""
        for near, far in ((a, b), (b, a)):
            network = self._networks.get(near)
            if network is None or far not in network.links:
                continue
            before = network.best(far)
            ended = [link for link in network.links[far] if kind is None or link.path.kind is kind]
            kept = [link for link in network.links[far] if link not in ended]
            for stream in [stream for link in ended for stream in link.streams]:
                stream.lose()
            if kept:
                network.links[far] = kept
                if network.best(far) is not before:
                    network.emit(PathChanged(far, network.best(far).path))
                continue
            del network.links[far]
            network.admitted.pop(far, None)
            network.emit(PeerDisconnected(far))
            self._cut_circuits(network, far)

    def _cut_circuits(self, network: MemoryNetwork, relay: PeerId) -> None:
        """What went through a relay is over when the connection to it is."""
        through = [
            peer
            for peer, links in network.links.items()
            for link in links
            if (by := relay_of(link.path.address)) is not None and by[0] == relay
        ]
        for peer in through:
            self.cut(network.peer, peer, PathKind.RELAYED)

    def open_stream(self, network: MemoryNetwork, peer: PeerId, protocol: str) -> MemoryStream:
        """Open a stream between two connected networks, by the best link."""
        other = self._networks[peer]
        there, back = Pipe(), Pipe()
        near = MemoryStream(peer, protocol, there, back)
        if protocol not in other.handlers:
            near.refusal = "unknown_protocol"
            return near
        far = MemoryStream(network.peer, protocol, back, there)
        for end, stream in ((network.best(peer), near), (other.best(network.peer), far)):
            end.streams[:] = [one for one in end.streams if not one.over]
            end.streams.append(stream)
        other.tasks.start_soon(other.serve, far)
        return near

    def publish(self, origin: PeerId, topic: str, data: bytes) -> None:
        """Flood a message over admitted links."""
        reached, frontier = {origin}, [origin]
        while frontier:
            network = self._networks[frontier.pop()]
            for peer in network.links:
                other = self._networks.get(peer)
                if other is None or peer in reached or topic not in other.topics:
                    continue
                if network.takes_part(peer) and other.takes_part(network.peer):
                    reached.add(peer)
                    frontier.append(peer)
                    other.emit(Message(topic, origin, data))

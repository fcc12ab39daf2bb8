"""`MemoryHub`: networks in one process, without sockets, for tests of whatever is built on `Network`.

    hub = MemoryHub()
    async with hub.open_network(seed_a) as a, hub.open_network(seed_b) as b:
        await a.connect(b.peer, b.addresses())

It keeps the whole contract of `Network` and works under trio's `MockClock`. `hub.cut(a, b)` breaks connections and
`hub.partition({a}, {b})` forbids new ones, as a pulled cable would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from libmesh import keys
from libmesh.errors import PeerUnreachable, ServiceRefused
from libmesh.net.base import (
    Message,
    Network,
    NetworkEvent,
    PeerConnected,
    PeerDisconnected,
    Stream,
    StreamHandler,
    StreamReset,
)
from libmesh.peers import Path, PathKind, PeerId

WINDOW = 64 * 1024
"""Bytes that a writer may be ahead of its reader."""

ADMISSION_LIMIT = 5.0
"""Seconds that a stream of a peer which is not yet admitted is held."""


class _Pipe:
    """One direction of a stream: a bounded buffer with an end of file and a reset."""

    def __init__(self) -> None:
        self.chunks: deque[bytes] = deque()
        self.size = 0
        self.ended = False
        self.broken = False
        self.unwanted = False  # the reader closed: bytes are dropped, as the writer learns by an error
        self.changed = trio.Event()

    def notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class MemoryStream(Stream):
    """One end of a stream of a `MemoryHub`."""

    def __init__(self, peer: PeerId, protocol: str, outgoing: _Pipe, incoming: _Pipe) -> None:
        self.peer, self.protocol = peer, protocol
        self._outgoing, self._incoming = outgoing, incoming
        self._sending, self._receiving, self._closed = False, False, False
        self.refusal: str | None = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream.send_all`."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            rest = bytes(data)
            while rest:
                await self._wait_for_room()
                room = WINDOW - self._outgoing.size
                self._outgoing.chunks.append(rest[:room])
                self._outgoing.size += len(rest[:room])
                self._outgoing.notify()
                rest = rest[room:]
        finally:
            self._sending = False

    def _check_sendable(self) -> None:
        if self._closed or self._outgoing.ended:
            raise trio.ClosedResourceError("this side of the stream was closed")
        if self._outgoing.broken:
            raise StreamReset("the stream was reset")
        if self._outgoing.unwanted:
            raise trio.BrokenResourceError("the peer closed the stream")

    async def _wait_for_room(self) -> None:
        while True:
            self._check_sendable()
            if self._outgoing.size < WINDOW:
                return
            await self._outgoing.changed.wait()

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError("the stream is closed")
            while self._outgoing.size >= WINDOW and not (self._outgoing.broken or self._outgoing.unwanted):
                await self._outgoing.changed.wait()
                if self._closed:
                    raise trio.ClosedResourceError("the stream is closed")
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream.send_eof`."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError("the stream is closed")
        self._outgoing.ended = True
        self._outgoing.notify()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream.receive_some`; raises `ServiceRefused` if the peer has no such protocol."""
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        if max_bytes is not None:
            if not isinstance(max_bytes, int):
                raise TypeError(f"max_bytes must be an int, not {type(max_bytes).__name__}")
            if max_bytes < 1:
                raise ValueError("max_bytes must be at least 1")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            pipe = self._incoming
            while True:
                if self._closed:
                    raise trio.ClosedResourceError("the stream is closed")
                if self.refusal is not None:
                    raise ServiceRefused(f"the peer does not know {self.protocol}", reason=self.refusal)
                if pipe.chunks:
                    return self._take(max_bytes)
                if pipe.broken:
                    raise StreamReset("the stream was reset")
                if pipe.ended:
                    return b""
                await pipe.changed.wait()
        finally:
            self._receiving = False

    def _take(self, max_bytes: int | None) -> bytes:
        pipe = self._incoming
        chunk = pipe.chunks.popleft()
        if max_bytes is not None and len(chunk) > max_bytes:
            pipe.chunks.appendleft(chunk[max_bytes:])
            chunk = chunk[:max_bytes]
        pipe.size -= len(chunk)
        pipe.notify()
        return chunk

    def reset(self) -> None:
        """See `Stream.reset`."""
        self._closed = True
        self.lose()

    def lose(self) -> None:
        """What the death of the connection does."""
        for pipe in (self._outgoing, self._incoming):
            pipe.broken = True
            pipe.notify()

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource.aclose`."""
        if not self._closed:
            self._closed = True
            self._outgoing.ended = True
            self._incoming.unwanted = True
            self._incoming.chunks.clear()
            self._incoming.size = 0
            self._outgoing.notify()
            self._incoming.notify()
        await trio.lowlevel.checkpoint()


class MemoryNetwork(Network):
    """See `Network`. Obtained from `MemoryHub.open_network`."""

    def __init__(self, hub: MemoryHub, peer: PeerId, tasks: trio.Nursery) -> None:
        self._hub, self._me, self.tasks = hub, peer, tasks
        self._send, self._receive = trio.open_memory_channel[NetworkEvent](float("inf"))
        self.handlers: dict[str, tuple[StreamHandler, bool]] = {}
        self.links: dict[PeerId, list[MemoryStream]] = {}
        self.admitted: dict[PeerId, trio.Event] = {}
        self.topics: set[str] = set()
        self.closed = False

    @property
    def peer(self) -> PeerId:
        """This node's own id."""
        return self._me

    def addresses(self) -> tuple[str, ...]:
        """An address that is good in this hub only."""
        return (f"/dns/{self._me}.memory/tcp/1",)

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
        if peer not in self.links:
            self._hub.link(self, peer, addresses)
        return Path(kind=PathKind.DIRECT, address=f"/dns/{peer}.memory/tcp/1", rtt=0.0)

    async def disconnect(self, peer: PeerId) -> None:
        """See `Network.disconnect`."""
        await trio.lowlevel.checkpoint()
        self._hub.cut(self._me, peer)

    def path(self, peer: PeerId) -> Path | None:
        """See `Network.path`."""
        address = f"/dns/{peer}.memory/tcp/1"
        return Path(kind=PathKind.DIRECT, address=address, rtt=0.0) if peer in self.links else None

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


class MemoryHub:
    """A place where `MemoryNetwork`s find each other."""

    def __init__(self) -> None:
        self._networks: dict[PeerId, MemoryNetwork] = {}
        self._parts: tuple[frozenset[PeerId], ...] = ()

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

    def _together(self, a: PeerId, b: PeerId) -> bool:
        return not self._parts or any(a in part and b in part for part in self._parts)

    def link(self, network: MemoryNetwork, peer: PeerId, addresses: Sequence[str]) -> None:
        """Connect two networks, or raise `PeerUnreachable`."""
        other = self._networks.get(peer)
        if other is None or not addresses or not self._together(network.peer, peer):
            raise PeerUnreachable(f"cannot reach the peer {peer}", dict.fromkeys(addresses, "nobody there"))
        for near, far, inbound in ((network, other, False), (other, network, True)):
            near.links[far.peer] = []
            near.admitted[far.peer] = trio.Event()
            path = near.path(far.peer)
            if path is not None:
                near.emit(PeerConnected(far.peer, path, inbound))

    def cut(self, a: PeerId, b: PeerId) -> None:
        """Break the connection between two peers; their streams are reset."""
        for near, far in ((a, b), (b, a)):
            network = self._networks.get(near)
            if network is None or far not in network.links:
                continue
            for stream in network.links.pop(far):
                stream.lose()
            network.admitted.pop(far, None)
            network.emit(PeerDisconnected(far))

    def open_stream(self, network: MemoryNetwork, peer: PeerId, protocol: str) -> MemoryStream:
        """Open a stream between two connected networks."""
        other = self._networks[peer]
        there, back = _Pipe(), _Pipe()
        near = MemoryStream(peer, protocol, there, back)
        if protocol not in other.handlers:
            near.refusal = "unknown_protocol"
            return near
        far = MemoryStream(network.peer, protocol, back, there)
        network.links[peer].append(near)
        other.links[network.peer].append(far)
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

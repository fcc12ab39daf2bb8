"""The seam: all that the rest of libmesh knows about networks.

Two implementations live behind it, `net.libp2p.Libp2pNetwork` for real use and `testing.MemoryHub` for tests, and
`testing.check_network` holds both to the same contract. The rest of libmesh never sees a socket or a libp2p object.

A `Network` moves bytes and reports what happened. It decides nothing: whom to connect to, whom to admit and what
a message means is decided above it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import trio

from libmesh.errors import NetworkError
from libmesh.peers import Path, PeerId, Reaching

Pieces = list[bytes | memoryview]

Sink = Callable[[Pieces], int]
"""Takes bytes at once and says how many. Must not block, raise, call the stream, or keep a view."""


class StreamReset(NetworkError, trio.BrokenResourceError):
    """A stream ended abruptly: the peer reset it, or its connection died. Never an end of file."""


class Stream(trio.abc.HalfCloseableStream):
    """A bidirectional byte stream to one service of one peer.

    The contract of `trio.abc.HalfCloseableStream`, and beyond it:

    - Cancelling any call at any point harms no other stream and not the connection. A cancelled `receive_some`
      loses nothing. After a cancelled `send_all` an unknown prefix was sent; reset or close the stream.
    - A reader that stops reading stops only its own writer, for as long as it likes.
    - `send_eof` reaches the reader as `b""` after all data. A reset, or the death of the connection, reaches it as
      `StreamReset`, never as an end of file; bytes that had arrived before are delivered first.
    - `aclose` sends an end of file if none was sent, and tells the peer that nothing more will be read.
    - One task may send while another receives. Two senders, or two receivers, get `trio.BusyResourceError`.

    Attributes:
        peer: the peer at the other end, authenticated by the connection.
        protocol: the protocol id that was negotiated.
    """

    peer: PeerId
    protocol: str

    @property
    def connection_lost(self) -> bool:
        """Whether the connection beneath is over: a `StreamReset` was not the peer's will, then."""
        return False

    def receive_nowait(self, max_bytes: int | None = None) -> bytes | None:
        """Like `receive_some`, for what has arrived already; `None` if `receive_some` would be needed to find out.

        No checkpoint, so a loop over it must make its own now and then. An implementation may always say `None`.
        """
        return None

    async def receive_past(self, sink: Sink) -> bytes | bytearray:
        """Like `receive_some`, for what `sink` does not take, which is called with pieces of bytes and says how many it takes.

        What arrives while this waits is offered to it in the very call that received it, which spares a turn of the scheduler.
        An implementation may never do so.
        """
        return await self.receive_some()

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Send what can be sent without waiting, and return how many bytes that was, possibly 0.

        Raises like `send_all`. Not while another task is in `send_all`. An implementation may always say 0.
        """
        return 0

    def post(self, data: bytes) -> bool:
        """Send the first bytes of this side, at most 1 KiB, together with what follows at once. Never waits.

        For lines that begin a conversation. They leave in the next turn of the scheduler; in answer to a peer that has
        sent more already, and so does not wait for them, with the next bytes or 20 ms later. On a stream that is over
        nothing happens: the next call tells. False if the implementation cannot; it may always say so.
        """
        return False

    def when_lost(self, scope: trio.CancelScope | None) -> bool:
        """Cancel `scope` once the peer has reset the stream or its connection is over; at once if that is so already.

        For whoever has a stream and waits for something else. One scope at a time; `None` to take it back. False if the
        implementation does not hear of such things while nobody receives; it may always say so.
        """
        return False

    @abstractmethod
    def reset(self) -> None:
        """End the stream abruptly in both directions, now. Never blocks, never raises, harmless to repeat.

        Bytes not yet sent are dropped. The peer's next call on the stream raises `StreamReset`.
        """


Approach = Callable[[PeerId, tuple[str, ...]], Awaitable[None]]
"""Connects to a peer in such a way that it serves us. Raises `MeshError`."""

StreamHandler = Callable[[Stream], Awaitable[None]]
"""Called in a task of its own for each inbound stream. Owns the stream; whatever it raises, other than
cancellation, is logged and resets the stream. A stream that is still open when it returns is closed."""


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """The first connection to `peer` stands. It may open only the protocols that need no admission."""

    peer: PeerId
    path: Path
    inbound: bool


@dataclass(frozen=True, slots=True)
class PathChanged:
    """Another connection is now the best one to a peer that stays connected: new streams go by it.

    Streams that are open live on over the connection that they began on, unless that is silent: it is given up once the one
    in its place has been heard, so that what can go on there does. Comes between `PeerConnected` and `PeerDisconnected` of
    the peer, whether the change was for the better (a dial, a punch) or for the worse (a loss). Also tells that the same
    connection works after all, if there was a `PathSilent`.

    `renewed`: the connection before was silent, so the peer may not know any more that it had admitted us.
    """

    peer: PeerId
    path: Path
    renewed: bool = False


@dataclass(frozen=True, slots=True)
class PathSilent:
    """No connection to `peer` answers any more, though none has ended: it is time to look for another way.

    A `PathChanged` or a `PeerDisconnected` follows, whatever comes of it. A transport that cannot tell never says it.
    """

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The last connection to `peer` is gone, and all streams over it have failed."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class AddressesChanged:
    """`Network.addresses` are others now."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message published on `topic`. `origin` signed it; who passed it on is not told."""

    topic: str
    origin: PeerId
    data: bytes


NetworkEvent = PeerConnected | PathChanged | PathSilent | PeerDisconnected | AddressesChanged | Message


class Network(ABC):
    """What a mesh needs from a transport. All coroutines may be cancelled at any point without harm.

    Obtained open, from an async context manager; leaving that closes every listener, connection and stream.
    """

    @property
    @abstractmethod
    def peer(self) -> PeerId:
        """This node's own id."""

    @abstractmethod
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs as text, without `/p2p/…`, that others may be able to reach us at. Best first; no 0.0.0.0."""

    @abstractmethod
    def events(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[NetworkEvent]]:
        """The network's events, in order. May be entered once.

        A reader that falls behind by more than a bound loses the `Message`s that come then, never the other events.
        """

    @abstractmethod
    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> Path:
        """Return the path to `peer`, connecting at any of `addresses` if there is no connection yet.

        The peer's identity is proved by the handshake. Raises `PeerUnreachable`, with the reason per address.
        """

    @abstractmethod
    async def disconnect(self, peer: PeerId) -> None:
        """Close all connections to `peer`; its streams see `StreamReset`. No error if there are none."""

    def idle(self, peer: PeerId) -> bool:
        """Whether no stream is open to or from `peer`, other than the transport's own. `False` if that cannot be told."""
        return False

    @abstractmethod
    def path(self, peer: PeerId) -> Path | None:
        """The path in use, with the current round-trip estimate; `None` if not connected.

        The best of the connections that stand: direct and punched before relayed, and among equals one on which both
        ends agree. New streams go by it. A worse one is closed when nothing has been open on it for a while, never
        with a live stream; and a silent one when the one in its place has been heard.
        """

    async def dial(self, peer: PeerId, address: str) -> Path:
        """Make a new connection by exactly this address, beside those there are, and return its path.

        `address` is direct, or a circuit (`…/p2p/RELAY/p2p-circuit`): then a connection to the relay is made first if
        there is none. Which one is used is told by `path`, and by `PathChanged` if that is another one now. If cancelled
        there is no new connection. Raises `NetworkError`, saying in a few words what went wrong.
        """
        raise NetworkError("this transport cannot dial by address")

    async def punch(self, peer: PeerId) -> Path:
        """Make a direct connection to a peer that there is only a relayed one to, through both sides' NATs (DCUtR).

        Either side may call it, or both. Raises `NetworkError` with the reason; the relayed connection is as before.
        """
        raise NetworkError("this transport cannot punch holes")

    def set_relays(self, relays: Sequence[str], approach: Approach | None = None) -> None:
        """Let others reach us through some of these relays from now on, and through no other; none to stop.

        Args:
            relays: their multiaddrs with `/p2p/…`, best first. Several of one relay are ways to the same one.
            approach: awaited before a relay is asked for a place, with the relay and its addresses: connects to it and,
                where it serves only those whom it has admitted, is admitted. By default, connects only.

        The network keeps reservations on a few of them at once, renews them, and replaces a relay that is gone. What is
        held at a time is in `addresses()`, as circuits. Does nothing on a transport without relays.
        """
        return

    async def register(self, point: PeerId, namespace: str, addresses: tuple[str, ...]) -> float:
        """Leave word at a connected rendezvous point that this node is of `namespace` and at `addresses`.

        Returns the seconds until it must be repeated; in the meantime whoever asks there hears of it. Raises `NetworkError`
        if it was refused, and `ServiceRefused` if the peer is no such point.
        """
        raise NetworkError("this transport knows no rendezvous")

    async def discover(self, point: PeerId, namespace: str) -> dict[PeerId, tuple[str, ...]]:
        """The peers that have left word in `namespace`, 64 at most, and the addresses that they signed. Not this node.

        It may be long ago, and anybody may have. Raises as `register`.
        """
        raise NetworkError("this transport knows no rendezvous")

    def reaching(self) -> Reaching:
        """What is known of how others reach this node."""
        return Reaching()

    @abstractmethod
    def admit(self, peer: PeerId) -> None:
        """From now on `peer` may open any protocol and takes part in topics. Ends when it disconnects."""

    @abstractmethod
    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """Open a stream to a connected peer.

        May return before the peer has agreed to the protocol; if it does not, the first receive raises
        `ServiceRefused` with reason `unknown_protocol`. Raises `PeerUnreachable` when there is no connection.
        """

    @abstractmethod
    def set_handler(self, protocol: str, handler: StreamHandler, *, admitted_only: bool = True) -> None:
        """Handle inbound streams of `protocol`. With `admitted_only`, streams of others are reset unseen."""

    @abstractmethod
    async def subscribe(self, topic: str) -> None:
        """Receive `topic`'s messages as events from now on. Own messages are not delivered back."""

    @abstractmethod
    async def publish(self, topic: str, data: bytes) -> None:
        """Publish to all subscribers, at most once each, best effort. `data` is at most 64 KiB."""

"""The connections of the adapter: how they come, which one is the best to each peer, and when one is of no more use.

A peer may have several at once: both sides dialled, or a relayed one is followed by a direct one. New streams go by the
best; those that are open stay where they began. A connection that is not the best any more is closed once nothing has
been open on it for a while. One that gives no sign of life when asked (`vigil.py`) is worse than any that does, and is ended
when there is such a one: streams that outlive their connection go on there. Whoever makes another connection had a reason,
so the ones there are get asked then.

Both ends must not close each other's choice. Kinds are plain to both; of two connections of one kind the one that the
peer with the lower id dialled counts as better, and of two by the same side only that side closes one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio
from libp2p.connection_types import ConnectionType
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.rcmgr import Direction
from multiaddr import Multiaddr

from libmesh.errors import NetworkError
from libmesh.net import tcp
from libmesh.net.base import NetworkEvent, PathChanged, PathSilent, PeerConnected, PeerDisconnected, Stream
from libmesh.net.eager import was_refused
from libmesh.net.gossip import Gossip
from libmesh.net.muxer import YamuxConnection
from libmesh.net.raw import StreamFace
from libmesh.net.swarm import is_open, libp2p_id, path_of
from libmesh.net.vigil import Vigil
from libmesh.peers import Path, PathKind, PeerId

log = logging.getLogger(__name__)

MAX_PER_PEER = 8
"""Connections to one peer. Further ones are refused: one way each of several relays and addresses is plenty."""

RETIRE_AFTER = 2.0
"""Seconds between two looks at a connection that is not the best; it is closed when both found no stream on it. More
than a round trip, so that streams that the peer opened before it saw the better one are not cut."""


REPLACED_FOR = 1.0
"""Seconds for which another connection must have been the best before a silent one is ended: when a link comes back, both speak
again, and which one first is chance."""


@dataclass(slots=True)
class Peer:
    """A peer with at least one connection. Its first stream may come before py-libp2p tells of the connection."""

    admitted: trio.Event = field(default_factory=trio.Event)
    connections: list[Any] = field(default_factory=list)
    best: Any = None
    best_since: float = 0.0
    waiting: int = 0


class Connections:
    """Books the swarm's connections, and tells of peers that come, go, and are reached by another way.

    Args:
        swarm: py-libp2p's.
        gossip: told of admitted connections; made after the swarm.
        me: this node's id.
        emit: takes the events.
        max_handshakes: inbound connections that have not proved a key yet. When full, the oldest one is dropped.
    """

    def __init__(
        self,
        swarm: Any,
        gossip: Gossip,
        me: PeerId,
        emit: Callable[[NetworkEvent], None],
        *,
        max_handshakes: int,
    ) -> None:
        self._swarm, self._gossip, self._me, self._emit = swarm, gossip, me, emit
        self._max_handshakes = max_handshakes
        self.peers: dict[PeerId, Peer] = {}
        self.handshakes: OrderedDict[trio.CancelScope, None] = OrderedDict()
        self.tasks: trio.Nursery | None = None
        self.vigil = Vigil(self._doubt_changed, self._is_silent)
        self._retiring: set[Any] = set()

    # ── which there are ──────────────────────────────────────────────────────────────────────────────────────────

    def of(self, peer: PeerId, kind: PathKind | None = None) -> list[Any]:
        """The open connections to `peer` (of one kind), best first."""
        peer_id = libp2p_id(peer)
        found = [] if peer_id is None else self._swarm.connections.get(peer_id, [])
        usable = [connection for connection in found if is_open(connection)]
        if len(usable) > 1:
            usable.sort(key=lambda connection: self._rank(peer, connection))
        return [c for c in usable if kind is None or path_of(c).kind is kind]

    def _rank(self, peer: PeerId, connection: Any) -> tuple[bool, bool, bool]:
        ours = connection.direction is Direction.OUTBOUND
        relayed = path_of(connection).kind is PathKind.RELAYED
        return self.vigil.doubts(connection), relayed, ours != (self._me < peer)

    def select(self, connections: list[Any], peer_id: Any) -> Any:
        """In place of the swarm's own choice, for the streams that py-libp2p opens."""
        peer = PeerId(str(peer_id))
        return min(connections, key=lambda connection: self._rank(peer, connection))

    def path(self, peer: PeerId) -> Path | None:
        """The path of the best connection."""
        connections = self.of(peer)
        return path_of(connections[0]) if connections else None

    def answers(self, peer: PeerId) -> bool:
        """Whether there is a connection to `peer` that is not silent."""
        connections = self.of(peer)
        return bool(connections) and not self.vigil.doubts(connections[0])

    def idle(self, peer: PeerId) -> bool:
        """See `Network.idle`. A muxer that is not ours does not tell."""
        muxers = [connection.muxed_conn for connection in self.of(peer)]
        return all(
            isinstance(muxer, YamuxConnection) and all(map(self._gossip.carries, muxer.streams))
            for muxer in muxers
        )

    def local_port(self, peer: PeerId) -> int | None:
        """Where the best connection to `peer` leaves this node; `None` if the peer made it, or a relay carries it."""
        connections = self.of(peer)
        if not connections or connections[0].direction is not Direction.OUTBOUND:
            return None
        return getattr(connections[0].muxed_conn.secured_conn.raw, "libmesh_port", None)

    def entry(self, peer: PeerId) -> Peer:
        """The peer's entry. One whose connections have all ended is over, though py-libp2p may tell of that later."""
        entry = self.peers.get(peer)
        if entry is not None and entry.connections and not any(map(is_open, entry.connections)):
            self._forget(peer)
            entry = None
        return self.peers.setdefault(peer, Peer()) if entry is None else entry

    def admitted(self, peer: PeerId) -> bool:
        """Whether `peer` is connected and was admitted."""
        entry = self.peers.get(peer)
        return entry is not None and entry.admitted.is_set() and bool(self.of(peer))

    def admit(self, peer: PeerId) -> None:
        """See `Network.admit`."""
        connections = self.of(peer)
        if not connections or self.tasks is None:
            return
        self.entry(peer).admitted.set()
        self.tasks.start_soon(self._gossip.admitted, connections[0])

    # ── how they come ────────────────────────────────────────────────────────────────────────────────────────────

    async def make(
        self,
        bytes_to: Callable[[], Awaitable[trio.SocketStream | Stream]],
        *,
        peer: PeerId,
        address: str,
        kind: PathKind,
    ) -> Path:
        """See `Underlay.make`."""
        try:
            return await self.adopt(
                await bytes_to(), peer=peer, initiator=True, address=address, kind=kind, eager=True
            )
        except NetworkError as exc:
            if not was_refused(exc):
                raise
            log.debug("%s does not take Noise at once: %s", peer, exc)
        return await self.adopt(await bytes_to(), peer=peer, initiator=True, address=address, kind=kind)

    async def adopt(
        self,
        stream: trio.SocketStream | Stream,
        *,
        peer: PeerId | None,
        initiator: bool,
        address: str,
        kind: PathKind,
        eager: bool = False,
    ) -> Path:
        """See `Underlay.adopt`. `eager`: speak Noise without asking whether the other side has it."""
        with _Owned(stream) as owned:
            try:
                raw = _raw_of(stream, initiator=initiator, address=address, kind=kind)
            except OSError as exc:  # reset by the other end already, so that nobody is there
                raise NetworkError(tcp.reason(exc)) from exc
            raw.libmesh_eager = eager
            peer_id = None if peer is None else libp2p_id(peer)
            if initiator and peer_id is None:
                raise NetworkError(f"{peer!r} is no peer id")
            if peer is not None and len(self.of(peer)) >= MAX_PER_PEER:
                raise NetworkError(f"there are {MAX_PER_PEER} connections to the peer {peer} already")
            try:
                if initiator:
                    made = (await self._swarm.upgrade_outbound_raw_conn(raw, peer_id)).muxed_conn
                else:
                    made = await self._handshake(raw)
            except Exception as exc:
                raise NetworkError(tcp.reason(exc)) from exc
            found = PeerId(str(made.peer_id))
            if (peer is not None and found != peer) or len(self.of(found)) > MAX_PER_PEER:
                await made.close()
                raise NetworkError(f"{found} answered" if found != peer else "too many connections")
            owned.keep()
        return Path(kind=kind, address=address, rtt=getattr(made, "rtt", None))

    async def _handshake(self, raw: RawConnection) -> Any:
        """An inbound handshake, dropped when it is the oldest of too many."""
        with trio.CancelScope() as scope:
            if len(self.handshakes) >= self._max_handshakes:
                oldest, _ = self.handshakes.popitem(last=False)
                oldest.cancel()
            self.handshakes[scope] = None
            try:
                return await self._swarm.upgrade_inbound_raw_conn(raw, Multiaddr("/ip4/0.0.0.0/tcp/0"))
            finally:
                self.handshakes.pop(scope, None)
        raise NetworkError("dropped for newer ones")

    # ── told by py-libp2p ────────────────────────────────────────────────────────────────────────────────────────

    async def connected(self, connection: Any) -> None:
        """A connection stands."""
        peer = PeerId(str(connection.muxed_conn.peer_id))
        entry = self.entry(peer)
        for other in entry.connections:
            self.vigil.ask(other)
        entry.connections.append(connection)
        self._watch(peer, connection)
        if len(entry.connections) == 1:
            entry.best, entry.best_since = connection, trio.current_time()
            inbound = connection.direction is Direction.INBOUND
            self._emit(PeerConnected(peer, path_of(connection), inbound))
            if entry.admitted.is_set():
                await self._gossip.admitted(connection)
        else:
            self._choose(peer, entry)

    async def disconnected(self, connection: Any) -> None:
        """A connection is gone, says py-libp2p, some 0.1 s after it was."""
        peer = PeerId(str(connection.muxed_conn.peer_id))
        if not self.of(peer):
            await self._gossip.gone(connection)
        self._ended(peer, connection)

    def _ended(self, peer: PeerId, connection: Any) -> None:
        """Take a connection that is over out of the books. Harmless to repeat."""
        self.vigil.forget(connection)
        entry = self.peers.get(peer)
        if entry is None or connection not in entry.connections:
            return
        others = [other for other in entry.connections if other is not connection]
        if others:
            entry.connections = others
            self._choose(peer, entry)
        elif not self.of(peer):
            self._forget(peer)

    def _watch(self, peer: PeerId, connection: Any) -> None:
        """Hear of the connection's end at once."""
        muxed = connection.muxed_conn
        tell_swarm = muxed.on_close

        async def over() -> None:
            self._ended(peer, connection)
            await tell_swarm()

        muxed.on_close = over
        self.vigil.watch(connection)

    def _doubt_changed(self, connection: Any) -> None:
        """A connection fell silent, or speaks again."""
        peer = PeerId(str(connection.muxed_conn.peer_id))
        entry = self.peers.get(peer)
        if entry is None or connection not in entry.connections:
            return
        log.debug("%s: silent %s", path_of(connection), self.vigil.doubts(connection))
        before = entry.best
        self._choose(peer, entry)
        if self.vigil.doubts(connection):
            if entry.best is before and self.vigil.doubts(before):  # of another one `_choose` has told
                self._emit(PathSilent(peer))
        elif entry.best is before is connection:
            entry.best_since = trio.current_time()
            self._emit(PathChanged(peer, path_of(connection)))

    def _is_silent(self, connection: Any) -> None:
        """A connection has been silent for long. It is ended once the one in its place has been heard there."""
        peer = PeerId(str(connection.muxed_conn.peer_id))
        entry = self.peers.get(peer)
        if entry is None or not self.answers(peer):
            return
        if getattr(entry.best.muxed_conn, "heard_at", float("inf")) < entry.best_since:
            self.vigil.ask(entry.best)  # not to be doubted proves nothing of one that nobody has asked
        elif trio.current_time() - entry.best_since >= REPLACED_FOR:
            connection.muxed_conn.give_up("it was silent, and replaced")

    def _forget(self, peer: PeerId) -> None:
        if self.peers.pop(peer).connections:
            self._emit(PeerDisconnected(peer))

    def _choose(self, peer: PeerId, entry: Peer) -> None:
        """Find out which connection is the best now; tell of it, and retire the others when they are idle."""
        connections = self.of(peer)
        if not connections:
            return
        best = connections[0]
        if best is not entry.best:
            silent = self.vigil.doubts(best)  # the one before ended, and none that is left answers
            renewed = not silent and entry.best is not None and self.vigil.doubts(entry.best)
            entry.best, entry.best_since = best, trio.current_time()
            self._emit(PathChanged(peer, path_of(best), renewed))
            if silent:
                self._emit(PathSilent(peer))
            if entry.admitted.is_set() and self.tasks is not None:
                self.tasks.start_soon(self._gossip.moved, best.muxed_conn.peer_id, best)
        for surplus in connections[1:]:
            if (
                self.tasks is not None
                and surplus not in self._retiring
                and self._is_ours_to_close(surplus, best)
            ):
                self._retiring.add(surplus)
                self.tasks.start_soon(self._retire, peer, surplus)

    @staticmethod
    def _is_ours_to_close(surplus: Any, best: Any) -> bool:
        relayed = path_of(surplus).kind is PathKind.RELAYED, path_of(best).kind is PathKind.RELAYED
        if relayed == (True, False) or surplus.direction is not best.direction:
            return True
        return surplus.direction is Direction.OUTBOUND

    async def _retire(self, peer: PeerId, surplus: Any) -> None:
        """Close `surplus` when nothing has been open on it for two looks, unless it has become the best again."""
        idle = 0
        try:
            while idle < 2:
                await trio.sleep(RETIRE_AFTER)
                connections = self.of(peer)
                if surplus not in connections or surplus is connections[0]:
                    return
                idle = 0 if surplus.muxed_conn.stream_count else idle + 1
                await self._gossip.moved(
                    surplus.muxed_conn.peer_id, connections[0]
                )  # if it was only beginning then
            log.debug(
                "closing a connection to %s that a better one replaced: %s", peer, path_of(surplus).address
            )
            await surplus.close()
        finally:
            self._retiring.discard(surplus)


class _Owned:
    """Closes a stream's bytes at once unless `keep` was called."""

    def __init__(self, stream: trio.SocketStream | Stream) -> None:
        self._stream: trio.SocketStream | Stream | None = stream

    def keep(self) -> None:
        self._stream = None

    def __enter__(self) -> _Owned:
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self._stream, trio.SocketStream):
            self._stream.socket.close()
        elif self._stream is not None:
            self._stream.reset()


def _raw_of(stream: trio.SocketStream | Stream, *, initiator: bool, address: str, kind: PathKind) -> Any:
    face = TrioTCPStream(stream) if isinstance(stream, trio.SocketStream) else StreamFace(stream)
    how = ConnectionType.RELAYED if kind is PathKind.RELAYED else ConnectionType.DIRECT
    raw: Any = RawConnection(face, initiator, how, [Multiaddr(address)] if address else [])
    raw.libmesh_kind = kind
    if isinstance(stream, trio.SocketStream):
        raw.libmesh_port = stream.socket.getsockname()[1]
        remote = tuple(stream.socket.getpeername()[:2])
        raw.get_remote_address = lambda: remote  # py-libp2p's own tells of no IPv6 address
    return raw

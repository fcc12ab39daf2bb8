"""Dials peers back that want to know whether they can be reached: the serving side of AutoNAT v2.

Source: libp2p/specs, autonat/autonat-v2.md. The dial is a new connection from a port that nobody listens on and with a
key made for it, so neither a connection that there is nor a hole in the asker's router can make it succeed.

Nobody can be made to attack others: addresses are dialled only where the asker is seen; any other one costs the asker
more bytes than the dial costs us, private ones are never dialled, and each peer may ask only so often.
"""

from __future__ import annotations

import os
import random
from typing import Any, cast

import trio
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection

from libmesh.core.ways import ip_of, is_websocket
from libmesh.errors import MeshError
from libmesh.framing import receive_frame
from libmesh.net import reach_wire as wire
from libmesh.net import tcp
from libmesh.net.base import Stream
from libmesh.net.negotiate import open_lazy_stream
from libmesh.net.reach_wire import Verdict
from libmesh.net.swarm import libp2p_id, new_mesh_swarm
from libmesh.net.underlay import Underlay
from libmesh.peers import Path, PathKind, PeerId
from libmesh.wire_pieces import WireError

REQUEST_LIMIT = 20.0
"""Seconds for a whole request, its bytes and the dial included; shorter than the asker's patience."""

DIAL_LIMIT = 8.0
"""Seconds for the dial and its handshake."""

MAX_DIALS = 8
"""Requests served at a time; one of each peer. More are rejected."""

BURST, PER_REQUEST = 6.0, 5.0
"""Requests of one peer at once, and seconds until it may make another one."""

MAX_ASKERS = 1024
"""Peers whose requests are counted; the one that asked longest ago is forgotten first."""

_MIN_DATA, _MORE_DATA = 30_000, 60_000


class DialBack:
    """Serves requests for dials back.

    Args:
        underlay: the adapter.
        open_to_all: serve whoever asks, not admitted peers only.
        private_only: dial nothing beyond private networks.
    """

    def __init__(self, underlay: Underlay, *, open_to_all: bool = False, private_only: bool = False) -> None:
        self._underlay, self._private_only = underlay, private_only
        self._busy: set[PeerId] = set()
        self._spent: dict[PeerId, tuple[float, float]] = {}
        underlay.set_handler(wire.DIAL_REQUEST, self._serve, admitted_only=not open_to_all)

    async def _serve(self, stream: Stream) -> None:
        with trio.move_on_after(REQUEST_LIMIT):
            try:
                request = wire.decode(await receive_frame(stream, wire.MAX_MESSAGE))
                if not isinstance(request, wire.Request):
                    raise WireError("a request to dial was expected")
                response = await self._answer(stream, request)
                await stream.send_all(wire.encode(response))
            except WireError:
                stream.reset()
            return
        stream.reset()

    async def _answer(self, stream: Stream, request: wire.Request) -> wire.Response:
        peer = stream.peer
        if peer in self._busy or len(self._busy) >= MAX_DIALS or not self._may_ask(peer):
            return wire.Response(Verdict.REJECTED)
        index = self._choose(peer, request.addresses)
        if index is None:
            return wire.Response(Verdict.REFUSED)
        self._busy.add(peer)
        try:
            address = request.addresses[index]
            if ip_of(address) != self._seen_ip(peer):
                await _demand(stream, index)
            reached = await dial_back(peer, address, request.nonce)
            return wire.Response(Verdict.REACHED if reached else Verdict.NOT_REACHED, index)
        finally:
            self._busy.discard(peer)

    def _may_ask(self, peer: PeerId) -> bool:
        """A token bucket for each peer."""
        now = trio.current_time()
        tokens, since = self._spent.pop(peer, (BURST, now))
        tokens = min(BURST, tokens + (now - since) / PER_REQUEST)
        self._spent[peer] = (max(0.0, tokens - 1), now)
        if len(self._spent) > MAX_ASKERS:
            del self._spent[next(iter(self._spent))]
        return tokens >= 1

    def _seen_ip(self, peer: PeerId) -> object:
        path: Path | None = self._underlay.path(peer)
        if path is None or path.kind is PathKind.RELAYED or is_websocket(path.address):  # a proxy's, perhaps
            return None
        return ip_of(path.address)

    def _choose(self, peer: PeerId, addresses: tuple[str, ...]) -> int | None:
        """The first address that may be dialled: a public one, or, for a peer that is here, the one it comes from."""
        seen = self._seen_ip(peer)
        for index, address in enumerate(addresses):
            ip = ip_of(address)
            try:
                tcp.host_and_port(address)
            except ValueError:
                continue
            if ip is None or (self._private_only and ip.is_global):
                continue
            if ip.is_global or ip == seen:
                return index
        return None


async def _demand(stream: Stream, index: int) -> None:
    """Have the asker pay in bytes."""
    missing = random.randint(_MIN_DATA, _MIN_DATA + _MORE_DATA)
    await stream.send_all(wire.encode(wire.DataWanted(index, missing)))
    while missing > 0:
        message = wire.decode(await receive_frame(stream, wire.MAX_MESSAGE))
        if not isinstance(message, wire.Data) or not 0 < len(message.data) <= wire.MAX_PIECE:
            raise WireError("bytes were expected")
        missing -= len(message.data)


async def dial_back(peer: PeerId, address: str, nonce: int) -> bool:
    """Whether `peer` answers at `address`, and takes the nonce there. Never uses or makes a connection of the node."""
    with trio.move_on_after(DIAL_LIMIT):
        try:
            stream = await tcp.dial(address)
        except (OSError, ValueError):
            return False
        try:
            return await _say(stream, peer, nonce)
        except Exception:  # noqa: BLE001 - whatever is there, it is not the peer, or it does not take the dial-back
            return False
        finally:
            stream.socket.close()
    return False


async def _say(stream: trio.SocketStream, peer: PeerId, nonce: int) -> bool:
    upgrader = new_mesh_swarm(os.urandom(32), max_connections=1, handshake_limit=DIAL_LIMIT).upgrader
    raw = RawConnection(TrioTCPStream(stream), True)
    peer_id = libp2p_id(peer)
    secured = await upgrader.upgrade_security(raw, True, peer_id)
    muxed = cast(Any, await upgrader.upgrade_connection(secured, peer_id))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(muxed.start)
        await muxed.event_started.wait()
        try:
            said = await open_lazy_stream(muxed, peer, wire.DIAL_BACK)
            await said.send_all(wire.encode_dial_back(nonce))
            await receive_frame(said, wire.MAX_MESSAGE)
            return True
        except (MeshError, trio.BrokenResourceError):
            return False
        finally:
            nursery.cancel_scope.cancel()

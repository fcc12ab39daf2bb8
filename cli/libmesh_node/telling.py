"""How clients that only follow the mesh are heard in its demand: they announce nothing, so each tells one member."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from libmesh import Mesh, MeshError, NetworkError, PeerId, PeerState, Stream
from libmesh_node.announced import MAX_WISHES, decode_demand, encode_demand
from libmesh_node.asked import Asked

log = logging.getLogger(__name__)

SERVICE = "demand"
"""The service of a member that counts for clients; see node.proto."""

MAX_MESSAGE = 16 << 10

PACE = 0.5
"""Seconds between two messages of a client."""

PATIENCE = 10.0
"""Seconds that one message may take."""

TRIES = 3
"""Members that are asked to hear one message. Then it is lost, and the next one tells of what waits still."""


async def hear(stream: Stream, told: Callable[[str, tuple[Asked, ...]], None]) -> None:
    """The member's side of one message. Takes over `stream`. What is too long, too slow or garbage is ignored."""
    data = bytearray()
    async with stream:
        with trio.move_on_after(PATIENCE):
            while len(data) <= MAX_MESSAGE:
                if not (piece := await stream.receive_some(4096)):
                    told(stream.peer, decode_demand(bytes(data)))
                    return
                data += piece


class Teller:
    """The client's side. `run` until cancelled."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._pending: dict[str, Asked] = {}
        self._news = trio.Event()
        self._before: PeerId | None = None

    def tell(self, asked: tuple[Asked, ...]) -> None:
        """Never blocks. At most `MAX_WISHES` models wait to be told of; further ones are left out."""
        for one in asked:
            if (known := self._pending.get(one.digest)) is not None:
                one = Asked(
                    digest=one.digest,
                    name=one.name,
                    requests=one.requests + known.requests,
                    waiting=one.waiting,
                )
            if known is not None or len(self._pending) < MAX_WISHES:
                self._pending[one.digest] = one
        self._news.set()

    async def run(self) -> None:
        """Tell what there is to tell."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            pending, self._pending = self._pending, {}
            await self._send(encode_demand(pending.values()))
            await trio.sleep(PACE)

    async def _send(self, message: bytes) -> None:
        for peer in self._members()[:TRIES]:
            try:
                with trio.fail_after(PATIENCE):
                    async with await self._mesh.open_service(peer, SERVICE, wait=False) as stream:
                        await stream.send_all(message)
                        await stream.send_eof()
                        await stream.receive_some(1)  # it has heard all when it closes
            except (MeshError, NetworkError, OSError, trio.BrokenResourceError, trio.TooSlowError) as exc:
                log.debug("%s did not hear what was asked for: %s", peer, exc)
            else:
                self._before = peer
                return

    def _members(self) -> list[PeerId]:
        """Those who hear, the one that heard last time first, then those that there is a connection to."""
        able = [
            peer
            for peer in self._mesh.view.peers
            if peer.state is PeerState.ALIVE and any(service.name == SERVICE for service in peer.services)
        ]
        able.sort(key=lambda peer: (peer.peer != self._before, peer.path is None, peer.peer))
        return [peer.peer for peer in able]

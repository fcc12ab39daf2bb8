"""What the parts of the adapter that make connections in other ways see of it: relay and hole punching.

They bring bytes (a circuit, a punched socket) and are given back a connection with proof of the peer's key and a muxer,
booked like any other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from libmesh.net.base import Stream, StreamHandler
from libmesh.peers import Path, PathKind, PeerId


class Underlay(Protocol):
    """The adapter, seen from below. `Libp2pNetwork` is one."""

    @property
    def peer(self) -> PeerId:
        """This node's own id."""

    @property
    def port(self) -> int:
        """The TCP port that is listened on; dials for a hole punch leave from it."""

    def addresses(self) -> tuple[str, ...]:
        """See `Network.addresses`; includes circuits that are held."""

    def path(self, peer: PeerId) -> Path | None:
        """See `Network.path`."""

    def admitted(self, peer: PeerId) -> bool:
        """Whether `peer` is connected and was admitted: it is a member."""

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> Path:
        """See `Network.connect`."""

    async def dial(self, peer: PeerId, address: str) -> Path:
        """See `Network.dial`."""

    async def open_stream(self, peer: PeerId, protocol: str, *, kind: PathKind | None = None) -> Stream:
        """See `Network.open_stream`; with `kind`, over the best connection of that kind only."""

    def set_handler(self, protocol: str, handler: StreamHandler, *, admitted_only: bool = True) -> None:
        """See `Network.set_handler`."""

    async def make(
        self,
        bytes_to: Callable[[], Awaitable[trio.SocketStream | Stream]],
        *,
        peer: PeerId,
        address: str,
        kind: PathKind,
    ) -> Path:
        """Make a connection to `peer` out of the bytes that `bytes_to` opens, as the initiator; otherwise like `adopt`.

        A round trip faster than that for nearly every peer; for one that has no Noise, `bytes_to` is called twice.
        """
        ...

    async def adopt(
        self,
        stream: trio.SocketStream | Stream,
        *,
        peer: PeerId | None,
        initiator: bool,
        address: str,
        kind: PathKind,
    ) -> Path:
        """Secure and mux the bytes of `stream`, and book the connection as one to the peer at its other end.

        Owns `stream` from now on, and closes it on failure, too.

        Args:
            stream: a connected socket, or a stream whose bytes are the other end's.
            peer: who must be there; `None` to take whoever proves a key. Needed for an initiator.
            initiator: whether this side starts the handshake (multistream, Noise, yamux). Exactly one of the two does.
            address: the remote multiaddr that `Path` will show, without the peer's id.
            kind: that `Path` will show.

        Raises `NetworkError` if the handshake fails, another peer is there or there is no room. The caller bounds the
        time of an outbound one; inbound ones are bounded by the adapter.
        """
        ...

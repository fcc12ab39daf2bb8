"""A secured connection to an authenticated peer, as py-libp2p's upgrader and our muxer want it."""

from __future__ import annotations

from typing import Any

from libp2p.abc import IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID
from libp2p.security.base_session import BaseSession
from multiaddr import Multiaddr

from libmesh.net.base import StreamReset
from libmesh.net.records import Channel


def not_the_peer(found: ID, me: ID) -> str:
    """Who answered in place of the peer that was dialled. At a private address of its network it may be this node."""
    return "this node itself answered" if found == me else f"another peer answered, {found}"


class Session(BaseSession):
    """A connection secured by one of our transports.

    Our muxer uses `channel`. `read` and `write` are there for py-libp2p's own negotiation and muxers; they and the
    channel must not be used at the same time.

    Attributes:
        raw: the connection beneath.
        channel: what it is secured with.
        early_muxer: the muxer that both sides agreed on within the handshake, `None` if it must be negotiated.
    """

    def __init__(
        self, raw: IRawConnection, channel: Channel, early_muxer: str | None, **identity: Any
    ) -> None:
        super().__init__(**identity)
        self.raw = raw
        self._unread = b""
        self.channel = channel
        self.early_muxer = early_muxer

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes, at least one; raises `IOException` at the end. If cancelled, nothing was taken."""
        if not self._unread:
            try:
                self._unread = b"".join(await self.channel.receive())
            except StreamReset as exc:
                raise IOException(str(exc)) from exc
            if not self._unread:
                raise IOException("connection closed")
        count = len(self._unread) if n is None or n < 0 else n
        data, self._unread = self._unread[:count], self._unread[count:]
        return data

    def take_unread(self) -> bytes:
        """What `read` has received and not returned. The muxer starts with it."""
        data, self._unread = self._unread, b""
        return data

    async def write(self, data: bytes) -> None:
        """Send all of `data`. If cancelled, the next write sends the rest first."""
        try:
            self.channel.put([data])
            while not self.channel.flush_nowait():
                await self.channel.flush()
        except StreamReset as exc:
            raise IOException(str(exc)) from exc

    async def close(self) -> None:
        """See `libp2p.abc.ISecureConn.close`."""
        await self.channel.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        """See `libp2p.abc.ISecureConn.get_remote_address`."""
        return self.raw.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """See `libp2p.abc.ISecureConn.get_transport_addresses`."""
        return self.raw.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """See `libp2p.abc.ISecureConn.get_connection_type`."""
        return self.raw.get_connection_type()

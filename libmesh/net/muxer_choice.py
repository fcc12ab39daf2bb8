"""Which muxer a connection gets: ours, wherever the peer speaks yamux."""

from __future__ import annotations

from typing import Any

from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream

from libmesh.core.yamux_frames import Options
from libmesh.net.muxer import Serve, YamuxConnection
from libmesh.net.noise import YAMUX_ID
from libmesh.net.session import Session


class _MuxerSelector(MuxerMultistream):
    """Chooses the muxer of a connection: ours, without a negotiation where the handshake has agreed on it already."""

    def __init__(self, stock: MuxerMultistream, options: Options | None, serve: Serve | None) -> None:
        super().__init__(stock.transports, stock.negotiate_timeout)
        self._options = options
        self._serve = serve

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        early = conn.early_muxer if isinstance(conn, Session) else None
        if early is not None and TProtocol(early) in self.transports:
            protocol = TProtocol(early)
        else:
            protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        if protocol == YAMUX_ID:
            muxed: IMuxedConn = YamuxConnection(conn, peer_id, self._options, self._serve)
        else:
            muxed = self.transports[protocol](conn, peer_id)
        return self._annotate_connection(muxed, conn, protocol)


def install_muxer(upgrader: Any, options: Options | None = None, serve: Serve | None = None) -> None:
    """Make a py-libp2p host use `YamuxConnection` for `/yamux/1.0.0`. To be called before any connection.

    `muxer_opt` should suffice and does not: `MuxerMultistream.new_conn` of 0.8.1 builds the stock muxer for that id,
    whatever class was registered.

    Args:
        upgrader: the host's `TransportUpgrader` (`swarm.upgrader`), or the swarm itself.
        options: of every connection's muxer.
        serve: gets the streams that peers open, see `YamuxConnection`.
    """
    upgrader = getattr(upgrader, "upgrader", upgrader)
    upgrader.muxer_multistream = _MuxerSelector(upgrader.muxer_multistream, options, serve)

"""py-libp2p's swarm, made to be fit for a mesh: our Noise, TLS and yamux only, and nobody dialled unasked.

By default it would also take plaintext (no proof of identity), secio and mplex, and its auto-connector would dial every
peer that it ever heard of, every 30 s. And it would refuse every peer beyond 256 that are connected: what it takes is
bounded by `Libp2pConfig` and by our muxer, so its resource manager, which asks the system for its memory at each
connection besides, is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import trio
from libp2p import new_swarm
from libp2p.abc import INetConn, INetwork, INotifee, ISecureTransport
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from libmesh.core.yamux_frames import Options
from libmesh.keys import public_key_of
from libmesh.net.eager import EagerClient
from libmesh.net.muxer import Serve, YamuxConnection
from libmesh.net.muxer_choice import install_muxer
from libmesh.net.noise import PROTOCOL_ID as NOISE_ID
from libmesh.net.noise import Noise
from libmesh.net.tls import PROTOCOL_ID as TLS_ID
from libmesh.net.tls import Tls
from libmesh.peers import Path, PathKind, PeerId

SECURITY: Sequence[tuple[str, Callable[[KeyPair], ISecureTransport]]] = ((NOISE_ID, Noise), (TLS_ID, Tls))
"""Secure channels, best first. A dialled peer takes the first that it has."""


def new_mesh_swarm(
    seed: bytes,
    *,
    max_connections: int,
    handshake_limit: float,
    options: Options | None = None,
    serve: Serve | None = None,
) -> Any:
    """A swarm for the Ed25519 `seed`, without transports: connections are brought to it already made.

    `handshake_limit` is in seconds; `options` are those of each connection's muxer; `serve` takes each inbound stream.
    Typed `Any`: the class behind py-libp2p's interface has what we need, the interface has not.
    """
    _quiet(logging.getLogger("libp2p"))
    key_pair = create_new_key_pair(seed)
    swarm = cast(
        Any,
        new_swarm(
            key_pair=key_pair,
            sec_opt={TProtocol(name): transport(key_pair) for name, transport in SECURITY},
            muxer_opt={TProtocol("/yamux/1.0.0"): YamuxConnection},
            transports=[],
            connection_config=ConnectionConfig(
                min_connections=0,
                low_watermark=0,
                high_watermark=max_connections,
                max_connections=max_connections,
                max_connections_per_peer=max_connections,  # it would cut live streams; `connections.py` bounds them
                inbound_upgrade_timeout=handshake_limit,
            ),
        ),
    )
    swarm.set_resource_manager(None)
    install_muxer(swarm.upgrader, options, serve)
    for selector in (swarm.upgrader.security_multistream, swarm.upgrader.muxer_multistream):
        selector._selector.multiselect_client = EagerClient()
    security = swarm.upgrader.security_multistream
    security.secure_outbound = partial(_secure_outbound, security)
    swarm.auto_connector.maybe_connect = _connect_nobody
    swarm.add_conn = partial(_add_connection, swarm.add_conn)
    return swarm


def _quiet(logger: logging.Logger) -> None:
    """Keep a logger that nobody listens to from writing to stderr, as Python's logging would.

    To py-libp2p every connection that ends early is an error of seven lines. An application that sets up logging still
    gets them.
    """
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


async def _secure_outbound(security: Any, raw: Any, peer_id: ID) -> Any:
    """In place of the selector's own. With the mark `libmesh_eager` on it, a connection speaks Noise without asking."""
    noise: Any = security.transports.get(NOISE_ID)
    if noise is None or not getattr(raw, "libmesh_eager", False):
        return await type(security).secure_outbound(security, raw, peer_id)
    secured = await noise.secure_eagerly(raw, peer_id)
    secured.negotiated_security_protocol = NOISE_ID
    return secured


async def _add_connection(add: Any, muxed: Any, direction: str = "unknown") -> Any:
    """Book a connection that stands, and do not be cancelled over it.

    Of two peers that dial each other at once, each gives up its own dial when the other's connection is there. By then
    both handshakes are over, so this is the only place in which giving up would leave neither.
    """
    with trio.CancelScope(shield=True):
        return await add(muxed, direction=direction)


async def _connect_nobody() -> None:
    """In place of the auto-connector."""


Listener = Callable[[Any], Awaitable[None]]


class ConnectionNotifee(INotifee):
    """Tells two functions of connections that stand and that are gone; each gets the swarm's connection object."""

    def __init__(self, connected: Listener, disconnected: Listener) -> None:
        self._connected, self._disconnected = connected, disconnected

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        """A connection stands."""
        await self._connected(conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        """A connection is gone."""
        await self._disconnected(conn)

    async def opened_stream(self, network: INetwork, stream: Any) -> None:
        """Nothing to do."""

    async def closed_stream(self, network: INetwork, stream: Any) -> None:
        """Nothing to do."""

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """Nothing to do."""

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """Nothing to do."""


@lru_cache(maxsize=4096)
def libp2p_id(peer: PeerId) -> ID | None:
    """py-libp2p's form of a peer id, or `None` if it is none of an Ed25519 key."""
    try:
        public_key_of(peer)
    except ValueError:
        return None
    return ID.from_base58(peer)


def is_open(connection: Any) -> bool:
    """Whether a swarm's connection can still be used."""
    return not connection.is_closed and not connection.muxed_conn.is_closed


@lru_cache(maxsize=1024)
def _text_of(address: bytes) -> str:
    """A multiaddr as text. It is asked for with each stream, and to make it anew costs as much as all else that asks."""
    return str(Multiaddr(address))


def path_of(connection: Any) -> Path:
    """The way that a swarm's connection takes."""
    muxed = connection.muxed_conn
    addresses = connection.get_transport_addresses()
    address = _text_of(addresses[0].to_bytes()) if addresses else ""
    kind = getattr(getattr(muxed.secured_conn, "raw", None), "libmesh_kind", None)
    if kind is None:
        kind = PathKind.RELAYED if "/p2p-circuit" in address else PathKind.DIRECT
    return Path(kind=kind, address=address, rtt=getattr(muxed, "rtt", None))

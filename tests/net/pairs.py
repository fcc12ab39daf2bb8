"""Connected pairs for tests: real sockets, real Noise, our muxer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID

from libmesh.core.yamux_frames import Options
from libmesh.net.muxed_stream import YamuxStream
from libmesh.net.muxer import YamuxConnection
from libmesh.net.noise import Noise, NoiseSession

KEYS = create_new_key_pair(bytes([1]) * 32), create_new_key_pair(bytes([2]) * 32)


def peer_of(keys: KeyPair) -> ID:
    return ID.from_pubkey(keys.public_key)


async def socket_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two ends of a TCP connection over loopback; the first one dialled."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        near = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        return near, await listener.accept()


async def raw_pair() -> tuple[RawConnection, RawConnection]:
    near, far = await socket_pair()
    return RawConnection(TrioTCPStream(near), True), RawConnection(TrioTCPStream(far), False)


async def noise_pair() -> tuple[NoiseSession, NoiseSession]:
    """Two ends of a secured connection; the first one dialled."""
    sessions: dict[int, NoiseSession] = {}
    raws = await raw_pair()

    async def outbound() -> None:
        session = await Noise(KEYS[0]).secure_outbound(raws[0], peer_of(KEYS[1]))
        assert isinstance(session, NoiseSession)
        sessions[0] = session

    async def inbound() -> None:
        session = await Noise(KEYS[1]).secure_inbound(raws[1])
        assert isinstance(session, NoiseSession)
        sessions[1] = session

    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbound)
        nursery.start_soon(inbound)
    return sessions[0], sessions[1]


@asynccontextmanager
async def muxed_pair(
    options: Options | None = None, far_options: Options | None = None
) -> AsyncIterator[tuple[YamuxConnection, YamuxConnection]]:
    """Two ends of a muxed connection, running; the first one dialled."""
    near, far = await noise_pair()
    a = YamuxConnection(near, far.get_local_peer(), options)
    b = YamuxConnection(far, near.get_local_peer(), far_options or options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.start)
        nursery.start_soon(b.start)
        await a.event_started.wait()
        await b.event_started.wait()
        try:
            yield a, b
        finally:
            with trio.CancelScope(shield=True):
                await a.close()
                await b.close()
            nursery.cancel_scope.cancel()


async def stream_pair(a: YamuxConnection, b: YamuxConnection) -> tuple[YamuxStream, YamuxStream]:
    """Two ends of a new stream, opened by `a`."""
    near = await a.open_stream()
    return near, await b.accept_stream()


async def drain(stream: trio.abc.ReceiveStream | YamuxStream) -> None:
    """Receive until the end, or an error."""
    while await stream.receive_some():
        pass


async def fill(stream: trio.abc.SendStream | YamuxStream) -> None:
    """Send until there is an error."""
    while True:
        await stream.send_all(bytes(65536))

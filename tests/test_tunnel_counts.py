"""The bytes of a connection through a tunnel count, however it ends."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping

import pytest
import trio
import trio.testing

from libmesh import Mesh, PathKind, serve_tunnel
from tests.test_doors import holds
from tests.test_tunnel import serve, tcp_echo, tunnelled, two_meshes

RESET = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)

COUNTED: Mapping[tuple[PathKind, str], int] = {
    (PathKind.DIRECT, "sent"): 1000,
    (PathKind.DIRECT, "received"): 1000,
}


async def echoed(port: int) -> trio.SocketStream:
    """A connection that a thousand bytes went through and came back."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(bytes(1000))
    got = 0
    while got < 1000:
        got += len(await stream.receive_some())
    return stream


def counted(*meshes: Mesh) -> bool:
    return all(mesh.tunnelled == COUNTED for mesh in meshes)


@pytest.mark.parametrize("end", ["close", "reset", "loss"])
async def test_a_connection_counts_whatever_ended_it(end: str) -> None:
    async with two_meshes() as (near, far, nursery):
        port = await tunnelled(near, far, nursery, await serve(nursery, tcp_echo))
        with trio.fail_after(60):
            async with await echoed(port) as stream:
                if end == "reset":
                    stream.setsockopt(*RESET)
                elif end == "loss":
                    await far._driver.network.disconnect(near.peer)
                    near.resumption.peer_left(far.peer)
                    far.resumption.peer_left(near.peer)
                    await holds(lambda: counted(near, far))
            await holds(lambda: counted(near, far))


async def test_a_connection_counts_that_ends_with_its_tunnel() -> None:
    async with two_meshes() as (near, far, nursery):
        await tunnelled(near, far, nursery, await serve(nursery, tcp_echo))
        with trio.fail_after(60):
            async with trio.open_nursery() as inner:
                port: int = await inner.start(serve_tunnel, far, near.peer, "tcp")
                async with await echoed(port):
                    inner.cancel_scope.cancel()
            assert counted(far)
            await holds(lambda: counted(near))

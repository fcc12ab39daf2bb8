"""A peer of our own, to be held to the rules: `python -m tests.conformance.peer` prints its address and an invite."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

import libmesh
from libmesh import Libp2pConfig, MembershipConfig, Mesh, MeshConfig, Network, Scope, SecretKey, Stream


async def echo(stream: Stream) -> None:
    async for data in stream:
        await stream.send_all(data)


LISTEN = Libp2pConfig(hosts=("127.0.0.1",))

CONFIG = MeshConfig(farewell=0.01, membership=MembershipConfig(coalesce=0.001))
"""All services are announced by the time that anybody can ask, and nobody is waited for at the end."""


@asynccontextmanager
async def open_peer(
    key: SecretKey | None = None, network: Network | None = None
) -> AsyncIterator[tuple[Mesh, str, str]]:
    """The peer, its multiaddr, and a token with the widest scope."""
    key = key or SecretKey.generate()
    async with libmesh.open_mesh(
        key, mesh_key=SecretKey.generate(), network=network, listen=LISTEN, config=CONFIG
    ) as mesh:
        with mesh.offer("echo", echo, lasting=True), mesh.offer("for workers", echo, scope=Scope.WORKER):
            token = mesh.invite(scope=Scope.INVITE, not_after_unix=None)
            yield mesh, f"{mesh.addresses[0]}/p2p/{mesh.peer}", token


async def main() -> None:
    async with open_peer() as (_, address, token):
        sys.stdout.write(f"{address}\n{token}\n")
        sys.stdout.flush()
        with trio.CancelScope():
            await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main)

"""The two ends of a tunnel between members of a mesh, as users get it, for `streams.py` and `streams_costs.py`.

    python bench/streams_mesh.py far TARGET_PORT [--resumable]   prints an invite
    python bench/streams_mesh.py near INVITE                     prints a local port that leads to the target

Within one machine tunnels end with their connection, so nothing is kept of what they carry. With `--resumable` the far
end listens on an address of this machine that is not a loopback one: bytes take the same way, and both ends keep them
until the other has them, as they do between machines.
"""

from __future__ import annotations

import argparse
import socket

import trio

from libmesh import Libp2pConfig, Scope, SecretKey, expose, open_mesh, read_invite, serve_tunnel


def own_address() -> str:
    """One of this machine that is not a loopback address. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 9))
        return str(sock.getsockname()[0])


async def far(target: int, host: str) -> None:
    """Found a mesh, and expose the target in it."""
    mesh_key, listen = SecretKey.generate(), Libp2pConfig(hosts=(host,))
    async with (
        open_mesh(SecretKey.generate(), mesh_key=mesh_key, listen=listen) as mesh,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(expose, mesh, "target", "127.0.0.1", target)
        print(mesh.invite(scope=Scope.CLIENT, not_after_unix=None), flush=True)


async def near(token: str) -> None:
    """Join, and open a port."""
    (peer,) = read_invite(token).contacts
    listen = Libp2pConfig(hosts=("127.0.0.1",))
    async with (
        open_mesh(SecretKey.generate(), invite=token, listen=listen) as mesh,
        trio.open_nursery() as nursery,
    ):
        print(await nursery.start(serve_tunnel, mesh, peer, "target"), flush=True)


def main() -> None:
    """Be one of the ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("role", choices=["far", "near"])
    parser.add_argument("argument")
    parser.add_argument("--resumable", action="store_true")
    arguments = parser.parse_args()
    if arguments.role == "far":
        trio.run(far, int(arguments.argument), own_address() if arguments.resumable else "127.0.0.1")
    else:
        trio.run(near, arguments.argument)


if __name__ == "__main__":
    main()

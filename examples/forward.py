"""A TCP port of one machine, reached on another one, through any number of connections at once.

python examples/forward.py expose 127.0.0.1:8000    prints an invite
python examples/forward.py connect TOKEN            prints the local port that leads there
"""

import sys

import trio

import libmesh


async def expose(target: str) -> None:
    host, _, port = target.rpartition(":")
    key, mesh_key = libmesh.SecretKey.generate(), libmesh.SecretKey.generate()
    async with libmesh.open_mesh(key, mesh_key=mesh_key) as mesh:
        print(mesh.invite(scope=libmesh.Scope.CLIENT, not_after_unix=None), flush=True)
        await libmesh.expose(mesh, "forward", host, int(port))


async def connect(token: str) -> None:
    (server,) = libmesh.read_invite(token).contacts
    async with (
        libmesh.open_mesh(libmesh.SecretKey.generate(), invite=token) as mesh,
        trio.open_nursery() as nursery,
    ):
        port = await nursery.start(libmesh.serve_tunnel, mesh, server, "forward")
        print(port, flush=True)


if __name__ == "__main__":
    try:
        trio.run(
            {"expose": expose, "connect": connect}[sys.argv[1]],
            *sys.argv[2:],
            restrict_keyboard_interrupt_to_checkpoints=True,
        )
    except* KeyboardInterrupt:
        pass
    except* libmesh.MeshError as group:
        sys.exit(str(group.exceptions[0]))

"""Prints who comes and who goes.

python examples/watch.py found             starts a mesh and prints an invite to it
python examples/watch.py join TOKEN NAME   takes part under a name
"""

import sys

import trio

import libmesh


async def watch(mesh: libmesh.Mesh) -> None:
    names: dict[libmesh.PeerId, str] = {}
    states: dict[libmesh.PeerId, libmesh.PeerState] = {}
    async with mesh.watch() as views:
        async for view in views:
            for peer in view.peers:
                if peer.attributes:  # whoever left has none any more
                    names[peer.peer] = peer.attributes.decode(errors="replace")
                if states.get(peer.peer) is not peer.state:
                    states[peer.peer] = peer.state
                    print(names.get(peer.peer, peer.peer), "is", peer.state.value, flush=True)


async def found() -> None:
    key, mesh_key = libmesh.SecretKey.generate(), libmesh.SecretKey.generate()
    async with libmesh.open_mesh(key, mesh_key=mesh_key) as mesh:
        print(mesh.invite(scope=libmesh.Scope.CLIENT, not_after_unix=None), flush=True)
        await watch(mesh)


async def join(token: str, name: str) -> None:
    async with libmesh.open_mesh(libmesh.SecretKey.generate(), invite=token) as mesh:
        mesh.announce(name.encode())
        await watch(mesh)


if __name__ == "__main__":
    try:
        trio.run(
            {"found": found, "join": join}[sys.argv[1]],
            *sys.argv[2:],
            restrict_keyboard_interrupt_to_checkpoints=True,
        )
    except* KeyboardInterrupt:
        pass
    except* libmesh.MeshError as group:
        sys.exit(str(group.exceptions[0]))

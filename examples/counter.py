"""A shared counter: everybody adds to their own part, and the total is the sum of all parts.

That is a grow-only counter: Shapiro et al., "A comprehensive study of Convergent and Commutative Replicated Data
Types", 2011. Whoever has seen a part keeps it when its member leaves.

    python examples/counter.py            founds a mesh and prints an invite; each line typed counts one
    python examples/counter.py TOKEN      joins it
"""

import sys

import trio

from libmesh import Mesh, PeerId, Scope, SecretKey, open_mesh


async def show(mesh: Mesh, parts: dict[PeerId, int]) -> None:
    shown = None
    async with mesh.watch() as views:
        async for view in views:
            for peer in view.peers:
                parts[peer.peer] = max(parts.get(peer.peer, 0), int.from_bytes(peer.attributes))
            if (now := sum(parts.values())) != shown:
                shown = now
                print(f"total {now}", flush=True)


async def main(token: str | None) -> None:
    parts: dict[PeerId, int] = {}
    mesh_key = SecretKey.generate() if token is None else None
    async with (
        open_mesh(SecretKey.generate(), mesh_key=mesh_key, invite=token) as mesh,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(show, mesh, parts)
        if token is None:
            print(mesh.invite(scope=Scope.CLIENT, not_after_unix=None), flush=True)
        while await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            parts[mesh.peer] = parts.get(mesh.peer, 0) + 1
            mesh.announce(parts[mesh.peer].to_bytes(8))
            print(f"total {sum(parts.values())}", flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(
        main, sys.argv[1] if len(sys.argv) > 1 else None, restrict_keyboard_interrupt_to_checkpoints=True
    )

"""A chat room: what one member types, all others see.

python examples/chat.py            founds a mesh and prints an invite
python examples/chat.py TOKEN      joins it
"""

import sys

import trio

from libmesh import Mesh, Scope, SecretKey, open_mesh


async def listen(mesh: Mesh, task_status: trio.TaskStatus[None]) -> None:
    async with mesh.subscribe("chat") as posts:
        task_status.started()
        async for post in posts:
            print(f"{post.author[-6:]}: {post.data.decode(errors='replace')}", flush=True)


async def main(token: str | None) -> None:
    mesh_key = SecretKey.generate() if token is None else None
    async with (
        open_mesh(SecretKey.generate(), mesh_key=mesh_key, invite=token) as mesh,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(listen, mesh)
        print(f"you are {mesh.peer[-6:]}", flush=True)
        if token is None:
            print(mesh.invite(scope=Scope.CLIENT, not_after_unix=None), flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            await mesh.publish("chat", line.strip().encode())
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(
        main, sys.argv[1] if len(sys.argv) > 1 else None, restrict_keyboard_interrupt_to_checkpoints=True
    )

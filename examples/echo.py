"""A service that echoes, and a client of it.

python examples/echo.py serve               prints an invite
python examples/echo.py call TOKEN hello    prints what comes back
"""

import sys

import trio

import libmesh


async def echo(stream: libmesh.Stream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def serve() -> None:
    key, mesh_key = libmesh.SecretKey.generate(), libmesh.SecretKey.generate()
    async with libmesh.open_mesh(key, mesh_key=mesh_key) as mesh:
        with mesh.offer("echo", echo):
            print(mesh.invite(scope=libmesh.Scope.CLIENT, not_after_unix=None), flush=True)
            await trio.sleep_forever()


async def call(token: str, text: str) -> None:
    (server,) = libmesh.read_invite(token).contacts
    async with (
        libmesh.open_mesh(libmesh.SecretKey.generate(), invite=token) as mesh,
        await mesh.open_service(server, "echo") as stream,
    ):
        await stream.send_all(text.encode())
        await stream.send_eof()
        print(b"".join([data async for data in stream]).decode())


if __name__ == "__main__":
    try:
        trio.run(
            {"serve": serve, "call": call}[sys.argv[1]],
            *sys.argv[2:],
            restrict_keyboard_interrupt_to_checkpoints=True,
        )
    except* KeyboardInterrupt:
        pass
    except* libmesh.MeshError as group:
        sys.exit(str(group.exceptions[0]))

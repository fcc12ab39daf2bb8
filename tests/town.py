"""Meshes of several peers in one process, for tests under virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import trio
import trio.testing

from libmesh import (
    Mesh,
    PeerState,
    Scope,
    SecretKey,
    open_mesh,
)
from libmesh.testing.memory import MemoryHub, MemoryNetwork
from tests.members import NOW, key, seed

MESH_KEY = key(100)


class Town:
    """Opens meshes on one hub; all are closed at the end, the last one first."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.hub = MemoryHub()
        self._stack = stack
        self.networks: dict[int, MemoryNetwork] = {}

    async def network(self, number: int) -> MemoryNetwork:
        self.networks[number] = await self._stack.enter_async_context(self.hub.open_network(seed(number)))
        return self.networks[number]

    async def found(self, number: int = 1, *, mesh_key: SecretKey = MESH_KEY) -> Mesh:
        return await self._open(number, mesh_key=mesh_key)

    async def join(self, number: int, token: str, *, wait: bool = True) -> Mesh:
        return await self._open(number, invite=token, wait=wait)

    async def _open(self, number: int, **arguments: object) -> Mesh:
        opening = open_mesh(
            key(number),
            network=await self.network(number),
            wall_clock=clock,
            **arguments,  # type: ignore[arg-type]
        )
        return await self._stack.enter_async_context(opening)

    async def of(self, count: int) -> list[Mesh]:
        """A mesh of that many; the first one founded it."""
        founder = await self.found(1)
        token = founder.invite(scope=Scope.CLIENT, not_after_unix=None)
        meshes = [founder, *[await self.join(number, token) for number in range(2, count + 1)]]
        await settled(meshes)
        return meshes


def clock() -> float:
    return NOW + trio.current_time()


@asynccontextmanager
async def town() -> AsyncIterator[Town]:
    async with AsyncExitStack() as stack:
        yield Town(stack)


async def until(condition: Callable[[], bool], limit: float = 60) -> float:
    """How many virtual seconds it takes."""
    started = trio.current_time()
    with trio.fail_after(limit):
        while not condition():  # noqa: ASYNC110 - virtual time, and several meshes at once
            await trio.sleep(0.05)
    return trio.current_time() - started


def states(mesh: Mesh) -> dict[str, str]:
    return {str(entry.peer): entry.state.value for entry in mesh.view.peers}


def state(mesh: Mesh, other: Mesh) -> PeerState | None:
    entry = mesh.view.get(other.peer)
    return None if entry is None else entry.state


async def settled(meshes: list[Mesh], limit: float = 60) -> float:
    """Until each sees all others alive and is connected to them."""

    def complete() -> bool:
        return all(
            len([e for e in mesh.view.peers if e.state is PeerState.ALIVE and e.path]) == len(meshes) - 1
            for mesh in meshes
        )

    return await until(complete, limit)


def client_invite(mesh: Mesh) -> str:
    return mesh.invite(scope=Scope.CLIENT, not_after_unix=None)

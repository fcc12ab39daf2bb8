"""Keys, credentials and records from fixed seeds, for the tests of the library."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from libmesh import keys, wire
from libmesh.core.announcement import Announcement, Record
from libmesh.core.credentials import Authority, Credential
from libmesh.core.membership import Membership
from libmesh.identity import SecretKey
from libmesh.net.base import Stream
from libmesh.peers import PeerId, Scope, Service
from libmesh.testing.memory import MemoryHub

NOW = 1_800_000_000
"""Seconds since the epoch, at which the tests of the library take place."""

HOUR = 3600


def seed(number: int) -> bytes:
    """The secret seed with this number."""
    return number.to_bytes(32, "big")


def key(number: int) -> SecretKey:
    return SecretKey(seed(number))


def peer(number: int) -> PeerId:
    return keys.peer_id_of(keys.public_key(seed(number)))


MESH = Authority.of_mesh(seed(100))
"""The mesh that everybody here is in."""

OTHER_MESH = Authority.of_mesh(seed(200))


def credential(number: int, *, mesh: Authority = MESH) -> Credential:
    """Signed in by the mesh key itself."""
    return mesh.admit(keys.public_key(seed(number)))


def invited(
    number: int, *scopes: Scope, not_after_unix: int | None = None, mesh: Authority = MESH
) -> Credential:
    """Signed in through a chain of invites with these scopes."""
    authority = mesh
    for position, scope in enumerate(scopes):
        authority = authority.delegate(scope=scope, not_after_unix=not_after_unix, seed=seed(1000 + position))
    return authority.admit(keys.public_key(seed(number)))


def announcement(number: int, **changes: object) -> Announcement:
    fields: dict[str, object] = {
        "peer": peer(number),
        "credential": credential(number),
        "incarnation": 1,
        "sequence": 1,
        "services": (Service(name="echo"),),
        "addresses": ("/ip4/192.0.2.1/tcp/4001",),
        "attributes": b"opaque",
    }
    return Announcement(**(fields | changes))  # type: ignore[arg-type]


def record(number: int, **changes: object) -> Record:
    """An announcement of peer `number`, signed by it."""
    return wire.seal(announcement(number, **changes), seed(number))


def membership(number: int, **changes: object) -> Membership:
    """The machine of peer `number`, which knows nobody yet."""
    me = announcement(number, sequence=0, **changes)
    return Membership(me, mesh_id=MESH.mesh_id, seal=partial(wire.seal, seed=seed(number)))


@asynccontextmanager
async def memory_streams(protocol: str = "/test/1") -> AsyncIterator[tuple[Stream, Stream]]:
    """Two ends of a stream between peers 1 and 2; the first one opened it."""
    hub = MemoryHub()
    async with hub.open_network(seed(1)) as one, hub.open_network(seed(2)) as two:
        await one.connect(two.peer, two.addresses())
        arrived, end = trio.open_memory_channel[Stream](0)

        async def hold(stream: Stream) -> None:
            await arrived.send(stream)
            await trio.sleep_forever()

        two.set_handler(protocol, hold, admitted_only=False)
        near = await one.open_stream(two.peer, protocol)
        yield near, await end.receive()

"""Members on one LAN find each other without anybody's help, and take the short way there."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from libmesh.errors import MeshError
from libmesh.net.discovery import mdns
from libmesh.net.discovery.mdns import LanDiscovery
from libmesh.net.discovery.mdns_wire import is_marked
from libmesh.net.libp2p import Libp2pNetwork
from libmesh.peers import MeshId, PathKind, PeerId

if TYPE_CHECKING:
    from libmesh.driver import Driver
    from libmesh.mesh import Mesh

log = logging.getLogger(__name__)

MAX_FOUND = 64
"""Peers found and not yet dealt with; more are left out until they say again that they are there."""

DIAL_LIMIT = 15.0
"""Seconds for one peer found, its admission included."""


@dataclass(frozen=True, slots=True)
class Nearby:
    """What a look around the LAN found.

    Attributes:
        known: of each mesh that was asked about, how many nodes are here; those with none are left out.
        others: nodes of other meshes. Which ones, only their members can tell.
    """

    known: dict[MeshId, int]
    others: int


async def look_around(known: Iterable[MeshId], *, seconds: float = 3.0) -> Nearby:
    """Which of the `known` meshes have nodes on the LANs that this machine is on.

    Asks by multicast DNS, and waits for `seconds`. Where that is not possible, finds nothing.
    """
    try:
        notices = await mdns.look_around(seconds)
    except OSError as exc:
        log.debug("cannot look around on the LAN: %s", exc.strerror)
        notices = []
    meshes = tuple(dict.fromkeys(known))
    found = [next((mesh for mesh in meshes if is_marked(notice.mesh, mesh)), None) for notice in notices]
    counts = {mesh: found.count(mesh) for mesh in meshes}
    return Nearby({mesh: count for mesh, count in counts.items() if count}, found.count(None))


async def follow_lan(mesh: Mesh, driver: Driver) -> None:
    """Connect to members on the LAN to whom there is no direct path, until cancelled.

    Tells them that this node is here, unless it only follows: it would cost each of them a connection.
    Does nothing on a network that is not libp2p's: it has no LAN.
    """
    network = driver.network
    if not isinstance(network, Libp2pNetwork):
        return
    send, found = trio.open_memory_channel[tuple[PeerId, tuple[str, ...]]](MAX_FOUND)

    def take(peer: PeerId, addresses: tuple[str, ...]) -> None:
        try:
            send.send_nowait((peer, addresses))
        except trio.WouldBlock:
            log.debug("too many peers on the LAN at once; one was left out")

    discovery = LanDiscovery(
        mesh.mesh_id, mesh.peer, lambda: network.port, take, silent=lambda: mesh.following
    )
    network.watchers.append(discovery.again)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(discovery.run)
            async for peer, addresses in found:
                with trio.move_on_after(DIAL_LIMIT):
                    await _meet(driver, peer, addresses)
    finally:
        network.watchers.remove(discovery.again)


@asynccontextmanager
async def lan_of(mesh: Mesh, driver: Driver, enabled: bool) -> AsyncIterator[None]:
    """Be found on the LAN, and find others, for as long as the context lasts; nothing if not `enabled`."""
    async with trio.open_nursery() as nursery:
        if enabled:
            nursery.start_soon(follow_lan, mesh, driver)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()


async def _meet(driver: Driver, peer: PeerId, addresses: tuple[str, ...]) -> None:
    """Have a direct connection to a peer that says that it is here."""
    path = driver.network.path(peer)
    if path is not None and path.kind is not PathKind.RELAYED:
        return
    machine = driver.membership
    surplus = machine.following or (machine.believes(peer) and not machine.wanted(peer))
    if path is None and surplus and driver.admission.anybody:
        return
    if not (addresses := driver.admission.allowed(peer, addresses)):
        return
    log.debug("on this LAN: %s at %s", peer, " ".join(addresses))
    try:
        if path is None:
            await driver.admission.connect(peer, addresses)
        else:
            await driver.network.dial(peer, addresses[0])
    except MeshError as exc:
        log.debug("found %s on this LAN, and cannot reach it: %s", peer, exc)

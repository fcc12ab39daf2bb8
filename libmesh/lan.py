"""Members on one LAN find each other without anybody's help, and take the short way there."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from libmesh.errors import MeshError
from libmesh.net.discovery.mdns import LanDiscovery
from libmesh.net.libp2p import Libp2pNetwork
from libmesh.peers import PathKind, PeerId

if TYPE_CHECKING:
    from libmesh.driver import Driver
    from libmesh.mesh import Mesh

log = logging.getLogger(__name__)

MAX_FOUND = 64
"""Peers found and not yet dealt with; more are left out until they say again that they are there."""

DIAL_LIMIT = 15.0
"""Seconds for one peer found, its admission included."""


async def follow_lan(mesh: Mesh, driver: Driver) -> None:
    """Connect to members on the LAN to whom there is no direct path, until cancelled.

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

    discovery = LanDiscovery(mesh.mesh_id, mesh.peer, lambda: network.port, take)
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
    log.debug("on this LAN: %s at %s", peer, " ".join(addresses))
    try:
        if path is None:
            await driver.admission.connect(peer, addresses)
        else:
            await driver.network.dial(peer, addresses[0])
    except MeshError as exc:
        log.debug("found %s on this LAN, and cannot reach it: %s", peer, exc)

"""Which relays a member keeps places at, and how it tells others that it is one."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from libmesh.core.plan import lot
from libmesh.core.ways import is_circuit
from libmesh.meeting import meet_at_relays
from libmesh.net.base import Approach, Network, Stream
from libmesh.net.relay_client import split_relay
from libmesh.peers import PathKind, PeerId, PeerState, PeerView

if TYPE_CHECKING:
    from libmesh.driver import Driver
    from libmesh.mesh import Mesh

log = logging.getLogger(__name__)

RELAY_SERVICE = "libmesh/relay"
"""The service that a member announces to say: I can be dialled, and relay for members. Nothing is ever sent to it."""

MOST = 8
"""Relays that a node considers, of all that members offer."""

LOOK_EVERY = 2.0
"""Seconds between looks at whether others reach this node."""

_NEAR = 0.005  # seconds: differences of a round trip below this do not make a relay better


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayUse:
    """How a member uses relays, and is one.

    Attributes:
        known: multiaddrs of relays with `/p2p/…`, instead of those that members are. Best first.
        keep: keep places at relays, so that others reach this node through them. Costs nothing where there is no relay.
        offer: tell members that this node relays for them. Only for nodes that can be dialled, and whose network was
            opened with limits for it (`Libp2pConfig.relay`).
        volunteer: offer it whenever others have been seen to reach this node without help, and take it back when not.
    """

    known: tuple[str, ...] = ()
    keep: bool = True
    offer: bool = False
    volunteer: bool = False

    def __post_init__(self) -> None:
        """Raise `ValueError` for an address that names no relay."""
        for address in self.known:
            split_relay(address)


def relays_among(peers: Iterable[PeerView], me: PeerId, known: Iterable[PeerId] = ()) -> tuple[str, ...]:
    """The multiaddrs of the relays that members are, best first: near ones first, and those equally near by lot.

    The lot is another one for each node, so that they spread over the relays. Where there are more than `MOST`, those
    that are `known` are not left out for others: a place there would be lost.
    """
    known = set(known)

    def rank(peer: PeerView) -> tuple[bool, int, float]:
        path, new, chance = peer.path, peer.peer not in known, lot(me, peer.peer)
        if path is None or path.kind is PathKind.RELAYED:
            return new, 64, chance
        return new, (32 if path.rtt is None else int(path.rtt / _NEAR).bit_length()), chance

    offering = [
        peer
        for peer in peers
        if peer.state in (PeerState.ALIVE, PeerState.SUSPECT)
        and any(service.name == RELAY_SERVICE for service in peer.services)
    ]
    return tuple(
        f"{address}/p2p/{peer.peer}"
        for peer in sorted(offering, key=rank)[:MOST]
        for address in peer.addresses
        if not is_circuit(address)
    )


async def follow_relays(mesh: Mesh, network: Network, use: RelayUse, approach: Approach) -> None:
    """Keep places at the relays that are configured, or else at those that members are, until cancelled."""
    if not use.keep:
        return
    if use.known:
        network.set_relays(use.known, approach)
        return
    told: tuple[str, ...] = ()
    async with mesh.watch() as views:
        async for view in views:
            known = {split_relay(address)[0] for address in told}
            relays = () if mesh.following else relays_among(view.peers, view.me, known)
            if set(relays) != set(told):  # another order is no reason to move
                told = relays
                network.set_relays(relays, approach)


async def volunteer(mesh: Mesh, network: Network) -> None:
    """Offer to be a relay while others reach this node without help, until cancelled."""
    offered = False
    with ExitStack() as offer:
        while True:
            standing = network.reaching().standing
            if standing == "public" and not offered and not mesh.following:
                log.info("others reach this node: it relays for members who need that")
                offer.enter_context(mesh.offer(RELAY_SERVICE, _decline))
                offered = True
            elif standing == "private" and offered:
                offer.close()
                offered = False
            await trio.sleep(LOOK_EVERY)


async def _decline(stream: Stream) -> None:
    stream.reset()


@asynccontextmanager
async def relays_of(mesh: Mesh, driver: Driver, use: RelayUse) -> AsyncIterator[None]:
    """Use relays, and offer to be one, as configured, for as long as the context lasts."""
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        if use.offer:
            stack.enter_context(mesh.offer(RELAY_SERVICE, _decline))
        elif use.volunteer:
            nursery.start_soon(volunteer, mesh, driver.network)
        nursery.start_soon(follow_relays, mesh, driver.network, use, driver.approach)
        if use.keep:
            nursery.start_soon(meet_at_relays, mesh, driver)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()
            driver.network.set_relays(())

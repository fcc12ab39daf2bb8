"""All that one node does with relays: uses some to reach others, is reached through some, and may be one itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from libmesh.core.relay_desk import RelayLimits
from libmesh.core.ways import ip_of
from libmesh.errors import NetworkError
from libmesh.net import tcp
from libmesh.net.relay_client import CIRCUIT, RelayClient
from libmesh.net.relay_server import RelayServer
from libmesh.net.rendezvous import RendezvousClient, RendezvousPoint
from libmesh.net.underlay import Underlay
from libmesh.peers import Path, PathKind, PeerId


class Relaying:
    """The relay parts of one adapter.

    Args:
        underlay: the adapter.
        seed: this node's Ed25519 seed.
        limits: what this node gives as a relay; `None` to be none.
        open_to_all: as a relay, serve whoever comes, not members only.
        changed: called when other circuits lead here than before.

    Attributes:
        client: uses relays.
        server: is one; `None` if this node is not to be.
        point: is where others leave word, on a relay.
        rendezvous: leaves word and asks at other points.
    """

    def __init__(
        self,
        underlay: Underlay,
        seed: bytes,
        limits: RelayLimits | None,
        *,
        open_to_all: bool = False,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._underlay = underlay
        self.client = RelayClient(underlay, changed=changed)
        self.rendezvous = RendezvousClient(underlay, seed)
        self.server: RelayServer | None = None
        self.point: RendezvousPoint | None = None
        if limits is not None:
            self.point = RendezvousPoint(underlay, open_to_all=open_to_all)
            self.server = RelayServer(
                underlay, seed, limits, addresses=self._own_addresses, open_to_all=open_to_all
            )

    def _own_addresses(self) -> tuple[str, ...]:
        """For clients to build circuits from: without those of circuits to us, and loopback ones only if there are no others."""
        direct = tuple(address for address in self._underlay.addresses() if CIRCUIT not in address)
        told = tuple(a for a in direct if (ip := ip_of(a)) is None or not ip.is_loopback)
        return told or direct

    def circuits(self) -> tuple[str, ...]:
        """See `RelayClient.circuits`."""
        return self.client.circuits()

    def disconnected(self, peer: PeerId) -> None:
        """The last connection to `peer` is gone."""
        self.client.disconnected(peer)
        if self.server is not None:
            self.server.disconnected(peer)

    async def dial(self, peer: PeerId, address: str) -> Path:
        """See `Network.dial`, for a circuit address."""
        try:
            with trio.fail_after(tcp.DIAL_LIMIT):
                opener = partial(self.client.open_circuit, peer, address)
                where = address.partition(CIRCUIT)[0] + CIRCUIT
                return await self._underlay.make(opener, peer=peer, address=where, kind=PathKind.RELAYED)
        except trio.TooSlowError as exc:
            raise NetworkError(f"no answer within {tcp.DIAL_LIMIT:.0f} s") from exc
        except ValueError as exc:
            raise NetworkError(str(exc)) from exc

    async def run(self) -> None:
        """Keep places at relays, and serve as one, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.client.run)
            if self.server is not None:
                nursery.start_soon(self.server.run)

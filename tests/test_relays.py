"""Which relays a member uses: those that were named, or those that members are; and strangers that relay for everybody."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import trio

from libmesh import (
    Libp2pConfig,
    Mesh,
    MeshConfig,
    PathKind,
    RelayLimits,
    RelayUse,
    Scope,
    open_libp2p_network,
    open_mesh,
)
from libmesh.net.libp2p import Libp2pNetwork
from libmesh.peers import Path, PeerId, PeerState, PeerView, Service
from libmesh.relays import MOST, RELAY_SERVICE, relays_among
from tests.members import key, peer, seed

HOSTS = ("127.0.0.1",)
HERE = "/ip4/192.0.2.1/tcp/4001"


def relay(number: int, *, rtt: float | None = None, state: PeerState = PeerState.ALIVE) -> PeerView:
    path = None if rtt is None else Path(kind=PathKind.DIRECT, address=HERE, rtt=rtt)
    return PeerView(
        peer=peer(number),
        scope=Scope.CLIENT,
        state=state,
        services=(Service(name=RELAY_SERVICE),),
        attributes=b"",
        addresses=(HERE, f"{HERE}/p2p/{peer(99)}/p2p-circuit"),
        path=path,
        since_unix=0,
        incarnation=1,
    )


def named(*numbers: int) -> tuple[str, ...]:
    return tuple(f"{HERE}/p2p/{peer(number)}" for number in numbers)


def test_near_relays_come_first_and_far_unknown_and_unreached_ones_follow() -> None:
    peers = [relay(4), relay(3, rtt=0.2), relay(2, rtt=0.02), relay(1, rtt=0.001)]
    assert relays_among(peers, peer(50)) == named(1, 2, 3, 4)


def test_only_live_members_that_offer_it_are_relays() -> None:
    peers = [relay(1, state=PeerState.DEAD), relay(2, state=PeerState.LEFT), replace(relay(3), services=())]
    assert relays_among(peers, peer(50)) == ()


def test_members_spread_over_relays_that_are_equally_near() -> None:
    peers = [relay(number, rtt=0.001) for number in range(1, 6)]
    assert len({relays_among(peers, peer(number))[0] for number in range(50, 90)}) == 5


def test_of_many_relays_those_in_use_are_not_left_out() -> None:
    far = [relay(number, rtt=0.5) for number in range(1, MOST + 1)]
    near = [relay(number, rtt=0.001) for number in range(20, 30)]
    before = relays_among(far, peer(50))
    known = {PeerId(address.rpartition("/p2p/")[2]) for address in before}
    assert set(relays_among([*near, *far], peer(50), known)) == set(before)
    assert set(relays_among([*near, *far], peer(50))).isdisjoint(before)


def test_what_names_no_relay_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="names no relay"):
        RelayUse(known=(HERE,))


def network_of(mesh: Mesh) -> Libp2pNetwork:
    network = mesh._driver.network
    assert isinstance(network, Libp2pNetwork)
    return network


async def circuits(mesh: Mesh) -> tuple[str, ...]:
    """The circuits that lead to it, once there are any."""
    with trio.fail_after(60):
        while not network_of(mesh).relaying.circuits():  # noqa: ASYNC110 - told in an event that the mesh takes
            await trio.sleep(0.02)
    return network_of(mesh).relaying.circuits()


async def test_members_are_reached_through_members_that_relay() -> None:
    opened = partial(open_mesh, listen=Libp2pConfig(hosts=HOSTS, relay=RelayLimits()))
    offering = MeshConfig(relays=RelayUse(offer=True))
    async with opened(key(1), mesh_key=key(100), config=offering) as founder:
        token = founder.invite(scope=Scope.CLIENT, not_after_unix=None)
        async with opened(key(2), invite=token) as one, opened(key(3), invite=token) as other:
            (circuit,) = await circuits(one)
            assert founder.peer in circuit
            await network_of(other).disconnect(one.peer)
            path = await network_of(other).dial(one.peer, circuit)
            assert path.kind is PathKind.RELAYED


async def test_a_stranger_that_relays_for_everybody_may_be_named_and_is_not_bothered_twice() -> None:
    open_to_all = Libp2pConfig(hosts=HOSTS, relay=RelayLimits(), relay_open=True)
    async with open_libp2p_network(seed(77), open_to_all) as stranger:
        where = f"{stranger.addresses()[0]}/p2p/{stranger.peer}"
        config = MeshConfig(relays=RelayUse(known=(where,)))
        listen = Libp2pConfig(hosts=HOSTS)
        async with open_mesh(key(1), mesh_key=key(100), listen=listen, config=config) as mesh:
            assert await circuits(mesh) == (f"{where}/p2p-circuit",)
            connection = network_of(mesh)._connections.of(stranger.peer)[0]
            await mesh._driver.approach(stranger.peer, stranger.addresses())
            assert network_of(mesh)._connections.of(stranger.peer) == [connection]


async def test_a_relay_that_turns_out_to_be_a_member_is_asked_again() -> None:
    opened = partial(open_mesh, listen=Libp2pConfig(hosts=HOSTS))
    async with opened(key(1), mesh_key=key(100)) as founder:
        token = founder.invite(scope=Scope.CLIENT, not_after_unix=None)
        async with opened(key(2), invite=token) as one:
            one._driver._foreign.update((founder.peer, peer(9)))
            await one._driver.approach(founder.peer, ())
            assert one._driver._foreign == {peer(9)}

"""The order in which the addresses of a peer are tried, and which of ours are told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libmesh.core.ways import (
    MAX_WAYS,
    PUNCH,
    Ways,
    is_circuit,
    is_websocket,
    relay_of,
    to_announce,
    to_invite,
    ways_to,
)
from libmesh.peers import PeerId

ME, THEM, RELAY = PeerId("me"), PeerId("them"), PeerId("relay")
CIRCUIT = f"/ip4/198.51.100.9/tcp/4001/p2p/{RELAY}/p2p-circuit"

PUBLIC_4, PUBLIC_6 = "/ip4/8.8.8.8/tcp/1", "/ip6/2001:4860:4860::8888/tcp/1"
HOME_4, HOME_6 = "/ip4/192.168.1.7/tcp/1", "/ip6/fd00:1::7/tcp/1"
LOCAL = "/ip4/127.0.0.1/tcp/1"
NAME = "/dns/example.com/tcp/1"


def order(addresses: list[str], mine: list[str]) -> tuple[str, ...]:
    return ways_to(THEM, addresses, me=ME, mine=mine).direct


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        pytest.param([], [PUBLIC_6, PUBLIC_4, NAME, HOME_6, HOME_4, LOCAL], id="strangers: public first"),
        pytest.param(
            ["/ip4/192.168.1.9/tcp/5"], [HOME_4, PUBLIC_6, PUBLIC_4, NAME, HOME_6, LOCAL], id="one subnet"
        ),
        pytest.param(
            ["/ip6/fd00:1::9/tcp/5"], [HOME_6, PUBLIC_6, PUBLIC_4, NAME, HOME_4, LOCAL], id="one IPv6 subnet"
        ),
        pytest.param(
            ["/ip4/8.8.8.8/tcp/5"],
            [HOME_6, HOME_4, PUBLIC_6, PUBLIC_4, NAME, LOCAL],
            id="one router's outer address",
        ),
        pytest.param(
            ["/ip4/192.168.1.7/tcp/5"],
            [LOCAL, HOME_4, PUBLIC_6, PUBLIC_4, NAME, HOME_6],
            id="one machine",
        ),
        pytest.param(
            ["/ip4/127.0.0.1/tcp/5", "/ip4/9.9.9.9/tcp/5", "/dns/me/tcp/1"],
            [PUBLIC_6, PUBLIC_4, NAME, HOME_6, HOME_4, LOCAL],
            id="loopback is everybody's and says nothing",
        ),
    ],
)
def test_near_addresses_are_tried_before_far_ones(mine: list[str], expected: list[str]) -> None:
    got = order([NAME, LOCAL, HOME_4, PUBLIC_4, HOME_6, PUBLIC_6], mine)
    assert sorted(got) == sorted(expected)
    assert [a for a in got if a != NAME] == [a for a in expected if a != NAME]


def test_ipv6_and_ipv4_alternate() -> None:
    fours = [f"/ip4/8.8.8.{n}/tcp/1" for n in range(3)]
    sixes = [f"/ip6/2001:4860::{n}/tcp/1" for n in range(1, 3)]
    assert order([*fours, *sixes], []) == (sixes[0], fours[0], sixes[1], fours[1], fours[2])


def test_websockets_come_after_what_costs_less_and_as_near() -> None:
    web_4, web_6, web_home, web_name = (
        f"{PUBLIC_4}/ws",
        f"{PUBLIC_6}/ws",
        f"{HOME_4}/ws",
        "/dns4/a/tcp/443/tls/ws",
    )
    got = order([web_4, web_6, PUBLIC_4, web_home, web_name, PUBLIC_6, HOME_4, NAME], [])
    assert got == (PUBLIC_6, PUBLIC_4, NAME, web_6, web_4, web_name, HOME_4, web_home)


@pytest.mark.parametrize(
    ("address", "is_one"),
    [
        (f"{PUBLIC_4}/ws", True),
        ("/dns4/a/tcp/443/wss/p2p/x", True),
        ("/dns4/a/tcp/443/tls/sni/b/ws", True),
        (PUBLIC_4, False),
        ("/dns/ws/tcp/1", False),
        ("/dns4/a/tcp/443/wss/p2p/x/p2p-circuit", False),
    ],
)
def test_websockets_are_known_by_their_address(address: str, is_one: bool) -> None:
    assert is_websocket(address) is is_one


def test_what_cannot_be_understood_is_tried_too() -> None:
    odd = ["/nonsense", "/ip4/not.an.ip/tcp/1", "/"]
    assert set(order(odd, [])) == set(odd)


def test_nobody_can_make_us_punch_by_announcing_it() -> None:
    assert order([PUNCH, "", "tcp", PUBLIC_4], []) == (PUBLIC_4,)


def test_circuits_are_apart_and_never_through_the_ends_themselves() -> None:
    through_me = f"/ip4/8.8.8.8/tcp/1/p2p/{ME}/p2p-circuit"
    through_them = f"/ip4/8.8.8.8/tcp/1/p2p/{THEM}/p2p-circuit"
    nobodys = "/p2p-circuit"
    found = ways_to(THEM, [through_me, CIRCUIT, PUBLIC_4, through_them, nobodys], me=ME, mine=[CIRCUIT])
    assert found == Ways((PUBLIC_4,), (CIRCUIT,), far=True)


def test_a_circuit_names_its_relay_and_the_way_to_it() -> None:
    assert relay_of(CIRCUIT) == (RELAY, "/ip4/198.51.100.9/tcp/4001")
    assert relay_of(f"/p2p/{RELAY}/p2p-circuit") == (RELAY, "")
    assert relay_of("/ip4/1.2.3.4/tcp/1/p2p-circuit") is None


@given(st.lists(st.text(max_size=20), max_size=2 * MAX_WAYS), st.lists(st.text(max_size=20), max_size=3))
def test_any_texts_are_ordered_and_bounded(addresses: list[str], mine: list[str]) -> None:
    found = ways_to(THEM, addresses, me=ME, mine=mine)
    assert len(found.direct) + len(found.circuits) <= MAX_WAYS
    assert set(found.direct) | set(found.circuits) <= set(addresses)
    assert all(map(is_circuit, found.circuits))


def test_circuits_have_places_among_the_announced_addresses() -> None:
    direct = [f"/ip4/10.0.0.{n}/tcp/1" for n in range(20)]
    circuits = [f"/ip4/8.8.8.{n}/tcp/1/p2p/{RELAY}/p2p-circuit" for n in range(6)]
    assert to_announce([*direct, *circuits], 16) == (*direct[:12], *circuits[:4])
    assert to_announce(direct, 16) == tuple(direct[:16])
    assert to_announce([direct[0], *circuits], 16) == (direct[0], *circuits)
    assert to_announce([*direct, circuits[0]], 16) == (*direct[:15], circuits[0])


def test_an_invite_has_an_address_of_each_kind_and_public_ones_first() -> None:
    public = [f"/ip6/2a00::{n}/tcp/1" for n in range(1, 6)]
    circuits = [f"/ip4/8.8.8.{n}/tcp/1/p2p/{RELAY}/p2p-circuit" for n in range(2)]
    near = [f"/ip4/192.168.{n}.1/tcp/1" for n in range(5)]
    assert to_invite([*public, *near, *circuits], 4) == (*public[:2], circuits[0], near[0])
    assert to_invite([*near, *circuits], 4) == (*circuits, *near[:2])
    assert to_invite([*near, *circuits], 2) == (circuits[0], near[0])
    assert to_invite(near, 4) == tuple(near[:4])
    assert to_invite([*public, *near], 4) == (*public[:3], near[0])
    assert to_invite([NAME, *public], 1) == (NAME,)
    assert to_invite([near[0], near[0]], 4) == (near[0],)
    assert to_invite([], 4) == ()

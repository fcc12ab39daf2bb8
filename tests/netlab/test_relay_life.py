"""Peers that only a relay can join, while relays end, come back, and fall silent behind a cable that is pulled."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack

import pytest

from tests.netlab.children import Child, ours
from tests.netlab.crowd import PATIENCE
from tests.netlab.lab import Kind, Lab, Site

pytestmark = pytest.mark.slow


def told(what: str, started: float) -> None:
    sys.stdout.write(f"{what}: {time.monotonic() - started:.1f} s\n")


def at(site: Site, relay: Child) -> str:
    return f"/ip4/{site.public}/tcp/4001/p2p/{relay.hello['peer']}"


def reaches(one: Child, other: Child, relay: str) -> None:
    """By a new circuit through that relay. One from before may be silent, and is used until that is known."""
    peer = other.hello["peer"]
    assert one.do("dial", peer=peer, address=f"{relay}/p2p-circuit")["kind"] == "relayed"
    deadline = time.monotonic() + PATIENCE
    while not one.do("echo", peer=peer, size=100_000)["same"]:
        assert time.monotonic() < deadline


def test_peers_are_reached_again_when_relays_end_come_back_or_fall_silent(lab: Lab) -> None:
    offices = [lab.site(Kind.PUBLIC, delay=0.01) for _ in range(3)]
    homes = [lab.site(Kind.SYMMETRIC, delay=0.01) for _ in range(2)]
    with ExitStack() as stack:
        first, second, third = (
            stack.enter_context(ours(office.host, number, relay=True))
            for number, office in enumerate(offices, 1)
        )
        one, other = (stack.enter_context(ours(home.host, number)) for number, home in enumerate(homes, 11))
        places = [at(office, relay) for office, relay in zip(offices, (first, second, third), strict=True)]
        for peer in (one, other):
            peer.do("relays", relays=places)
        ids = [relay.hello["peer"] for relay in (first, second, third)]
        assert other.do("held", count=2)["relays"] == ids[:2]
        reaches(one, other, places[0])

        first.end()
        started = time.monotonic()
        assert other.do("until", relays=[ids[1], ids[2]])["relays"] == [ids[1], ids[2]]
        told("a relay ended, another one in its place after", started)
        reaches(one, other, places[2])

        offices[1].cable.cut()
        started = time.monotonic()
        assert other.do("until", relays=[ids[2]])["relays"] == [ids[2]]
        told("a relay fell silent, given up after", started)

        stack.enter_context(ours(offices[0].host, 1, relay=True))
        started = time.monotonic()
        assert other.do("until", relays=[ids[0], ids[2]])["relays"] == [ids[0], ids[2]]
        told("a relay is back, used again after", started)
        reaches(one, other, places[0])

        offices[1].cable.restore()
        homes[1].cable.cut()
        time.sleep(6)
        assert other.do("until", relays=[])["relays"] == []
        homes[1].cable.restore()
        started = time.monotonic()
        back = other.do("held", count=2)["relays"]
        told("the cable is back, reachable again after", started)
        reaches(one, other, places[ids.index(back[0])])

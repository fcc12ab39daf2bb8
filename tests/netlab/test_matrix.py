"""Any two peers reach each other, however they are attached, as long as one relay is reachable; directly where TCP can.

Two peers and a relay at a time, each pair of kinds in a mesh of its own. The relay is at a port of its own, and behind a web
server's front door on port 443 for those whom nothing else is open to. Each of the two peers connects from nothing. What
path they end with is asserted; how long the first byte took is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest

from tests.netlab.crowd import Forks, LabPeer
from tests.netlab.lab import PORT, Kind, Lab, Site
from tests.netlab.web import Door, open_door

pytestmark = pytest.mark.slow

DELAY = 0.01
"""Seconds of each site's cable, one way: 40 ms from any peer to any other and back."""

INSIDE = 8443
"""Where the relay takes WebSockets, behind its front door."""

LANES = 3
"""Pairs that are tried at a time."""

DIALABLE = {Kind.PUBLIC, Kind.FORWARDED, Kind.UPNP}
PUNCHABLE = {Kind.CONE, Kind.UDP_BLOCKED}
KINDS = tuple(Kind)

Table = dict[tuple[Kind, Kind], str]


def expected(one: Kind, other: Kind) -> set[str]:
    """The kinds of path that TCP allows."""
    if Kind.ONLY_443 in (one, other):
        return {"relayed"}
    if {one, other} & DIALABLE or {one, other} <= PUNCHABLE:
        return {"direct", "punched"}
    return {"relayed"}


def test_every_kind_reaches_every_kind_and_directly_where_tcp_allows_it(lab: Lab, forks: Forks) -> None:
    offices = [lab.site(Kind.PUBLIC, delay=DELAY) for _ in range(LANES)]
    first, second = ([lab.site(kind, delay=DELAY) for kind in KINDS] for _ in range(2))
    table: Table = {}
    with ThreadPoolExecutor(LANES) as pool:
        for shift in range(len(KINDS)):  # the pairs of a round share no site
            pairs = list(zip(first, second[shift:], strict=False))
            for start in range(0, len(pairs), LANES):
                some = pairs[start : start + LANES]
                lanes = [(lab, forks, office, *pair) for office, pair in zip(offices, some, strict=False)]
                for part in pool.map(lambda lane: meet(*lane), lanes):
                    table |= part
    sys.stdout.write(drawn(table))


def meet(lab: Lab, forks: Forks, office: Site, here: Site, there: Site) -> Table:
    """What comes of two sites' peers connecting, both ways, one after the other."""
    with ExitStack() as stack:
        door = stack.enter_context(open_door(office.host, INSIDE, lab.folder))
        relay = LabPeer(
            forks, office.host, lab.folder, relay=True, websocket_port=INSIDE, announce=[door.address]
        )
        stack.enter_context(closing(relay))
        relay.up()
        one, other = (
            stack.enter_context(closing(member(lab, forks, site, relay.invite, door)))
            for site in (here, there)
        )
        one.up(), other.up()
        settle(one, here, other)
        settle(other, there, one)
        return dict((connect(one, other, here, there), connect(other, one, there, here)))


def member(lab: Lab, forks: Forks, site: Site, invite: str, door: Door) -> LabPeer:
    """A peer that has been told of its forwarded port, as its owner would."""
    announce = [f"/ip4/{site.public}/tcp/{PORT}"] if site.kind is Kind.FORWARDED else []
    return LabPeer(forks, site.host, lab.folder, invite=invite, announce=announce, trusted=str(door.trusted))


def settle(peer: LabPeer, site: Site, other: LabPeer) -> None:
    """Wait until it knows how it is reached, and the other one does."""
    if site.kind in DIALABLE:
        state = peer.until("state", lambda state: state["standing"] == "public")
        assert bool(state["mapping"]) == (site.kind is Kind.UPNP)
        where = site.public
    else:
        if site.kind is not Kind.ONLY_443:  # behind the front door nobody sees where it comes from
            peer.until("state", lambda state: state["nat"] != "unknown")
        where = "p2p-circuit"
    other.until("path", lambda path: any(where in address for address in path["addresses"]), peer=peer.id)


def connect(one: LabPeer, other: LabPeer, here: Site, there: Site) -> tuple[tuple[Kind, Kind], str]:
    """Connect from nothing; the pair, and what came of it."""
    kinds = here.kind, there.kind
    got = one.ask("connect", peer=other.id)
    assert "error" not in got, f"{kinds}: {got}\n{one.words()}\n{other.words()}"
    wanted = expected(*kinds)
    path = one.until("path", lambda path: path["kind"] in wanted, peer=other.id)
    way = path["kind"] if path["kind"] == got["kind"] else f"{got['kind']} → {path['kind']}"
    return kinds, f"{way} {got['first_byte'] * 1000:.0f} ms"


def drawn(table: Table) -> str:
    """As text, a row for each kind that connects."""
    rows: list[Iterable[str]] = [("from \\ to", *(kind.value for kind in KINDS))]
    rows += [(one.value, *(table.get((one, other), "") for other in KINDS)) for one in KINDS]
    return "\n" + "\n".join("".join(f"{cell:<26}" for cell in row) for row in rows) + "\n"

"""IPv6: taken where both have it, and enough where there is nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from tests.netlab.crowd import Forks, LabPeer
from tests.netlab.lab import Host, Kind, Lab

pytestmark = pytest.mark.slow

DELAY = 0.01


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, forks: Forks, lab: Lab, host: Host, **options: object) -> LabPeer:
    return stack.enter_context(closing(LabPeer(forks, host, lab.folder, **options))).up()  # type: ignore[arg-type]


def test_of_two_ways_as_good_the_one_by_ipv6_is_taken(lab: Lab, forks: Forks, stack: ExitStack) -> None:
    office, other = (lab.site(Kind.PUBLIC, delay=DELAY, v6=True) for _ in range(2))
    founder = start(stack, forks, lab, office.host)
    member = start(stack, forks, lab, other.host, invite=founder.invite)
    member.until("path", lambda path: path["addresses"], peer=founder.id)
    assert "error" not in member.ask("connect", peer=founder.id)
    address = member.until("path", lambda path: path["kind"] == "direct", peer=founder.id)["address"]
    assert address.startswith((f"/ip6/{office.host.six}/tcp/", f"/ip6/{other.host.six}/tcp/")), address


def test_behind_one_router_peers_with_nothing_but_ipv6_reach_each_other_and_the_world(
    lab: Lab, forks: Forks, stack: ExitStack
) -> None:
    office, home = lab.site(Kind.PUBLIC, delay=DELAY, v6=True), lab.site(Kind.CONE, hosts=2, v6=True)
    for host in home.hosts:
        host.namespace.ip(f"addr del {host.address}/24 dev {host.device}")
    founder = start(stack, forks, lab, office.host, relay=True)
    one, other = (start(stack, forks, lab, host, invite=founder.invite) for host in home.hosts)
    one.until("path", lambda path: path["addresses"], peer=other.id)
    for asked in (founder, other):
        assert "error" not in one.ask("connect", peer=asked.id)
        path = one.until("path", lambda path: path["kind"] == "direct", peer=asked.id)
        assert path["address"].startswith("/ip6/"), path


def test_a_firewall_without_translation_keeps_strangers_out_and_punches_open(
    lab: Lab, forks: Forks, stack: ExitStack
) -> None:
    office = lab.site(Kind.PUBLIC, delay=DELAY, v6=True)
    homes = [lab.site(Kind.SYMMETRIC, delay=DELAY, v6=True) for _ in range(2)]
    founder = start(stack, forks, lab, office.host, relay=True)
    one, other = (start(stack, forks, lab, home.host, invite=founder.invite) for home in homes)
    one.until("echo", lambda answer: "error" not in answer, peer=other.id)
    path = one.until("path", lambda path: path["kind"] in ("direct", "punched"), peer=other.id)
    assert "/ip6/" in path["address"]

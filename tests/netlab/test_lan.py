"""Members behind one router: they take the short way, and find each other when there is nothing but the LAN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from tests.netlab.crowd import Forks, LabPeer
from tests.netlab.lab import Host, Kind, Lab

pytestmark = pytest.mark.slow


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, forks: Forks, lab: Lab, host: Host, **options: object) -> LabPeer:
    return stack.enter_context(closing(LabPeer(forks, host, lab.folder, **options))).up()  # type: ignore[arg-type]


def test_two_behind_one_router_find_the_way_over_the_lan(lab: Lab, forks: Forks, stack: ExitStack) -> None:
    office, home = lab.site(Kind.PUBLIC, delay=0.01), lab.site(Kind.CONE, hosts=2)
    founder = start(stack, forks, lab, office.host, relay=True)
    one, other = (start(stack, forks, lab, host, invite=founder.invite) for host in home.hosts)
    one.until("path", lambda path: path["addresses"], peer=other.id)
    assert "error" not in one.ask("connect", peer=other.id)
    path = one.until("path", lambda path: path["kind"] == "direct", peer=other.id)
    assert path["address"].startswith("/ip4/192.168.1.")


def test_members_on_a_lan_find_each_other_without_the_internet(
    lab: Lab, forks: Forks, stack: ExitStack
) -> None:
    office, home = lab.site(Kind.PUBLIC), lab.site(Kind.CONE, hosts=3)
    founder = start(stack, forks, lab, office.host)
    start(stack, forks, lab, home.hosts[2], lan=True)  # of another mesh
    one = start(stack, forks, lab, home.hosts[0], invite=founder.invite, lan=True)
    one.until("state", lambda state: state["peers"] == 1)
    home.cable.cut()
    founder.close()
    newcomer = start(stack, forks, lab, home.hosts[1], invite=founder.invite, lan=True)
    path = newcomer.until("path", lambda path: path["kind"] == "direct", peer=one.id)
    assert path["address"].startswith("/ip4/192.168.1.10/")
    assert newcomer.ask("state")["peers"] == 2  # the founder is known of, and nobody of the other mesh

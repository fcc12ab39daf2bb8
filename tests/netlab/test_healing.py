"""What happens to networks: routers reboot, addresses change, cables are pulled, relays are killed. All comes back."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from tests.netlab.children import ours
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


def reaches(one: LabPeer, other: LabPeer, *kinds: str) -> None:
    """Wait until a byte comes back over a path of one of these kinds."""
    one.until("echo", lambda answer: "error" not in answer and answer["kind"] in kinds, peer=other.id)


def test_a_mapping_comes_back_after_the_router_s_reboot(lab: Lab, forks: Forks, stack: ExitStack) -> None:
    office, home = lab.site(Kind.PUBLIC, delay=DELAY), lab.site(Kind.UPNP, delay=DELAY)
    founder = start(stack, forks, lab, office.host, relay=True)
    member = start(stack, forks, lab, home.host, invite=founder.invite)
    member.until("state", lambda state: state["standing"] == "public")
    home.reboot()
    reaches(member, founder, "direct")
    outsider = start(stack, forks, lab, lab.site(Kind.SYMMETRIC, delay=DELAY).host, invite=founder.invite)
    # From behind a symmetric NAT a punch comes through only where a mapping is: it proves as much as a dial.
    reaches(outsider, member, "direct", "punched")


@pytest.mark.parametrize("kind", [Kind.CONE, Kind.PUBLIC])
def test_after_a_change_of_address_all_is_connected_again(
    lab: Lab, forks: Forks, stack: ExitStack, kind: Kind
) -> None:
    office, home = lab.site(Kind.PUBLIC, delay=DELAY), lab.site(kind, delay=DELAY)
    founder = start(stack, forks, lab, office.host, relay=True)
    member = start(stack, forks, lab, home.host, invite=founder.invite)
    reaches(founder, member, "direct", "punched")
    home.renumber()
    reaches(founder, member, "direct", "punched")
    reaches(member, founder, "direct", "punched")


def test_a_cable_that_was_pulled_and_put_back_is_a_pause_only(
    lab: Lab, forks: Forks, stack: ExitStack
) -> None:
    office, home = lab.site(Kind.PUBLIC, delay=DELAY), lab.site(Kind.CONE, delay=DELAY)
    founder = start(stack, forks, lab, office.host, relay=True)
    member = start(stack, forks, lab, home.host, invite=founder.invite)
    reaches(founder, member, "direct")
    home.cable.cut()
    founder.until("path", lambda path: path["kind"] is None, peer=member.id)
    home.cable.restore()
    reaches(member, founder, "direct")
    reaches(founder, member, "direct")


def test_a_relay_that_dies_is_replaced_by_another(lab: Lab, forks: Forks, stack: ExitStack) -> None:
    offices = [lab.site(Kind.PUBLIC, delay=DELAY) for _ in range(2)]
    homes = [lab.site(Kind.SYMMETRIC, delay=DELAY) for _ in range(2)]
    first = start(stack, forks, lab, offices[0].host, relay=True)
    start(stack, forks, lab, offices[1].host, relay=True, invite=first.invite)
    one, other = (start(stack, forks, lab, home.host, invite=first.invite) for home in homes)
    for peer in (one, other):
        peer.until("state", lambda state: sum("p2p-circuit" in address for address in state["addresses"]) > 1)
    reaches(one, other, "relayed")
    first.close()
    reaches(one, other, "relayed")
    reaches(other, one, "relayed")


def test_members_whose_addresses_all_changed_find_each_other_by_a_relay_that_knows_no_mesh(
    lab: Lab, forks: Forks, stack: ExitStack
) -> None:
    office, *homes = (lab.site(Kind.PUBLIC, delay=DELAY) for _ in range(3))
    founder = start(stack, forks, lab, homes[0].host, seed=1)
    member = start(stack, forks, lab, homes[1].host, seed=2, invite=founder.invite)
    reaches(member, founder, "direct")
    for home, peer in zip(homes, (founder, member), strict=True):
        peer.close()
        home.renumber()
    relay = stack.enter_context(ours(office.host, 1, relay=True))
    known = [f"/ip4/{office.public}/tcp/4001/p2p/{relay.hello['peer']}"]
    stale = founder.invite
    founder = start(stack, forks, lab, homes[0].host, seed=1, relays=known)
    member = start(stack, forks, lab, homes[1].host, seed=2, invite=stale, relays=known)
    reaches(member, founder, "direct")


def test_a_tunnel_keeps_its_port_through_all_that_happens_to_the_network(
    lab: Lab, forks: Forks, stack: ExitStack
) -> None:
    offices = [lab.site(Kind.PUBLIC, delay=DELAY) for _ in range(2)]
    homes = [lab.site(kind, delay=DELAY) for kind in (Kind.CONE, Kind.SYMMETRIC)]
    first = start(stack, forks, lab, offices[0].host, relay=True)
    start(stack, forks, lab, offices[1].host, relay=True, invite=first.invite)
    one, other = (start(stack, forks, lab, home.host, invite=first.invite) for home in homes)
    for peer in (one, other):
        peer.until("state", lambda state: sum("p2p-circuit" in address for address in state["addresses"]) > 1)
    one.until("path", lambda path: path["addresses"], peer=other.id)
    port = one.ask("tunnel", peer=other.id)["port"]

    def works(after: str) -> None:
        started = time.monotonic()
        one.until("through", lambda answer: answer["came"], port=port)
        sys.stdout.write(f"{after}: the tunnel works after {time.monotonic() - started:.1f} s\n")

    works("at first")
    homes[0].reboot()
    works("the router rebooted")
    homes[1].renumber()
    works("the other side has another address")
    first.close()
    works("a relay was killed")
    homes[0].cable.cut()
    time.sleep(10)
    homes[0].cable.restore()
    works("a cable was pulled for 10 s")

"""Members behind one router: they take the short way, and find each other when there is nothing but the LAN."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
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


def test_join_lan_joins_what_is_there_and_tells_what_else_is(
    lab: Lab, forks: Forks, stack: ExitStack
) -> None:
    home = lab.site(Kind.CONE, hosts=3)
    founder = start(stack, forks, lab, home.hosts[0], lan=True)
    start(stack, forks, lab, home.hosts[1], lan=True)  # of another mesh
    program = [sys.executable, "-m", "libmesh_node", "--join", "lan", "--client", "--data-dir"]
    alone = home.hosts[2].run(*program, str(lab.folder / "uninvited"), limit=90)
    assert alone.returncode == 1
    assert "2 nodes of other meshes on this LAN; an invite is needed" in alone.stderr
    joining = home.hosts[2].popen(
        *program, str(lab.folder / "invited"), "--join", founder.invite, stderr=subprocess.PIPE, text=True
    )
    with joining:
        try:
            assert joining.stderr is not None
            said = list(iter_until(joining.stderr, "joined as"))
        finally:
            joining.kill()
    assert any("1 node of the mesh" in line for line in said)
    assert any("1 node of meshes that there is no invite for" in line for line in said)


def iter_until(lines: Iterable[str], last: str) -> Iterator[str]:
    """Lines up to the one that has `last` in it; it must come."""
    for line in lines:
        yield line
        if last in line:
            return
    raise AssertionError(f"nobody said {last!r}")

"""js-libp2p as the other side of a hole punch: it has a public address, we sit behind a router, and a relay joins us."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.interop.npm import installed
from tests.netlab.children import ROOT, Child, ours
from tests.netlab.lab import Host, Kind, Lab

INTEROP = ROOT / "tests" / "interop"

pytestmark = pytest.mark.slow


@contextmanager
def js(host: Host, packages: Path, **wish: Any) -> Iterator[Child]:
    node = packages / "node_modules" / ".bin" / "node"
    child = Child(host, str(node), "js_paths.mjs", json.dumps(wish), cwd=packages)
    try:
        yield child
    finally:
        child.end()


@pytest.fixture
def packages() -> Path:
    folder = installed(INTEROP / "package.json")
    shutil.copy(INTEROP / "js_paths.mjs", folder / "js_paths.mjs")
    return folder


def test_js_and_we_punch_whoever_of_us_was_dialled(lab: Lab, packages: Path) -> None:
    office, theirs, home = lab.site(Kind.PUBLIC), lab.site(Kind.PUBLIC), lab.site(Kind.CONE, delay=0.01)
    with ours(office.host, 1, relay=True) as relay, ours(home.host, 2) as we:
        where = f"/ip4/{office.public}/tcp/4001/p2p/{relay.hello['peer']}"
        circuit = we.do("relays", relays=[where])["circuits"][0]
        listen = ["/ip4/0.0.0.0/tcp/4001", f"{where}/p2p-circuit"]
        with js(theirs.host, packages, listen=listen, at=[f"/ip4/{theirs.public}/tcp/4001"]) as peer:
            js_id, my_id = peer.hello["id"], we.hello["peer"]
            assert peer.do("echo", address=f"{circuit}/p2p/{my_id}", size=10_000)["same"]
            assert we.do("path", peer=js_id, kinds=["relayed", "punched"])["kind"]
            assert we.do("punch", peer=js_id)["kind"] == "punched"
            assert we.do("echo", peer=js_id, size=1_000_000)["same"]
        with js(theirs.host, packages, listen=listen, at=[f"/ip4/{theirs.public}/tcp/4001"]) as peer:
            js_id = peer.hello["id"]
            while not any("/p2p-circuit" in text for text in peer.do("addresses")["addresses"]):
                pass
            assert we.do("dial", peer=js_id, address=f"{where}/p2p-circuit")["kind"] in ("relayed", "punched")
            assert we.do("path", peer=js_id, kinds=["punched", "direct"])["kind"] == "punched"
            assert we.do("echo", peer=js_id, size=1_000_000)["same"]

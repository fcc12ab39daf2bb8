"""A TCP connection in a tunnel outlives every path that carried it: not one byte is lost, doubled or changed."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing

import pytest

from tests.netlab.carrying import PAUSE, PIECE
from tests.netlab.crowd import Forks, LabPeer
from tests.netlab.lab import Kind, Lab

pytestmark = pytest.mark.slow

DELAY = 0.01


def carries_on(peer: LabPeer) -> None:
    """Wait until another ten pieces have come back."""
    before = peer.ask("carried")["received"]
    progress = peer.until(
        "carried", lambda found: found["received"] >= before + 10 * PIECE or found["failure"]
    )
    assert not progress["failure"], f"{progress}\n{peer.words()}"


def test_a_connection_goes_on_from_relayed_to_direct_and_back(lab: Lab, forks: Forks) -> None:
    office = lab.site(Kind.PUBLIC, delay=DELAY)
    here, there = lab.site(Kind.CONE, delay=DELAY), lab.site(Kind.CONE, delay=DELAY)
    here.block(there)
    with ExitStack() as stack:
        founder = stack.enter_context(closing(LabPeer(forks, office.host, lab.folder, relay=True))).up()
        one, other = (
            stack.enter_context(closing(LabPeer(forks, site.host, lab.folder, invite=founder.invite))).up()
            for site in (here, there)
        )
        one.until("echo", lambda answer: answer.get("kind") == "relayed", peer=other.id)
        one.ask("carry", peer=other.id)
        carries_on(one)
        here.unblock()
        one.until("path", lambda path: path["kind"] == "punched", peer=other.id)
        carries_on(one)
        here.block(there)
        started = time.monotonic()
        one.until("path", lambda path: path["kind"] == "relayed", peer=other.id)
        sys.stdout.write(f"the direct path was cut, relayed after {time.monotonic() - started:.1f} s\n")
        carries_on(one)
        sys.stdout.write(
            f"ten pieces later, {10 * PAUSE:.1f} s of them: {time.monotonic() - started:.1f} s\n"
        )
        one.ask("carried", stop=True)
        end = one.until("carried", lambda found: found["done"] or found["failure"])
        assert not end["failure"], f"{end}\n{one.words()}"
        assert end["sent"] == end["received"]

"""The memory of gossip messages: new or not, for how long, and how many."""

from __future__ import annotations

import threading

from libmesh.net.libp2p import Libp2pConfig, open_libp2p_network
from libmesh.net.seen import SeenMessages


def test_a_message_is_new_once_and_again_when_it_has_not_come_for_long() -> None:
    now = 0.0
    seen = SeenMessages(lasts=10, most=100, clock=lambda: now)
    assert seen.add(b"a")
    now = 9.0
    assert not seen.add(b"a")
    now = 18.0
    assert seen.has(b"a")
    now = 28.0
    assert not seen.has(b"a")
    assert seen.add(b"a")


def test_when_it_is_full_the_one_that_came_longest_ago_is_forgotten() -> None:
    seen = SeenMessages(lasts=10, most=2, clock=lambda: 0.0)
    seen.add(b"a")
    seen.add(b"b")
    seen.add(b"a")
    seen.add(b"c")
    assert (seen.has(b"a"), seen.has(b"b"), seen.has(b"c")) == (True, False, True)
    assert seen.length() == 2


async def test_a_network_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    for _ in range(3):
        async with open_libp2p_network(b"t" * 32, Libp2pConfig(hosts=("127.0.0.1",))):
            pass
    assert [t.name for t in threading.enumerate() if t not in before and "rio" not in t.name] == []

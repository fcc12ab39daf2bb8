"""Peers that come and go faster than gossip with them begins: nothing of them may stay."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID

from libmesh.net.libp2p import Libp2pConfig, open_libp2p_network


def tasks(word: str) -> int:
    """How many tasks live whose name has `word`."""
    found, left = 0, [trio.lowlevel.current_root_task()]
    while left:
        task = left.pop()
        if task is not None:
            found += word in task.name
            left += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return found


@pytest.mark.parametrize("seed", range(4))
async def test_sending_tasks_end_with_their_peers(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    config = Libp2pConfig(hosts=("127.0.0.1",))
    async with open_libp2p_network(b"a" * 32, config) as a:
        await a.subscribe("churn")
        for turn in range(8):
            async with open_libp2p_network(b"b" * 32, config) as b:
                await b.subscribe("churn")
                await a.connect(b.peer, b.addresses())
                a.admit(b.peer)
                a.admit(b.peer)  # as when a second connection comes
                b.admit(a.peer)
                for _ in range(turn * (seed + 1)):
                    await trio.lowlevel.checkpoint()
                if turn % 2:
                    await a.disconnect(b.peer)
        with trio.move_on_after(60):
            while tasks("handle_sending_messages") or tasks("_handle_new_peer"):  # noqa: ASYNC110
                await trio.sleep(0.05)
        assert tasks("handle_sending_messages") == tasks("_handle_new_peer") == 0


async def test_two_beginnings_at_once_are_one(caplog: pytest.LogCaptureFixture) -> None:
    """As when both sides dial: two connections, each of which is told of."""
    caplog.set_level(logging.CRITICAL)
    config = Libp2pConfig(hosts=("127.0.0.1",))
    async with open_libp2p_network(b"a" * 32, config) as a:
        async with open_libp2p_network(b"b" * 32, config) as b:
            await a.connect(b.peer, b.addresses())
            connection: Any = SimpleNamespace(muxed_conn=SimpleNamespace(peer_id=ID.from_base58(b.peer)))
            for _ in range(3):
                await a._gossip.admitted(connection)
            with trio.fail_after(60):
                while not tasks("handle_sending_messages"):  # noqa: ASYNC110
                    await trio.sleep(0.01)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert tasks("handle_sending_messages") == 1
        with trio.move_on_after(60):
            while tasks("handle_sending_messages"):  # noqa: ASYNC110
                await trio.sleep(0.05)
        assert tasks("handle_sending_messages") == 0

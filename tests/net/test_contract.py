"""Each network against the contract of `Network` and `Stream`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from libmesh.net import swarm
from libmesh.net.base import Network
from libmesh.net.libp2p import Libp2pConfig, open_libp2p_network
from libmesh.net.tls import PROTOCOL_ID as TLS_ID
from libmesh.testing.contract import RULES, check_network
from libmesh.testing.memory import MemoryHub

SEEDS = b"a" * 32, b"b" * 32


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # one rule has a handler fail, which is rightly logged


@asynccontextmanager
async def memory_pair() -> AsyncIterator[tuple[Network, Network]]:
    hub = MemoryHub()
    async with hub.open_network(SEEDS[0]) as a, hub.open_network(SEEDS[1]) as b:
        await a.connect(b.peer, b.addresses())
        a.admit(b.peer)
        b.admit(a.peer)
        yield a, b


@asynccontextmanager
async def libp2p_pair() -> AsyncIterator[tuple[Network, Network]]:
    config = Libp2pConfig(hosts=("127.0.0.1",))
    async with open_libp2p_network(SEEDS[0], config) as a, open_libp2p_network(SEEDS[1], config) as b:
        await a.connect(b.peer, b.addresses())
        while b.path(a.peer) is None:  # noqa: ASYNC110
            await trio.sleep(0.001)  # the network tells by an event, which is not for us to consume
        a.admit(b.peer)
        b.admit(a.peer)
        yield a, b


@pytest.mark.parametrize("rule", RULES)
async def test_memory_network_keeps_the_contract(rule: str) -> None:
    await check_network(memory_pair, rules=[rule])


@pytest.mark.parametrize("rule", RULES)
async def test_our_libp2p_keeps_the_contract(rule: str) -> None:
    await check_network(libp2p_pair, rules=[rule])


@pytest.mark.parametrize("rule", RULES)
async def test_our_libp2p_keeps_the_contract_over_tls(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm, "SECURITY", tuple(each for each in swarm.SECURITY if each[0] == TLS_ID))
    await check_network(libp2p_pair, rules=[rule])


@pytest.mark.slow
async def test_ten_thousand_random_cancellations_harm_nothing() -> None:
    rules = ["cancelling_harms_no_other_stream"]
    await check_network(libp2p_pair, rules=rules, rounds=10_000, limit=300)

"""js-libp2p and relays: as a relay for us, as whom our relay leads to, and as who reaches us through it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from libmesh.core.relay_desk import RelayLimits
from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork, open_libp2p_network
from libmesh.peers import PathKind, PeerId
from tests.interop.npm import installed
from tests.interop.test_js import ECHO, SIZE, JsPeer, echo, round_trip
from tests.net.hosts import until

HERE = Path(__file__).parent
LOCAL = ["/ip4/127.0.0.1/tcp/0"]

pytestmark = pytest.mark.slow


@asynccontextmanager
async def js_peer(**wish: Any) -> AsyncIterator[JsPeer]:
    """A running `js_paths.mjs`; its `address` is the first one that it told, without its id."""
    packages = installed(HERE / "package.json")
    shutil.copy(HERE / "js_paths.mjs", packages / "js_paths.mjs")
    node = packages / "node_modules" / ".bin" / "node"
    async with trio.open_nursery() as nursery:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [str(node), "js_paths.mjs", json.dumps(wish)]
        process = await nursery.start(partial(trio.run_process, command, cwd=packages, check=False, **pipes))
        peer = JsPeer(process)
        with trio.fail_after(60):
            hello = await peer.line()
        peer.id = PeerId(hello["id"])
        peer.address = hello["addresses"][0].removesuffix(f"/p2p/{peer.id}") if hello["addresses"] else ""
        try:
            yield peer
        finally:
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def network(number: int, **config: Any) -> AsyncIterator[Libp2pNetwork]:
    listen = Libp2pConfig(hosts=("127.0.0.1",), **config)
    async with open_libp2p_network(bytes([number]) * 32, listen) as ours:
        ours.set_handler(ECHO, echo, admitted_only=False)
        yield ours


async def test_js_relays_for_us() -> None:
    with trio.fail_after(120):
        async with js_peer(relay=True, listen=LOCAL) as relay, network(1) as target, network(2) as source:
            target.set_relays([f"{relay.address}/p2p/{relay.id}"])
            await until(lambda: target.relaying.client.relays)
            path = await source.dial(target.peer, target.addresses()[-1])
            assert path.kind is PathKind.RELAYED
            await round_trip(await source.open_stream(target.peer, ECHO))


async def test_our_relay_leads_to_js_and_js_through_it_to_us() -> None:
    with trio.fail_after(120):
        async with network(3, relay=RelayLimits(), relay_open=True) as relay, network(1) as target:
            where = f"{relay.addresses()[0]}/p2p/{relay.peer}"
            target.set_relays([where])
            await until(lambda: target.relaying.client.relays)
            async with js_peer(listen=[f"{where}/p2p-circuit", *LOCAL]) as js, network(2) as source:
                circuit = await _circuit_of(js)
                assert circuit == f"{where}/p2p-circuit"
                path = await source.dial(js.id, circuit)
                assert path.kind is PathKind.RELAYED
                await round_trip(await source.open_stream(js.id, ECHO))
                theirs = f"{where}/p2p-circuit/p2p/{target.peer}"
                assert (await js.do("echo", address=theirs, size=SIZE))["same"]
                assert relay.relaying.server is not None
                assert {c.target for c in relay.relaying.server.circuits} == {js.id, target.peer}


async def _circuit_of(js: JsPeer) -> str:
    """js takes its place in the background."""
    while True:
        found = [text for text in (await js.do("addresses"))["addresses"] if "/p2p-circuit" in text]
        if found:
            return str(found[0]).removesuffix(f"/p2p/{js.id}")
        await trio.sleep(0.1)

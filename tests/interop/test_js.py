"""js-libp2p as a foreign peer, both ways: Noise and TLS, TCP and WebSockets, yamux, identify, ping, gossipsub, a 4 MiB echo with half-close.

The packages are installed by npm into the user's cache, once for each version of `package.json`. Without npm, or
without a registry, these tests are skipped.
"""

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
from libp2p.custom_types import TProtocol
from libp2p.identity.identify_push.identify_push import push_identify_to_peer
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError

from libmesh.errors import ServiceRefused
from libmesh.net.base import Message, Stream
from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork, open_libp2p_network
from libmesh.peers import PeerId
from tests.interop.npm import installed

HERE = Path(__file__).parent
ECHO = "/echo/1.0.0"
SIZE = 4 * 1024 * 1024
SECURITY = ("noise", "tls")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def packages() -> Path:
    """A folder with js-libp2p in its `node_modules`."""
    return installed(HERE / "package.json")


class JsPeer:
    """A running peer."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._unread = b""
        self.messages: list[str] = []
        self.id = PeerId("")
        self.address = ""

    async def line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            data = await self._process.stdout.receive_some()
            assert data, "the js peer ended"
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        value: dict[str, Any] = json.loads(line)
        return value

    async def do(self, action: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(json.dumps({"do": action, **arguments}).encode() + b"\n")
        while True:
            value = await self.line()
            if "message" in value:
                self.messages.append(value["message"])
            elif value.get("done") == action:
                assert "failed" not in value, value
                return value

    async def message(self) -> str:
        while not self.messages:
            self.messages.append((await self.line())["message"])
        return self.messages.pop(0)


@asynccontextmanager
async def js_peer(packages: Path, security: str = "noise", transport: str = "tcp") -> AsyncIterator[JsPeer]:
    node = packages / "node_modules" / ".bin" / "node"
    shutil.copy(HERE / "js_peer.mjs", packages / "js_peer.mjs")
    async with trio.open_nursery() as nursery:
        command = [str(node), "js_peer.mjs", security, transport]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        start = partial(trio.run_process, command, cwd=packages, capture_stderr=False, check=False, **pipes)
        process: trio.Process = await nursery.start(start)
        assert process.stderr is not None
        nursery.start_soon(_discard, process.stderr)
        peer = JsPeer(process)
        with trio.fail_after(60):
            hello = await peer.line()
        peer.id, peer.address = PeerId(hello["id"]), hello["address"]
        try:
            yield peer
        finally:
            nursery.cancel_scope.cancel()


async def _discard(stream: trio.abc.ReceiveStream) -> None:
    while await stream.receive_some():
        pass


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.aclose()


async def round_trip(stream: Stream) -> None:
    """4 MiB there, an end of file, and all of it back."""
    data = bytes((i * 7 + (i >> 8)) & 255 for i in range(SIZE))
    got = bytearray()

    async def send() -> None:
        await stream.send_all(data)
        await stream.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while piece := await stream.receive_some():
            got += piece
    await stream.aclose()
    assert bytes(got) == data


@asynccontextmanager
async def network() -> AsyncIterator[Libp2pNetwork]:
    async with open_libp2p_network(b"j" * 32, Libp2pConfig(hosts=("127.0.0.1",), websocket_port=0)) as ours:
        ours.set_handler(ECHO, echo, admitted_only=False)
        yield ours


@pytest.mark.parametrize("security", SECURITY)
async def test_we_dial_js(packages: Path, security: str) -> None:
    with trio.fail_after(60):
        async with js_peer(packages, security) as js, network() as ours:
            await ours.connect(js.id, [js.address])
            await round_trip(await ours.open_stream(js.id, ECHO))
            refused = await ours.open_stream(js.id, "/nobody/serves/this")
            await refused.send_all(b"a request that nobody wants")
            with pytest.raises(ServiceRefused):
                await refused.receive_some()
            await round_trip(await ours.open_stream(js.id, ECHO))
            path = ours.path(js.id)
            assert path is not None
            assert path.rtt is not None
            assert (await js.do("echo", address=f"{ours.addresses()[0]}/p2p/{ours.peer}", size=SIZE))["same"]


@pytest.mark.parametrize("security", SECURITY)
async def test_js_dials_us(packages: Path, security: str) -> None:
    with trio.fail_after(60):
        async with js_peer(packages, security) as js, network() as ours:
            address = f"{ours.addresses()[0]}/p2p/{ours.peer}"
            assert (await js.do("echo", address=address, size=SIZE))["same"]
            assert (await js.do("ping", address=address))["ms"] >= 0
            assert (await js.do("unknown", address=address))["error"] is not None
            assert "/ipfs/ping/1.0.0" in (await js.do("protocols", peer=ours.peer))["protocols"]
            await round_trip(await ours.open_stream(js.id, ECHO))


async def test_websockets_work_both_ways(packages: Path) -> None:
    with trio.fail_after(60):
        async with js_peer(packages, transport="ws") as js, network() as ours:
            assert js.address.endswith("/ws")
            assert (await ours.connect(js.id, [js.address])).address == js.address
            await round_trip(await ours.open_stream(js.id, ECHO))
            await ours.disconnect(js.id)
            (web,) = (address for address in ours.addresses() if address.endswith("/ws"))
            assert (await js.do("echo", address=f"{web}/p2p/{ours.peer}", size=SIZE))["same"]
            path = ours.path(js.id)
            assert path is not None
            assert path.address.endswith("/ws")


async def test_we_ping_js_and_are_told_of_what_it_serves_later(packages: Path) -> None:
    """Identify-push arrives; ping goes this way, too."""
    with trio.fail_after(60):
        async with js_peer(packages) as js, network() as ours:
            await ours.connect(js.id, [js.address])
            ping = await ours.open_stream(js.id, "/ipfs/ping/1.0.0")
            for turn in range(3):
                await ping.send_all(bytes([turn]) * 32)
                got = b""
                while len(got) < 32:
                    got += await ping.receive_some(32 - len(got))
                assert got == bytes([turn]) * 32
            await ping.aclose()
            await js.do("serve", protocol="/served/later/1.0.0")
            known = ours._host.get_peerstore()
            while "/served/later/1.0.0" not in _protocols(known, js.id):  # noqa: ASYNC110
                await trio.sleep(0.05)


async def test_js_is_told_of_what_we_serve_later(packages: Path) -> None:
    """Identify-push, the other way."""
    later = TProtocol("/served/later/1.0.0")
    with trio.fail_after(60):
        async with js_peer(packages) as js, network() as ours:
            await ours.connect(js.id, [js.address])
            assert later not in (await js.do("protocols", peer=ours.peer))["protocols"]
            ours._host.multiselect.add_handler(later, None)
            assert await push_identify_to_peer(ours._host, ID.from_base58(js.id))
            assert later in (await js.do("protocols", peer=ours.peer, wanted=later))["protocols"]


def _protocols(peerstore: Any, peer: PeerId) -> list[str]:
    try:
        return list(peerstore.get_protocols(ID.from_base58(peer)))
    except PeerStoreError:
        return []


async def test_gossip_crosses_both_ways(packages: Path) -> None:
    with trio.fail_after(60):
        async with js_peer(packages) as js, network() as ours, ours.events() as events:
            await ours.subscribe("interop")
            await js.do("subscribe", topic="interop")
            await ours.connect(js.id, [js.address])
            ours.admit(js.id)
            await js.do("publish", topic="interop", text="from js", peers=1)
            async for event in events:
                if isinstance(event, Message):
                    assert (event.topic, event.data, event.origin) == ("interop", b"from js", js.id)
                    break
            with trio.move_on_after(10):
                while True:
                    await ours.publish("interop", b"from us")
                    with trio.move_on_after(1):
                        assert await js.message() == "from us"
                        return
            raise AssertionError("js-libp2p did not hear us")

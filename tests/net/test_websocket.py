"""WebSockets: the contract over them, their addresses, and whatever strangers send to the port."""

from __future__ import annotations

import logging
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio

from libmesh.core.relay_desk import RelayLimits
from libmesh.errors import AddressUnavailable, MeshError, NetworkError
from libmesh.net import websocket
from libmesh.net.base import Network, StreamReset
from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork, open_libp2p_network
from libmesh.net.websocket import Target, WebSocket, beside, target_of
from libmesh.peers import PathKind
from libmesh.testing.contract import RULES, check_network
from tests.members import seed
from tests.net.hosts import HOSTS, PROTOCOL, answers, echo, until

PEER = "12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5"
LOCAL = Libp2pConfig(hosts=HOSTS, websocket_port=0)
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def web(network: Libp2pNetwork) -> str:
    return next(address for address in network.addresses() if address.endswith("/ws"))


def port_of(network: Libp2pNetwork) -> int:
    return int(web(network).split("/")[4])


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("address", "target", "authority"),
    [
        ("/ip4/1.2.3.4/tcp/80/ws", Target("/ip4/1.2.3.4/tcp/80", "1.2.3.4", 80, False), "1.2.3.4"),
        (f"/dns4/a.org/tcp/443/wss/p2p/{PEER}", Target("/dns4/a.org/tcp/443", "a.org", 443, True), "a.org"),
        ("/dns/a.org/tcp/8443/tls/ws", Target("/dns/a.org/tcp/8443", "a.org", 8443, True), "a.org:8443"),
        (
            "/ip4/1.2.3.4/tcp/443/tls/sni/b.org/ws",
            Target("/ip4/1.2.3.4/tcp/443", "b.org", 443, True),
            "b.org",
        ),
        ("/ip6/::1/tcp/81/ws", Target("/ip6/::1/tcp/81", "::1", 81, False), "[::1]:81"),
    ],
)
def test_addresses_of_all_forms_are_understood(address: str, target: Target, authority: str) -> None:
    assert target_of(address) == target
    assert target_of(address).authority == authority


@pytest.mark.parametrize(
    "address", ["/ip4/1.2.3.4/tcp/80", "/ip4/1.2.3.4/udp/80/ws", "/ip4/1.2.3.4/tcp/80/ws/ws", "x/ws"]
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        target_of(address)


def test_own_addresses_are_told_with_the_port_of_websockets() -> None:
    assert beside(("/ip4/1.2.3.4/tcp/1", "/ip6/::1/tcp/1"), 2) == (
        "/ip4/1.2.3.4/tcp/2/ws",
        "/ip6/::1/tcp/2/ws",
    )
    assert beside(("/ip4/1.2.3.4/tcp/1",), None) == ()


# ── the network over it ──────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Libp2pNetwork, Libp2pNetwork]]:
    async with open_libp2p_network(seed(1), LOCAL) as a, open_libp2p_network(seed(2), LOCAL) as b:
        path = await a.connect(b.peer, [web(b)])
        assert (path.kind, path.address) == (PathKind.DIRECT, web(b))
        await until(lambda: b.path(a.peer))
        a.admit(b.peer)
        b.admit(a.peer)
        yield a, b


@asynccontextmanager
async def networks() -> AsyncIterator[tuple[Network, Network]]:
    async with pair() as both:
        yield both


SLOW = "streams_are_trio_streams"


@pytest.mark.parametrize("rule", [pytest.param(r, marks=pytest.mark.slow) if r == SLOW else r for r in RULES])
async def test_websockets_keep_the_contract(rule: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    await check_network(networks, rules=[rule])


async def test_one_who_came_by_websocket_is_seen_as_such() -> None:
    async with pair() as (a, b):
        path = b.path(a.peer)
        assert path is not None
        assert path.address.endswith("/ws")


async def test_relay_is_reached_by_websocket_and_carries_circuits() -> None:
    config = Libp2pConfig(hosts=HOSTS, websocket_port=0, relay=RelayLimits(), relay_open=True)
    plain = Libp2pConfig(hosts=HOSTS)
    async with (
        open_libp2p_network(seed(1), config) as relay,
        open_libp2p_network(seed(2), plain) as a,
        open_libp2p_network(seed(3), plain) as b,
    ):
        b.set_handler(PROTOCOL, echo, admitted_only=False)
        b.set_relays([f"{web(relay)}/p2p/{relay.peer}"])
        circuit = f"{web(relay)}/p2p/{relay.peer}/p2p-circuit"
        await until(lambda: circuit in b.addresses())
        path = await a.connect(b.peer, [circuit])
        assert path.kind is PathKind.RELAYED
        await answers(a, b)
        through = a.path(relay.peer)
        assert through is not None
        assert through.address == web(relay)


async def test_port_that_is_taken_is_told() -> None:
    async with open_libp2p_network(seed(1), LOCAL) as a:
        config = Libp2pConfig(hosts=HOSTS, websocket_port=port_of(a))
        with pytest.raises(AddressUnavailable, match=f"WebSocket port {port_of(a)} is already in use"):
            async with open_libp2p_network(seed(2), config):
                pass


async def test_without_the_option_nothing_listens_for_websockets() -> None:
    async with open_libp2p_network(seed(1), Libp2pConfig(hosts=HOSTS)) as a:
        assert not [address for address in a.addresses() if "ws" in address]


# ── strangers ────────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def listener() -> AsyncIterator[Libp2pNetwork]:
    """Afterwards it still serves."""
    config = Libp2pConfig(hosts=HOSTS, websocket_port=0, handshake_limit=0.5, max_handshakes=2)
    async with open_libp2p_network(seed(1), config) as a, open_libp2p_network(seed(2), LOCAL) as b:
        a.set_handler(PROTOCOL, echo, admitted_only=False)
        yield a
        with trio.fail_after(60):
            while True:  # a busy machine may be too slow for so short a limit
                with suppress(MeshError, trio.BrokenResourceError):
                    await b.connect(a.peer, [web(a)])
                    await answers(b, a)
                    break


async def all_of(stream: trio.SocketStream) -> bytes:
    got = b""
    try:
        with trio.fail_after(60):
            while data := await stream.receive_some():
                got += data
    except trio.BrokenResourceError:
        pass
    return got


GARBAGE = {
    "bytes": bytes(range(256)) * 8,
    "a browser": b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
    "another method": REQUEST.replace(b"GET", b"POST"),
    "a host that is no name": REQUEST.replace(b"Host: h", b"Host: \xff\xfe"),
    "a target that is no text": REQUEST.replace(b"GET /", b"GET /\xff"),
    "endless headers": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000,
    "an endless line": b"GET /" + b"x" * 500_000,
    "a frame without mask": REQUEST + b"\x82\x01x",
    "text": REQUEST + b"\x81\x81\0\0\0\0x",
    "a ping of 126 bytes": REQUEST + b"\x89\xfe\0\x7e" + bytes(130),
    "an opcode that is none": REQUEST + b"\x83\x80\0\0\0\0",
    "multistream as over TCP": b"\x13/multistream/1.0.0\n",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_ends_its_own_connection_only(garbage: bytes) -> None:
    async with listener() as a, await trio.open_tcp_stream("127.0.0.1", port_of(a)) as stream:
        head, _, frames = garbage.partition(b"\r\n\r\n")
        got = b""
        try:
            await stream.send_all(head + b"\r\n\r\n" if frames else garbage)
            if frames:
                got = await stream.receive_some()
                await stream.send_all(frames)
        except trio.BrokenResourceError:
            pass
        got += await all_of(stream)
        assert got == b"" or got.startswith(b"HTTP/1.1 101" if frames else b"HTTP/1.1 400")


@pytest.mark.parametrize("said", [b"", REQUEST[:30], REQUEST])
async def test_slow_handshake_is_bounded(said: bytes) -> None:
    async with listener() as a, await trio.open_tcp_stream("127.0.0.1", port_of(a)) as stream:
        if said:
            await stream.send_all(said)
        await all_of(stream)
        await until(lambda: not a._connections.handshakes)


async def test_of_too_many_that_say_nothing_the_oldest_go() -> None:
    async with listener() as a:
        streams = [await trio.open_tcp_stream("127.0.0.1", port_of(a)) for _ in range(5)]
        for stream in streams:
            await all_of(stream)
            await stream.aclose()


# ── one WebSocket ────────────────────────────────────────────────────────────────────────────────────────────────────


async def sockets() -> tuple[trio.SocketStream, trio.SocketStream]:
    async with (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] as listening:
        near = await trio.open_tcp_stream("127.0.0.1", listening.socket.getsockname()[1])
        return near, await listening.accept()


@asynccontextmanager
async def server() -> AsyncIterator[tuple[trio.SocketStream, WebSocket]]:
    """A socket on which a client of ours has shaken hands by hand, and the server's WebSocket."""
    near, far = await sockets()
    ours = WebSocket(far)
    await near.send_all(REQUEST)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.receive_some)
        assert (await near.receive_some()).startswith(b"HTTP/1.1 101 ")
        nursery.cancel_scope.cancel()
    try:
        yield near, ours
    finally:
        near.socket.close()
        ours.reset()


def frame(payload: bytes, opcode: int = 0x82) -> bytes:
    return bytes([opcode, 0x80 | len(payload)]) + bytes(4) + payload


async def test_frame_that_claims_any_length_is_read_as_it_comes() -> None:
    async with server() as (near, ours):
        await near.send_all(b"\x82\xff" + struct.pack("!Q", 2**63 - 1) + bytes(4) + b"abc")
        assert await ours.receive_some() == b"abc"
        assert ours.receive_nowait() is None
        await near.send_all(b"defg")
        assert await ours.receive_some(2) == b"de"
        assert ours.receive_nowait(1) == b"f"
        assert await ours.receive_some() == b"g"


async def test_bounds_of_frames_mean_nothing() -> None:
    async with server() as (near, ours):
        await near.send_all(b"".join([frame(b"a", 0x02), frame(b"", 0x00), frame(b"b", 0x80), frame(b"c")]))
        got = b""
        while len(got) < 3:
            got += await ours.receive_some()
        assert got == b"abc"


async def test_ping_is_answered_after_the_frames_before_it() -> None:
    async with server() as (near, ours):
        await near.send_all(frame(b"hello", 0x89) + frame(b"x"))
        assert await ours.receive_some() == b"x"
        assert await near.receive_some() == b"\x8a\x05hello"


async def test_flood_of_pings_costs_one_pong_while_nobody_reads() -> None:
    async with server() as (near, ours):
        with trio.move_on_after(0.05):
            await ours.send_all(bytes(64 * 1024 * 1024))  # until the kernel takes no more
        left = len(ours._unsent)
        for _ in range(100):
            await near.send_all(frame(b"ping", 0x89) * 100)
        await near.send_all(frame(b"x"))
        assert await ours.receive_some() == b"x"
        assert len(ours._unsent) <= max(left, 200)


async def test_farewell_is_an_end_of_file_and_a_lost_socket_is_none() -> None:
    async with server() as (near, ours):
        await near.send_all(frame(b"last") + frame(struct.pack("!H", 1000), 0x88))
        assert [await ours.receive_some(), await ours.receive_some()] == [b"last", b""]
        with pytest.raises(StreamReset):
            await ours.send_all(b"x")
    async with server() as (near, ours):
        await near.aclose()
        with pytest.raises(StreamReset):
            await ours.receive_some()


async def test_cancelled_calls_leave_whole_frames() -> None:
    near, far = await sockets()
    client, ours = WebSocket(near), WebSocket(far)
    got = bytearray()

    async def receive() -> None:
        while data := await ours.receive_some():
            got.extend(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.receive_some)
        await client.request("h")
        nursery.cancel_scope.cancel()
    with trio.move_on_after(0.05) as cut:
        await client.send_all(b"a" * 64 * 1024 * 1024)
    assert cut.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await client.send_all(b"b" * 100_000)
        await client.send_eof()
    assert got.lstrip(b"a") == b"b" * 100_000
    await client.aclose()
    await ours.aclose()


async def test_server_that_is_none_is_told_in_words() -> None:
    async def web_server(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        await stream.aclose()

    async with trio.open_nursery() as nursery, open_libp2p_network(seed(1), LOCAL) as a:
        listeners = await nursery.start(partial(trio.serve_tcp, web_server, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(NetworkError, match="HTTP 404"):
            await a.dial(a.peer, f"/ip4/127.0.0.1/tcp/{port}/ws")
        nursery.cancel_scope.cancel()


def test_pieces_fit_into_what_may_wait() -> None:
    assert websocket.PIECE_BYTES < websocket.MAX_UNSENT

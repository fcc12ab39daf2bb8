"""Dials back between real networks on loopback: who is served, what counts as reached, and what strangers get."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from libmesh.errors import MeshError
from libmesh.framing import frame, receive_frame
from libmesh.net import dial_back as serving
from libmesh.net import reach_wire as wire
from libmesh.net.dial_back import dial_back
from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork
from libmesh.net.reach_wire import Data, DataWanted, Request, Response, Verdict
from libmesh.wire_pieces import WireError
from tests.net.hosts import join, networks

LIMIT = 60.0


@asynccontextmanager
async def pair(*, admitted: bool = True) -> AsyncIterator[tuple[Libp2pNetwork, Libp2pNetwork]]:
    """Two connected networks that have, or have not, admitted each other."""
    with trio.fail_after(LIMIT):
        async with networks(2) as (one, other):
            await join(one, other, admit=admitted)
            yield one, other


async def test_a_peer_that_listens_is_reached() -> None:
    async with pair() as (one, other):
        assert await one.reach.ask(other.peer, f"/ip4/127.0.0.1/tcp/{one.port}") is True


@pytest.mark.parametrize("host", ["/ip4/127.0.0.1", "/ip6/::1"])
async def test_a_peer_says_where_it_sees_us(host: str) -> None:
    with trio.fail_after(LIMIT):
        config = Libp2pConfig(hosts=("127.0.0.1", "::1"))
        async with networks(2, config) as (one, other):
            await one.connect(other.peer, [f"{host}/tcp/{other.port}"])
            stream = await one.open_stream(other.peer, wire.IDENTIFY)
            observed = wire.observed_address(await receive_frame(stream, wire.MAX_IDENTIFY))
            assert observed == f"{host}/tcp/{one.local_port(other.peer)}"


async def test_the_dial_back_makes_a_connection_of_its_own_and_ends_it() -> None:
    async with pair() as (one, other):
        before = one.path(other.peer)
        await one.reach.ask(other.peer, f"/ip4/127.0.0.1/tcp/{one.port}")
        after = one.path(other.peer)
        assert before is not None
        assert after is not None
        assert before.address == after.address


async def test_a_port_where_nobody_listens_is_not_reached() -> None:
    with trio.socket.socket() as closed:
        await closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        async with pair() as (one, other):
            assert await one.reach.ask(other.peer, f"/ip4/127.0.0.1/tcp/{port}") is False


async def test_somebody_else_s_port_is_not_ours() -> None:
    async with pair() as (one, other):
        assert await one.reach.ask(other.peer, f"/ip4/127.0.0.1/tcp/{other.port}") is False


async def test_a_private_address_that_is_not_the_asker_s_is_not_dialled() -> None:
    async with pair() as (one, other):
        assert await one.reach.ask(other.peer, "/ip4/10.255.255.1/tcp/4001") is None


async def test_a_stranger_is_served_nothing() -> None:
    async with pair(admitted=False) as (one, other):
        with pytest.raises((MeshError, trio.BrokenResourceError)):
            await one.reach.ask(other.peer, f"/ip4/127.0.0.1/tcp/{one.port}")


async def test_who_asks_too_often_is_rejected() -> None:
    async with pair() as (one, other):
        address = f"/ip4/127.0.0.1/tcp/{one.port}"
        answers = [await one.reach.ask(other.peer, address) for _ in range(int(serving.BURST) + 4)]
        assert answers[0] is True
        assert None in answers


async def test_an_address_elsewhere_costs_the_asker_more_bytes_than_the_dial_costs_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dialled: list[str] = []

    async def note(peer: object, address: str, nonce: int) -> bool:
        dialled.append(address)
        return False

    monkeypatch.setattr(serving, "dial_back", note)
    async with pair() as (one, other):
        stream = await one.open_stream(other.peer, wire.DIAL_REQUEST)
        await stream.send_all(wire.encode(Request(("/ip4/11.0.0.1/tcp/4001",), 7)))
        demand = wire.decode(await receive_frame(stream, wire.MAX_MESSAGE))
        assert isinstance(demand, DataWanted)
        assert 30_000 <= demand.size <= wire.MAX_DATA
        assert dialled == []
        for _ in range(0, demand.size, wire.MAX_PIECE):
            await stream.send_all(wire.encode(Data(bytes(wire.MAX_PIECE))))
        answer = wire.decode(await receive_frame(stream, wire.MAX_MESSAGE))
        assert answer == Response(Verdict.NOT_REACHED, 0)
        assert dialled == ["/ip4/11.0.0.1/tcp/4001"]


async def test_we_pay_what_is_asked_up_to_a_limit() -> None:
    paid: list[int] = []
    async with pair() as (one, other):

        async def demanding(size: int) -> bool | None:
            async def serve(stream: object) -> None:
                assert isinstance(stream, trio.abc.HalfCloseableStream)
                await receive_frame(stream, wire.MAX_MESSAGE)
                await stream.send_all(wire.encode(DataWanted(0, size)))
                got = 0
                while got < size:
                    piece = wire.decode(await receive_frame(stream, wire.MAX_MESSAGE))
                    assert isinstance(piece, Data)
                    got += len(piece.data)
                paid.append(got)
                await stream.send_all(wire.encode(Response(Verdict.NOT_REACHED)))

            other.set_handler(wire.DIAL_REQUEST, serve)
            return await one.reach.ask(other.peer, f"/ip4/127.0.0.1/tcp/{one.port}")

        assert await demanding(50_000) is False
        assert paid[0] >= 50_000
        assert await demanding(wire.MAX_DATA + 1) is None


async def test_a_claim_to_have_reached_us_counts_only_if_the_nonce_came() -> None:
    async with pair() as (one, other):

        async def lie(stream: object) -> None:
            assert isinstance(stream, trio.abc.HalfCloseableStream)
            await receive_frame(stream, wire.MAX_MESSAGE)
            await stream.send_all(wire.encode(Response(Verdict.REACHED)))

        other.set_handler(wire.DIAL_REQUEST, lie)
        assert await one.reach.ask(other.peer, f"/ip4/127.0.0.1/tcp/{one.port}") is None


async def test_a_nonce_that_nobody_waits_for_is_refused() -> None:
    async with pair() as (one, _):
        assert await dial_back(one.peer, f"/ip4/127.0.0.1/tcp/{one.port}", 12345) is False


async def test_garbage_on_either_protocol_harms_nobody() -> None:
    async with pair() as (one, other):
        for protocol in (wire.DIAL_REQUEST, wire.DIAL_BACK):
            for garbage in (b"\xff" * 40, frame(b"\xff\xff"), frame(b""), b""):
                stream = await one.open_stream(other.peer, protocol)
                await stream.send_all(garbage)
                await stream.send_eof()
                try:
                    await stream.receive_some()
                except (MeshError, trio.BrokenResourceError):
                    continue
        assert await one.reach.ask(other.peer, f"/ip4/127.0.0.1/tcp/{one.port}") in (True, None)


def test_messages_and_their_bytes_are_inverses() -> None:
    messages: tuple[wire.Reply, ...] = (
        Request(("/ip4/11.0.0.1/tcp/1", "/ip6/2001:db8::1/tcp/2"), 2**64 - 1),
        DataWanted(3, 30_000),
        Data(b"x" * 4096),
        *(Response(verdict) for verdict in Verdict if verdict < 0),
        Response(Verdict.REACHED, 2),
        Response(Verdict.NOT_REACHED, 2),
    )
    for message in messages:
        framed = wire.encode(message)
        assert wire.decode(framed[len(framed) - _body(framed) :]) == message
    assert wire.decode_dial_back(wire.encode_dial_back(7)[1:]) == 7


def _body(framed: bytes) -> int:
    prefix = next(index for index, byte in enumerate(framed) if byte < 0x80) + 1
    return len(framed) - prefix


@pytest.mark.parametrize(
    ("message", "bytes_"),
    [
        (Request(("/ip4/1.2.3.4/tcp/5",), 1), "150a130a080401020304060005110100000000000000"),
        (DataWanted(1, 30_000), "081a06080110b0ea01"),
        (Response(Verdict.REACHED, 1), "0a120808c801100118c801"),
    ],
)
def test_the_bytes_are_those_of_the_specification(message: wire.Reply, bytes_: str) -> None:
    assert wire.encode(message).hex() == bytes_


@given(st.binary(max_size=64))
def test_garbage_is_no_message(data: bytes) -> None:
    for decode in (wire.decode, wire.decode_dial_back, wire.observed_address):
        try:
            decode(data)
        except WireError:
            continue

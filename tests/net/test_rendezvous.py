"""The rendezvous point and its clients: on the wire, in full, and with peers that lie."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from libmesh import keys
from libmesh._pb import circuit_pb2
from libmesh.core.rendezvous_desk import MAX_NAMESPACE, RendezvousLimits
from libmesh.errors import NetworkError, ServiceRefused
from libmesh.framing import receive_frame
from libmesh.net import rendezvous
from libmesh.net import rendezvous_wire as wire
from libmesh.net.base import Stream, StreamReset
from libmesh.net.libp2p import Libp2pNetwork, open_libp2p_network
from libmesh.net.rendezvous_wire import Discover, Discovered, Register, Registered, Status, Unregister
from libmesh.wire_pieces import WireError
from tests.members import peer, seed
from tests.net.hosts import LOCAL, join, networks
from tests.net.relayed import RELAY

HERE = ("/ip4/192.0.2.1/tcp/4001", "/dns4/example.org/tcp/443/wss")
RECORD = wire.make_record(seed(1), 7, HERE)

GOLDEN: list[tuple[Any, Any, Any, str]] = [
    (Register("x", b"r", 9), wire.encode_request, wire.decode_request, "0c080012080a01781201721809"),
    (Unregister("x"), wire.encode_request, wire.decode_request, "07080222030a0178"),
    (Discover("x", 3, b"c"), wire.encode_request, wire.decode_request, "0c08032a080a017810031a0163"),
    (Registered(0, 120), wire.encode_registered, wire.decode_registered, "0808011a0408001878"),
]


@pytest.mark.parametrize(("value", "encode", "decode", "data"), GOLDEN)
def test_golden_bytes_both_ways(value: Any, encode: Any, decode: Any, data: str) -> None:
    assert encode(value).hex() == data
    assert decode(bytes.fromhex(data)[1:]) == value


def test_answers_and_cookies_survive_the_way() -> None:
    answer = Discovered(0, (RECORD, b"other"), wire.encode_cookie(2**40))
    encoded = wire.encode_discovered("x", answer, (1, 2))
    assert wire.decode_discovered(encoded[encoded.index(0x08) :]) == answer
    assert wire.decode_cookie(answer.cookie) == 2**40
    assert wire.decode_cookie(b"") == 0


def test_a_record_tells_what_its_peer_signed_and_nothing_else_is_one() -> None:
    assert wire.open_record(RECORD) == (peer(1), HERE)
    envelope = circuit_pb2.Envelope.FromString(RECORD)
    for wrong in (
        {"public_key": envelope.public_key[:-1] + b"?"},
        {"payload": envelope.payload + b"\x10\x01"},
        {"payload_type": b"\x03\x02"},
        {"signature": bytes(64)},
    ):
        changed = circuit_pb2.Envelope.FromString(RECORD)
        for name, value in wrong.items():
            setattr(changed, name, value)
        with pytest.raises(WireError):
            wire.open_record(changed.SerializeToString())
    other = circuit_pb2.Envelope.FromString(wire.make_record(seed(2), 7, HERE))
    other.payload = envelope.payload
    other.signature = keys.sign(seed(2), wire.RECORD.signed_bytes(envelope.payload))
    with pytest.raises(WireError, match="another peer"):
        wire.open_record(other.SerializeToString())


def test_a_record_takes_the_first_addresses_that_fit() -> None:
    long = [f"/dns4/{'a' * 60}.{'b' * 60}.{'c' * 60}.{n}/tcp/1" for n in range(wire.MAX_ADDRESSES)]
    record = wire.make_record(seed(1), 7, tuple(long))
    assert len(record) <= wire.MAX_RECORD
    _, told = wire.open_record(record)
    assert told == tuple(long[: len(told)])
    assert len(told) > 8
    full = Discovered(0, (bytes(wire.MAX_RECORD),) * RendezvousLimits().answer, bytes(8))
    assert (
        len(wire.encode_discovered("n" * MAX_NAMESPACE, full, (7200,) * len(full.records))) <= wire.MAX_ANSWER
    )


@given(st.binary(max_size=200))
def test_garbage_is_nothing_or_an_error_of_ours(data: bytes) -> None:
    for decode in (wire.decode_request, wire.decode_registered, wire.decode_discovered, wire.open_record):
        with suppress(WireError):
            decode(data)


@asynccontextmanager
async def at_a_point(count: int = 2) -> AsyncIterator[list[Libp2pNetwork]]:
    """A relay, and members that it has admitted."""
    async with open_libp2p_network(seed(77), RELAY) as point, networks(count) as members:
        for member in members:
            await join(member, point)
        yield [point, *members]


async def ask(near: Libp2pNetwork, point: Libp2pNetwork, *frames: bytes) -> list[bytes]:
    """The answers to requests on one stream."""
    with trio.fail_after(60):
        async with await near.open_stream(point.peer, wire.PROTOCOL) as stream:
            answers = []
            for request in frames:
                await stream.send_all(request)
                answers.append(await receive_frame(stream, wire.MAX_ANSWER))
            return answers


async def test_whoever_left_word_is_found_and_not_by_itself() -> None:
    async with at_a_point() as (point, one, other):
        assert await one.register(point.peer, "x", HERE) > 60
        assert await other.discover(point.peer, "x") == {one.peer: HERE}
        assert await one.discover(point.peer, "x") == {}
        assert await other.discover(point.peer, "y") == {}
        await one.disconnect(point.peer)
        assert await other.discover(point.peer, "x") == {one.peer: HERE}, "it outlives the connection"


async def test_more_than_one_answer_holds_are_all_found() -> None:
    async with at_a_point(1) as (point, one):
        assert point.relaying.point is not None
        for number in range(2, 42):
            record = wire.make_record(seed(number), 1, HERE)
            point.relaying.point.desk.register(peer(number), "x", record, 0, trio.current_time())
        point.relaying.point.desk.register(peer(99), "x", b"nobody signed this", 0, trio.current_time())
        assert set(await one.discover(point.peer, "x")) == {peer(number) for number in range(2, 42)}


async def test_what_is_not_one_s_own_or_has_no_name_is_refused_with_the_status_of_the_specification() -> None:
    async with at_a_point(1) as (point, one):
        lie = wire.make_record(seed(50), 1, HERE)
        requests = [
            wire.encode_request(request)
            for request in (
                Register("x", lie),
                Register("x", b"?"),
                Register("x", wire.make_record(seed(1), 1, ())),
                Register("", RECORD),
                Register("n" * (MAX_NAMESPACE + 1), RECORD),
            )
        ]
        statuses = [wire.decode_registered(answer).status for answer in await ask(one, point, *requests)]
        assert statuses == [Status.INVALID_RECORD] * 3 + [Status.INVALID_NAMESPACE] * 2
        requests = [wire.encode_request(request) for request in (Discover(""), Discover("x", 0, b"?"))]
        statuses = [wire.decode_discovered(answer).status for answer in await ask(one, point, *requests)]
        assert statuses == [Status.INVALID_NAMESPACE, Status.INVALID_COOKIE]
        assert point.relaying.point is not None
        assert point.relaying.point.desk.registrations == 0


async def test_a_full_point_says_so_and_who_takes_word_back_makes_room() -> None:
    async with at_a_point(1) as (point, one):
        for number in range(RendezvousLimits().per_peer):
            await one.register(point.peer, f"x{number}", HERE)
        with pytest.raises(NetworkError, match="400"):
            await one.register(point.peer, "y", HERE)
        back = wire.encode_request(Unregister("x0")) + wire.encode_request(Discover("x0"))
        (answer,) = await ask(one, point, back)
        assert wire.decode_discovered(answer).records == ()
        await one.register(point.peer, "y", HERE)


async def test_strangers_are_served_by_an_open_point_only() -> None:
    for open_to_all in (False, True):
        config = replace(RELAY, relay_open=open_to_all)
        async with open_libp2p_network(seed(77), config) as point, networks(1) as (one,):
            await join(one, point, admit=False)
            if open_to_all:
                await one.register(point.peer, "x", HERE)
            else:
                with pytest.raises(NetworkError):
                    await one.register(point.peer, "x", HERE)
    async with networks(2, LOCAL) as (one, other):
        await join(one, other)
        with pytest.raises(ServiceRefused):
            await one.discover(other.peer, "x")


async def test_garbage_and_a_client_that_says_nothing_cost_the_point_a_stream_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with at_a_point(1) as (point, one):
        for said in (b"\x05hello", b"\xff\xff\xff\xff\xff", wire.encode_registered(Registered(0))):
            with pytest.raises((StreamReset, WireError)):
                await ask(one, point, said)
        monkeypatch.setattr(rendezvous, "REQUEST_LIMIT", 0.05)
        async with await one.open_stream(point.peer, wire.PROTOCOL) as stream:
            await stream.send_all(b"\x05")
            with pytest.raises(StreamReset):
                await receive_frame(stream, wire.MAX_ANSWER)
        monkeypatch.setattr(rendezvous, "REQUEST_LIMIT", 60.0)
        await one.register(point.peer, "x", HERE)


async def test_a_point_that_lies_or_says_nothing_is_an_error_and_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = 0

    async def lie(stream: Stream) -> None:
        """Somebody new in each answer, for ever, and somebody whom nobody signed."""
        nonlocal turns
        async for _ in stream:
            turns += 1
            records = (wire.make_record(seed(turns % 250 + 1), 1, HERE), b"nobody")
            await stream.send_all(wire.encode_discovered("x", Discovered(0, records, b"more"), (1, 1)))

    async def silence(stream: Stream) -> None:
        await trio.sleep_forever()

    async with networks(2) as (one, liar):
        await join(one, liar)
        liar.set_handler(wire.PROTOCOL, lie)
        with trio.fail_after(60):
            found = await one.discover(liar.peer, "x")
        assert len(found) <= rendezvous.MAX_FOUND
        assert turns <= rendezvous.MAX_FOUND + 1
        liar.set_handler(wire.PROTOCOL, silence)
        monkeypatch.setattr(rendezvous, "REQUEST_LIMIT", 0.05)
        with pytest.raises(NetworkError, match="too slow"):
            await one.discover(liar.peer, "x")
        with pytest.raises(NetworkError, match="too slow"):
            await one.register(liar.peer, "x", HERE)

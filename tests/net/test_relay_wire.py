"""The messages of circuit relay v2 and DCUtR: golden bytes both ways, also by stock py-libp2p's own classes, and garbage."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.relay.circuit_v2.pb import circuit_pb2, dcutr_pb2

from libmesh import keys
from libmesh.net import relay_wire as wire
from libmesh.net.relay_wire import (
    Answer,
    Connect,
    Limit,
    PunchAddresses,
    PunchNow,
    Reservation,
    Reserve,
    Status,
)
from libmesh.wire_pieces import WireError
from tests.members import peer, seed

PEER = peer(1)
ID = "0a26002408011220" + keys.public_key_of(PEER).hex()
ADDRESS = "/ip4/192.0.2.1/tcp/4001"
LONG = f"{ADDRESS}/p2p/{PEER}"
LONG_HEX = "04c0000201060fa1a50326002408011220" + keys.public_key_of(PEER).hex()

GOLDEN: list[tuple[Any, Any, Any, str]] = [
    (Reserve(), wire.encode_hop_request, wire.decode_hop_request, "020800"),
    (Connect(PEER), wire.encode_hop_request, wire.decode_hop_request, f"2c08011228{ID}"),
    (Answer(204), wire.encode_hop_answer, wire.decode_hop_answer, "05080228cc01"),
    (
        Answer(100, limit=Limit(7, 9)),
        wire.encode_hop_answer,
        wire.decode_hop_answer,
        "0a08022204080710092864",
    ),
    (
        Answer(100, Reservation(17, (LONG,), b"v")),
        wire.encode_hop_answer,
        wire.decode_hop_answer,
        f"3e08021a3808111231{LONG_HEX}1a01762864",
    ),
    (Connect(PEER), wire.encode_stop_request, wire.decode_stop_request, f"2c08001228{ID}"),
    (
        Connect(PEER, Limit(7, 0)),
        wire.encode_stop_request,
        wire.decode_stop_request,
        f"3208001228{ID}1a0408071000",
    ),
    (100, wire.encode_stop_answer, wire.decode_stop_answer, "0408012064"),
    (PunchNow(), wire.encode_punch, wire.decode_punch, "0308ac02"),
    (PunchAddresses((ADDRESS,)), wire.encode_punch, wire.decode_punch, "0c0864120804c0000201060fa1"),
]


@pytest.mark.parametrize(("value", "encode", "decode", "golden"), GOLDEN, ids=lambda value: str(value)[:40])
def test_values_and_bytes(value: Any, encode: Any, decode: Any, golden: str) -> None:
    assert encode(value).hex() == golden
    assert decode(bytes.fromhex(golden)[1:]) == value


def test_stock_py_libp2p_reads_and_writes_the_same() -> None:
    hop = circuit_pb2.HopMessage.FromString(wire.encode_hop_request(Connect(PEER))[1:])
    assert (hop.type, hop.peer.id.hex()) == (circuit_pb2.HopMessage.CONNECT, ID[4:])
    said = circuit_pb2.HopMessage(
        type=circuit_pb2.HopMessage.STATUS, status=circuit_pb2.Status.NO_RESERVATION
    )
    assert wire.decode_hop_answer(said.SerializeToString()) == Answer(Status.NO_RESERVATION)
    punch = dcutr_pb2.HolePunch.FromString(wire.encode_punch(PunchAddresses((ADDRESS,)))[1:])
    assert (punch.type, len(punch.ObsAddrs)) == (dcutr_pb2.HolePunch.CONNECT, 1)


def test_an_answer_of_a_kind_that_we_do_not_know_is_still_one() -> None:
    assert wire.decode_hop_answer(bytes.fromhex("080228e707")).status == 999
    assert wire.decode_stop_answer(bytes.fromhex("080120e707")) == 999


def test_addresses_that_we_cannot_read_are_left_out() -> None:
    data = bytes.fromhex("0864" + "1202ffff" + "120804c0000201060fa1")
    assert wire.decode_punch(data) == PunchAddresses((ADDRESS,))


def test_only_so_many_addresses_are_told_and_read() -> None:
    many = tuple(f"/ip4/192.0.2.1/tcp/{port}" for port in range(1, 60))
    told = wire.decode_punch(wire.encode_punch(PunchAddresses(many))[2:])
    assert told == PunchAddresses(many[: wire.MAX_PUNCH_ADDRESSES])


def test_a_voucher_is_an_envelope_signed_by_the_relay() -> None:
    voucher = wire.make_voucher(seed(7), PEER, 17)
    relay = keys.public_key(seed(7))
    assert voucher.hex().startswith("0a2408011220" + relay.hex() + "12020302")
    payload = voucher[42 + 2 : -66]
    signed = b"\x11libp2p-relay-rsvp\x02\x03\x02" + bytes([len(payload)]) + payload
    assert keys.verify(relay, signed, voucher[-64:])


BAD = [
    (wire.decode_hop_request, ""),
    (wire.decode_hop_request, "0802"),
    (wire.decode_hop_request, "0801"),
    (wire.decode_hop_request, "08011202" + "0a00"),
    (wire.decode_hop_request, "0801" + "1243" + "0a41" + "00" * 65),
    (wire.decode_hop_request, "ff"),
    (wire.decode_hop_answer, "0800"),
    (wire.decode_hop_answer, ""),
    (wire.decode_stop_request, "0801"),
    (wire.decode_stop_request, ""),
    (wire.decode_stop_answer, "0800"),
    (wire.decode_punch, ""),
    (wire.decode_punch, "0801"),
    (wire.decode_punch, "00" * 5000),
]


@pytest.mark.parametrize(("decode", "data"), BAD)
def test_what_makes_no_sense_is_refused(decode: Any, data: str) -> None:
    with pytest.raises(WireError):
        decode(bytes.fromhex(data))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_wire_error(data: bytes) -> None:
    for decode in (
        wire.decode_hop_request,
        wire.decode_hop_answer,
        wire.decode_stop_request,
        wire.decode_stop_answer,
        wire.decode_punch,
    ):
        try:
            decode(data)
        except WireError:
            continue


def test_every_refusal_has_words() -> None:
    refusals = {status for status in Status if 200 <= status < 300}
    assert set(wire.WORDS) == refusals

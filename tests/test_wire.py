"""Bytes of the wire: the golden ones of `tests/vectors`, both ways, and any others."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libmesh import keys, tokens, wire, wire_pieces
from libmesh.core.announcement import SIGNING_CONTEXT
from libmesh.core.credentials import Invite
from libmesh.core.summary import Digest
from libmesh.errors import InviteMalformed
from libmesh.peers import Scope, Service
from libmesh.wire_pieces import WireError
from tests.members import HOUR, MESH, NOW, announcement, credential, key, peer, record, seed
from tests.vector_cases import TABLE, vectors
from tests.vector_form import CODECS, FOLDER, value_from_json, value_to_json

ROOT = Path(__file__).resolve().parents[1]


def load(message: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{message}.json").read_text())  # type: ignore[no-any-return]


def entries(which: str) -> list[Any]:
    return [
        pytest.param(message, entry, id=f"{message}: {entry['name']}")
        for message in CODECS
        for entry in load(message)[which]
    ]


def bytes_of(entry: dict[str, Any]) -> Any:
    return entry["text"] if "text" in entry else bytes.fromhex(entry["hex"])


@pytest.mark.parametrize(("message", "entry"), entries("valid"))
def test_a_valid_message_means_its_value(message: str, entry: dict[str, Any]) -> None:
    value = value_from_json(message, entry["value"])
    assert value_to_json(message, value) == entry["value"]
    assert CODECS[message].decode(bytes_of(entry)) == value
    if entry.get("canonical", True):
        assert CODECS[message].encode(value) == bytes_of(entry)


@pytest.mark.parametrize(("message", "entry"), entries("invalid"))
def test_an_invalid_message_is_refused(message: str, entry: dict[str, Any]) -> None:
    with pytest.raises((WireError, InviteMalformed)):
        CODECS[message].decode(bytes_of(entry))


@pytest.mark.parametrize("message", TABLE)
def test_the_vectors_are_those_that_the_seeds_make(message: str) -> None:
    made = json.loads(vectors(message))
    assert made == load(message), "stale; run `python tools/make_vectors.py`"


def test_every_message_of_the_specification_has_vectors() -> None:
    proto = (ROOT / "proto" / "libmesh" / "v1" / "mesh.proto").read_text()
    named = {line.split()[1] for line in proto.splitlines() if line.startswith("message ")}
    parts = {"Link", "Credential", "Contact", "Record", "Announcement", "Service", "Suspicion", "Part"}
    covered = {"".join(word.title() for word in message.split("_")) for message in CODECS}
    assert named - parts == covered


# ── what the vectors cannot show ─────────────────────────────────────────────────────────────────────────────────

DECODERS: dict[str, Callable[[bytes], object]] = {
    message: codec.decode for message, codec in CODECS.items() if message != "invite"
}


@pytest.mark.parametrize("message", DECODERS)
@given(data=st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(message: str, data: bytes) -> None:
    with suppress(WireError):
        DECODERS[message](data)


@pytest.mark.parametrize("message", DECODERS)
@given(data=st.data())
def test_damaged_messages_decode_or_are_refused(message: str, data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from(load(message)["valid"]))
    damaged = bytearray.fromhex(entry["hex"])
    for _ in range(data.draw(st.integers(1, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with suppress(WireError):
        DECODERS[message](bytes(damaged))


@given(st.text(max_size=100))
def test_any_text_is_a_token_or_is_refused(text: str) -> None:
    with pytest.raises(InviteMalformed):
        tokens.decode_invite(text)
    with pytest.raises(InviteMalformed):
        tokens.decode_invite("lm1" + text)


GOOD_TOKEN = tokens.encode_invite(
    Invite(authority=MESH.delegate(scope=Scope.CLIENT, not_after_unix=NOW + HOUR, seed=seed(50)))
)


@given(st.integers(3, len(GOOD_TOKEN) - 1), st.characters(codec="ascii", categories=("L", "N")))
def test_a_typo_in_a_token_is_told(position: int, character: str) -> None:
    mistyped = GOOD_TOKEN[:position] + character + GOOD_TOKEN[position + 1 :]
    if character != GOOD_TOKEN[position] and position != len(GOOD_TOKEN) - 1:
        with pytest.raises(InviteMalformed, match="mistyped"):
            tokens.decode_invite(mistyped)


def test_a_token_with_two_addresses_has_under_600_characters() -> None:
    """At any depth would be too much to ask; through one inviter it holds."""
    inviter = MESH.delegate(scope=Scope.INVITE, not_after_unix=NOW, seed=seed(50))
    contacts = (
        (peer(1), ("/ip4/203.0.113.255/tcp/65535", "/ip6/2001:db8:ffff:ffff:ffff:ffff:ffff:ffff/tcp/65535")),
    )
    direct = tokens.encode_invite(Invite(authority=inviter, contacts=contacts))
    assert len(direct) < 600
    assert direct.isascii()


LIMITS: list[tuple[str, int]] = [
    ("hello", 4 * 1024),
    ("hello_reply", 4 * 1024),
    ("digest", 1024 * 1024),
    ("records", 8 * 1024 * 1024),
    ("gossip", 60 * 1024),
    ("revocation", 4 * 1024),
    ("probe", 1024),
    ("probe_answer", 1024),
    ("open", 1024),
    ("opened", 1024),
    ("post", 60 * 1024),
]


@pytest.mark.parametrize(("message", "limit"), LIMITS)
def test_a_message_has_at_most_its_limit(message: str, limit: int) -> None:
    """A valid message, made longer by an unknown field until it is just too long."""
    good = bytes_of(load(message)["valid"][0])
    header = b"\x9a\x06"  # field 99, with its length
    for total, fits in ((limit, True), (limit + 1, False)):
        room = total - len(good) - len(header)
        size = next(n for n in (1, 2, 3, 4) if room - n < 1 << 7 * n)
        length = bytes((room - size) >> 7 * i & 0x7F | (0x80 if i < size - 1 else 0) for i in range(size))
        data = good + header + length + bytes(room - size)
        assert len(data) == total
        if fits:
            DECODERS[message](data)
        else:
            with pytest.raises(WireError, match=f"at most {limit}"):
                DECODERS[message](data)


def test_attributes_have_at_most_48_kib() -> None:
    most = record(1, attributes=bytes(wire.MAX_ATTRIBUTES))
    assert wire.decode_gossip(wire.encode_gossip(most)) == most
    with pytest.raises(WireError, match="attributes"):
        wire.decode_gossip(wire.encode_gossip(record(1, attributes=bytes(wire.MAX_ATTRIBUTES + 1))))


def test_at_most_1024_revocations_are_taken() -> None:
    one = MESH.revoke(credential(1).links)
    assert len(wire.decode_records(wire.encode_records([], [one] * 1024))[1]) == 1024
    with pytest.raises(WireError, match="1025 revocations"):
        wire.decode_records(wire.encode_records([], [one] * 1025))


def test_records_that_do_not_fit_are_left_out() -> None:
    large = record(1, attributes=bytes(wire.MAX_ATTRIBUTES))
    encoded = wire.encode_records([large] * 200)
    assert len(encoded) <= wire.MAX_RECORDS
    assert 100 < len(wire.decode_records(encoded)[0]) < 200


def test_a_digest_of_4096_peers_fits() -> None:
    ages = {keys.peer_id_of(n.to_bytes(32, "big")): (2**63, 2**63) for n in range(4096)}
    digest = Digest(ages, frozenset(ages))
    assert wire.decode_digest(wire.encode_digest(digest)) == digest


def test_a_record_is_signed_by_its_peer_over_the_context_and_its_bytes() -> None:
    sealed = record(1)
    assert keys.verify(key(1).public, SIGNING_CONTEXT + sealed.body, sealed.signature)
    assert wire.seal(announcement(1), seed(1)) == sealed


def test_a_long_agent_is_cut() -> None:
    hello = wire.Hello(agent="x" * 200, credential=credential(1))
    assert wire.decode_hello(wire.encode_hello(hello)).agent == "x" * 128
    reply = wire.HelloReply(agent="x" * 200, refusal="busy")
    assert wire.decode_hello_reply(wire.encode_hello_reply(reply)).agent == "x" * 128
    admitted = wire.HelloReply(agent="x" * 200, credential=credential(1))
    assert wire.decode_hello_reply(wire.encode_hello_reply(admitted)).agent == "x" * 128


@pytest.mark.parametrize(
    "text", ["", "nonsense", "192.0.2.1:4001", "/ip4/192.0.2.256/tcp/1", "/ip4/1.2.3.4/tcp/99999"]
)
def test_what_is_no_multiaddr_cannot_be_announced(text: str) -> None:
    with pytest.raises(ValueError, match="multiaddr"):
        wire_pieces.encode_address(text)


@given(st.binary(max_size=80))
def test_an_address_that_is_read_is_one_that_can_be_passed_on(data: bytes) -> None:
    assert [wire_pieces.encode_address(text) for text in wire_pieces.addresses_from_pb([data])] in (
        [],
        [data],
    )


@pytest.mark.parametrize(
    "name", ["", "x" * 256, "é" * 128, "a\tb", "\x7f", "\x85", "\u200e", "\u202e", "\u2069", "\ud800"]
)
def test_bad_service_names(name: str) -> None:
    assert not wire_pieces.valid_service_name(name)


@pytest.mark.parametrize(
    "name", ["a", "x" * 255, "é" * 127, "api/Qwen 3:8B", " ", "👩\u200d🚀", "\U0001fae9", "\ue000"]
)
def test_good_service_names(name: str) -> None:
    assert wire_pieces.valid_service_name(name)
    assert wire.decode_open(wire.encode_open(name)) == name


def test_what_makes_no_record_can_not_be_sealed() -> None:
    with pytest.raises(ValueError, match="multiaddr"):
        record(1, addresses=("nonsense",))
    assert (
        record(1, services=(Service(name="a", scope=Scope.WORKER),)).announcement.services[0].scope
        is Scope.WORKER
    )

"""What is said on a LAN, byte for byte, to whom it means something, and what garbage does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libmesh.net.discovery import mdns_wire as wire
from libmesh.net.discovery.mdns_wire import Notice

MESH = "0123456789abcdef0123456789abcdef"
SALT = bytes(range(8))
ADDRESS = "/ip4/192.168.1.10/tcp/4001/p2p/12D3KooWQYMzAzVj1ZhwcHiE9GBkKusYRdxJh35Gbv8ivLTNJrbc"


def test_a_question_is_a_plain_dns_question() -> None:
    assert wire.encode_question().hex() == (
        "000000000001000000000000"
        + "085f6c69626d657368"
        + "045f756470"
        + "056c6f63616c"
        + "00"
        + "000c"
        + "0001"
    )
    assert wire.is_question(wire.encode_question())


def test_a_notice_and_its_bytes_are_inverses() -> None:
    notice = Notice("abc", wire.mesh_mark(MESH, SALT), (ADDRESS,))
    data = wire.encode_notice(notice)
    assert wire.decode_notices(data) == [notice]
    assert not wire.is_question(data)
    assert wire.decode_notices(wire.encode_question()) == []
    assert wire.decode_notices(wire.encode_notice(Notice("abc", "", (), 0)))[0].ttl == 0


def test_a_notice_names_the_mesh_to_those_who_know_it_only() -> None:
    mark = wire.mesh_mark(MESH, SALT)
    assert wire.is_marked(mark, MESH)
    assert not wire.is_marked(mark, MESH[::-1])
    assert MESH.encode() not in wire.encode_notice(Notice("abc", mark, (ADDRESS,)))
    assert wire.mesh_mark(MESH, bytes(8)) != mark


@pytest.mark.parametrize("mark", ["", ".", "x" * 16 + ".00", "00.00", SALT.hex(), "é" * 16 + "."])
def test_a_broken_mark_is_nobody_s(mark: str) -> None:
    assert not wire.is_marked(mark, MESH)


def test_a_notice_fits_into_one_packet() -> None:
    data = wire.encode_notice(Notice("abc", wire.mesh_mark(MESH, SALT), (ADDRESS * 2,) * 100))
    assert len(data) <= wire.MAX_MESSAGE
    assert 0 < len(wire.decode_notices(data)[0].addresses) <= wire.MAX_ADDRESSES


def test_compressed_names_of_other_programs_are_read() -> None:
    service = b"\x08_libmesh\x04_udp\x05local\x00"
    head = bytes.fromhex("000084000000000200000000")
    pointer = service + bytes.fromhex("000c0001000000780006") + b"\x03abc\xc0\x0c"
    text = b"\x03abc\xc0\x0c" + bytes.fromhex("0010800100000078") + b"\x00\x07\x06mesh=x"
    assert wire.decode_notices(head + pointer + text) == [Notice("abc", "x", ())]


def test_other_services_are_none_of_ours() -> None:
    data = wire.encode_question().replace(b"_libmesh", b"_airplay")
    assert not wire.is_question(data)
    notice = wire.encode_notice(Notice("abc", "x", ())).replace(b"_libmesh", b"_airplay")
    assert wire.decode_notices(notice) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes.fromhex("000084000000000100000000") + b"\xc0\x0c",  # a name that is itself
        bytes.fromhex("000084000000000100000000") + b"\xc0\xff",
        bytes.fromhex("000084000000000100000000") + b"\x80",
        bytes.fromhex("000084000000000100000000") + b"\x3fa",
        bytes.fromhex("000084000000000100000000") + (b"\x3f" + b"a" * 63) * 5 + b"\0",
    ],
)
def test_broken_messages_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="a "):
        wire.decode_notices(data)


@given(st.binary(max_size=120))
def test_garbage_is_read_or_refused(data: bytes) -> None:
    for read in (wire.is_question, wire.decode_notices):
        try:
            read(data)
        except ValueError:
            continue

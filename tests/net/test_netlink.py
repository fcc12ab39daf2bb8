"""Which of the kernel's messages are a change of the network."""

from __future__ import annotations

import socket
import struct

from hypothesis import given
from hypothesis import strategies as st

from libmesh.net.netlink import MAX_KNOWN, NetlinkNews

UP, RUNNING, PROMISCUOUS = 0x1, 0x40, 0x100
TENTATIVE = 0x40


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body + bytes(-len(body) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def link(index: int, flags: int, *, kind: int = 16, more: bytes = b"") -> bytes:
    return message(kind, struct.pack("=BxHiII", 0, 1, index, flags, 0) + attribute(3, b"wlan0\0") + more)


def address(host: str, *, kind: int = 20, flags: int = 0, lifetime: int = 0) -> bytes:
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    body = struct.pack("=BBBBI", 10, 64, flags, 0, 2) + attribute(1, packed)
    return message(kind, body + attribute(6, struct.pack("=IIII", lifetime, lifetime, 0, 0)))


def route(table: int, route_type: int = 1, kind: int = 24) -> bytes:
    return message(kind, struct.pack("=BBBBBBBBI", 2, 0, 0, 0, table, 3, 0, route_type, 0))


def test_a_link_is_news_when_its_state_changes_and_not_when_it_scans() -> None:
    news = NetlinkNews()
    assert news.told(link(2, UP | RUNNING))
    for number in range(5):
        assert not news.told(link(2, UP | RUNNING, more=attribute(11, bytes([number]))))
        assert not news.told(link(2, UP | RUNNING | PROMISCUOUS))
    assert news.told(link(2, UP))
    assert news.told(link(2, UP | RUNNING))
    assert news.told(link(2, UP | RUNNING, kind=17))
    assert news.told(link(2, UP | RUNNING)), "it is there again"


def test_an_address_that_is_kept_alive_is_no_news() -> None:
    news = NetlinkNews()
    assert news.told(address("2001:db8::1", flags=TENTATIVE))
    assert news.told(address("2001:db8::1")), "only now can it be used"
    assert not any(news.told(address("2001:db8::1", lifetime=left)) for left in range(100))
    assert news.told(address("2001:db8::2"))
    assert news.told(address("2001:db8::1", kind=21))


def test_routes_to_elsewhere_are_news_and_those_to_oneself_are_not() -> None:
    news = NetlinkNews()
    assert news.told(route(254))
    assert news.told(route(254, kind=25))
    assert not news.told(route(255, route_type=2))
    assert not news.told(route(254, route_type=5))


def test_one_change_among_repetitions_is_one_and_all_are_remembered() -> None:
    news = NetlinkNews()
    news.told(link(1, UP) + link(2, UP) + address("192.0.2.1"))
    assert not news.told(link(1, UP) + address("192.0.2.1") + link(2, UP))
    assert news.told(link(1, UP) + link(2, UP | RUNNING) + address("192.0.2.2"))
    assert not news.told(address("192.0.2.2"))


def test_what_is_remembered_is_bounded() -> None:
    news = NetlinkNews()
    for index in range(MAX_KNOWN + 10):
        assert news.told(link(index, UP))
    assert len(news._known) <= MAX_KNOWN


def test_kinds_that_say_nothing_of_the_network_are_none() -> None:
    assert not NetlinkNews().told(message(28, bytes(12)))
    assert not NetlinkNews().told(b"")


@given(st.binary(max_size=200), st.sampled_from([16, 17, 20, 21, 24, 25, 99]))
def test_nonsense_raises_nothing(data: bytes, kind: int) -> None:
    news = NetlinkNews()
    news.told(data)
    news.told(message(kind, data))
    assert news.told(b"\x01")
    assert news.told(struct.pack("=IHHII", 8, kind, 0, 0, 0))
    assert news.told(struct.pack("=IHHII", 2**31, kind, 0, 0, 0))

"""Whom a node on a LAN hears, and to whom it says that it is there; on a network of the test's own making."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
import trio.testing

from libmesh.net.discovery import mdns
from libmesh.net.discovery import mdns_wire as wire
from libmesh.net.discovery.mdns import ASK_EVERY, LanDiscovery
from libmesh.net.discovery.mdns_wire import Notice
from libmesh.peers import MeshId, PeerId
from tests.members import peer

MESH = MeshId("0123456789abcdef0123456789abcdef")
HOST, NEIGHBOUR = "192.168.1.10", "192.168.1.20"


class Lan:
    """A socket on a LAN where what is put into `arriving` comes from a neighbour."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.put, self.arriving = trio.open_memory_channel[bytes | OSError](16)

    def __enter__(self) -> Lan:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def setsockopt(self, *_: object) -> None:
        pass

    async def bind(self, _: object) -> None:
        pass

    async def sendto(self, data: bytes, _: object) -> None:
        self.sent.append(data)

    async def recvfrom(self, _: int) -> tuple[bytes, tuple[str, int]]:
        said = await self.arriving.receive()
        if isinstance(said, OSError):
            raise said
        return said, (NEIGHBOUR, 5353)

    @property
    def notices(self) -> list[Notice]:
        return [notice for data in self.sent for notice in wire.decode_notices(data)]


@pytest.fixture
def lan(monkeypatch: pytest.MonkeyPatch) -> Lan:
    it = Lan()
    monkeypatch.setattr(mdns, "_open_socket", lambda: it)
    monkeypatch.setattr(mdns, "_join_all", lambda _: [HOST])
    return it


def discovery(found: list[tuple[PeerId, tuple[str, ...]]], **how: Any) -> LanDiscovery:
    return LanDiscovery(MESH, peer(1), lambda: 4001, lambda who, where: found.append((who, where)), **how)


def notice_of(who: PeerId, *addresses: str) -> bytes:
    mark = wire.mesh_mark(MESH, bytes(8))
    return wire.encode_notice(Notice("neighbour", mark, tuple(f"{a}/p2p/{who}" for a in addresses)))


async def test_only_addresses_of_the_sender_are_believed(
    lan: Lan, autojump_clock: trio.testing.MockClock
) -> None:
    found: list[tuple[PeerId, tuple[str, ...]]] = []
    own = f"/ip4/{NEIGHBOUR}/tcp/4002"
    lan.put.send_nowait(notice_of(peer(2), "/ip4/203.0.113.7/tcp/22", "/ip4/127.0.0.1/tcp/22", own))
    lan.put.send_nowait(notice_of(peer(3), "/ip4/192.168.1.99/tcp/22", "/dns4/example.org/tcp/22"))
    with trio.move_on_after(1):
        await discovery(found).run()
    assert found == [(peer(2), (own,))]


async def test_who_is_silent_asks_and_hears_and_says_nothing_of_itself(
    lan: Lan, autojump_clock: trio.testing.MockClock
) -> None:
    found: list[tuple[PeerId, tuple[str, ...]]] = []
    silent = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(discovery(found, silent=lambda: silent).run)
        lan.put.send_nowait(wire.encode_question())
        lan.put.send_nowait(notice_of(peer(2), f"/ip4/{NEIGHBOUR}/tcp/4002"))
        await trio.sleep(30)
        assert lan.sent
        assert all(map(wire.is_question, lan.sent))
        assert [who for who, _ in found] == [peer(2)]
        silent = False
        lan.put.send_nowait(wire.encode_question())
        await trio.sleep(1)
        assert [notice.addresses for notice in lan.notices] == [(f"/ip4/{HOST}/tcp/4001/p2p/{peer(1)}",)]
        nursery.cancel_scope.cancel()
    assert [notice.ttl for notice in lan.notices] == [wire.TTL, 0], "only who was told hears a goodbye"


async def test_a_socket_that_fails_is_opened_again(lan: Lan, autojump_clock: trio.testing.MockClock) -> None:
    lan.put.send_nowait(OSError(errno.ENETDOWN, "the network is down"))
    with trio.move_on_after(ASK_EVERY - 1):
        await discovery([]).run()
    before = len(lan.sent)
    lan.put.send_nowait(OSError(errno.ENETDOWN, "the network is down"))
    with trio.move_on_after(ASK_EVERY + 5):
        await discovery([]).run()
    assert len(lan.sent) > before + 2

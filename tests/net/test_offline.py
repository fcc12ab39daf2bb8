"""A node that keeps to private networks dials nothing else, whoever asks: no hole punch, no dial back, nobody on the LAN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing

from libmesh import AdmissionConfig, MeshConfig, lan
from libmesh.errors import NetworkError
from libmesh.framing import receive_frame
from libmesh.net import dial_back, punch, reach_wire, tcp
from libmesh.net.reach_wire import Request, Response, Verdict
from tests.members import key, peer
from tests.net.hosts import LOCAL, join, networks
from tests.net.relayed import relayed
from tests.town import town

PUBLIC, PRIVATE = "/ip4/11.0.0.1/tcp/4001", "/ip4/127.0.0.1/tcp/1"
OFFLINE = replace(LOCAL, private_only=True)


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is dialled from the listener's port, and comes to nothing."""
    found: list[str] = []

    async def note(port: int, address: str) -> trio.SocketStream:
        found.append(address)
        await trio.lowlevel.checkpoint()
        raise OSError("nothing is there")

    monkeypatch.setattr(tcp, "dial_from", note)
    return found


async def test_no_hole_is_punched_to_a_public_address(
    monkeypatch: pytest.MonkeyPatch, dialled: list[str]
) -> None:
    monkeypatch.setattr("tests.net.relayed.LOCAL", OFFLINE)
    monkeypatch.setattr(punch.Puncher, "_own_addresses", lambda self: (PUBLIC, PRIVATE))
    monkeypatch.setattr(punch, "ATTEMPTS", 1)
    async with relayed() as nodes:
        await nodes.connect()
        with pytest.raises(NetworkError):
            await nodes.target.punch(nodes.source.peer)
    assert set(dialled) == {PRIVATE}


async def test_nobody_is_dialled_back_at_a_public_address(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object) -> bool:
        raise AssertionError("it was dialled")

    monkeypatch.setattr(dial_back, "dial_back", refuse)
    with trio.fail_after(60):
        async with networks(2, OFFLINE) as (one, other):
            await join(one, other)
            stream = await one.open_stream(other.peer, reach_wire.DIAL_REQUEST)
            await stream.send_all(reach_wire.encode(Request((PUBLIC,), 7)))
            answer = reach_wire.decode(await receive_frame(stream, reach_wire.MAX_MESSAGE))
    assert answer == Response(Verdict.REFUSED)


async def test_what_somebody_on_the_lan_names_beyond_it_is_passed_over(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        offline = MeshConfig(admission=AdmissionConfig(offline=True))
        mesh = await place._open(1, mesh_key=key(100), config=offline)
        tried: list[tuple[str, ...]] = []

        async def note(_: object, addresses: tuple[str, ...]) -> None:
            tried.append(addresses)
            await trio.lowlevel.checkpoint()

        mesh._driver.admission.connect = note  # type: ignore[method-assign, assignment]
        await lan._meet(mesh._driver, peer(9), (PUBLIC,))
        await lan._meet(mesh._driver, peer(9), (PUBLIC, PRIVATE))
        assert tried == [(PRIVATE,)]

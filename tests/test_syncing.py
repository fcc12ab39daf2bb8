"""Comparing what two peers know, what happens to connections of no more use, and keeping to the LAN. In virtual time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from libmesh import AdmissionConfig, Mesh, MeshConfig, PeerState, Stream, wire
from libmesh.core.membership_io import MembershipConfig
from libmesh.core.roster import Entry
from libmesh.framing import frame, receive_frame
from libmesh.syncing import COMPARE_PROTOCOL, PROTOCOL
from libmesh.testing.memory import MemoryNetwork
from tests.members import key, peer, record
from tests.town import Town, client_invite, settled, state, town, until


@contextmanager
def opened(network: MemoryNetwork) -> Iterator[list[str]]:
    """The protocols of the streams that are opened from now on."""
    protocols: list[str] = []
    open_stream = network.open_stream

    async def note(to: object, protocol: str) -> Stream:
        protocols.append(protocol)
        return await open_stream(to, protocol)  # type: ignore[arg-type]

    network.open_stream = note  # type: ignore[method-assign]
    yield protocols
    network.open_stream = open_stream  # type: ignore[method-assign]


def slip_in(mesh: Mesh, number: int) -> None:
    """Let a peer know of another one that gossip has not told of."""
    roster = mesh._driver.membership._roster
    roster.add(
        peer(number), Entry(record(number, leaving=True), PeerState.LEFT, 0.0, state_ends=float("inf"))
    )


async def test_those_who_know_the_same_only_compare_fingerprints(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        one, two = await place.of(2)
        with opened(place.networks[1]) as protocols:
            assert not await one._driver._syncing.compare(two.peer)
        assert protocols == [COMPARE_PROTOCOL]


async def test_a_difference_is_told_and_nothing_else(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        one, two = await place.of(2)
        for mine, theirs in ((one, two), (two, one)):
            number = 50 if mine is one else 51
            slip_in(theirs, number)
            with opened(place.networks[1 if mine is one else 2]) as protocols:
                assert await mine._driver._syncing.compare(theirs.peer)
            assert protocols == [COMPARE_PROTOCOL, PROTOCOL]
            entry = mine.view.get(peer(number))
            assert entry is not None
            assert entry.state is PeerState.LEFT


async def test_a_peer_that_cannot_compare_is_synced_with_in_full(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        one, two = await place.of(2)
        del place.networks[2].handlers[COMPARE_PROTOCOL]
        slip_in(two, 50)
        assert not await one._driver._syncing.compare(two.peer)
        assert one.view.get(peer(50)) is not None


@pytest.mark.parametrize(
    "answer", [b"", b"\xff\xff\xff\xff", frame(b"\x0a\x01x"), frame(b"\x0a\x10" + bytes(16))]
)
async def test_nonsense_in_answer_to_a_comparison_harms_nobody(
    autojump_clock: trio.testing.MockClock, answer: bytes
) -> None:
    async def babble(stream: Stream) -> None:
        await receive_frame(stream, wire.MAX_SUMMARY)
        await stream.send_all(answer)

    async with town() as place:
        one, two = await place.of(2)
        place.networks[2].set_handler(COMPARE_PROTOCOL, babble)
        await one._driver._syncing.compare(two.peer)
        await settled([one, two])


@pytest.mark.parametrize("question", [b"\xff\xff\xff\xff", b"\x05abc", frame(b"\x0a\x01x")])
async def test_nonsense_in_place_of_a_fingerprint_is_reset(
    autojump_clock: trio.testing.MockClock, question: bytes
) -> None:
    async with town() as place:
        await place.of(2)
        stream = await place.networks[2].open_stream(peer(1), COMPARE_PROTOCOL)
        await stream.send_all(question)
        await stream.send_eof()
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(12):
            await stream.receive_some()


# ── connections of no more use ───────────────────────────────────────────────────────────────────────────────────

SPARSE = MeshConfig(membership=MembershipConfig(full_mesh=2, connections=4, spare=3.0))


async def sparse(place: Town, count: int) -> list[Mesh]:
    founder = await place._open(1, mesh_key=key(100), config=SPARSE)
    token = client_invite(founder)
    meshes = [founder, *[await place._open(n, invite=token, config=SPARSE) for n in range(2, count + 1)]]
    await until(lambda: all(state(a, b) is PeerState.ALIVE for a in meshes for b in meshes if a is not b))
    return meshes


def connected(mesh: Mesh) -> int:
    return sum(entry.path is not None for entry in mesh.view.peers)


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def test_connections_that_nobody_planned_are_closed_and_nobody_is_suspected(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = await sparse(place, 10)
        assert connected(meshes[0]) == 9  # all came in by the founder
        await until(lambda: all(connected(mesh) <= 4 for mesh in meshes), limit=20)
        for mesh in meshes:
            assert {entry.state for entry in mesh.view.peers} == {PeerState.ALIVE}


async def test_a_connection_in_use_is_kept_whoever_opened_the_stream(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = await sparse(place, 10)
        await until(lambda: all(connected(mesh) <= 4 for mesh in meshes), limit=20)
        one = meshes[0]
        other = next(m for m in meshes[1:] if one.view.get(m.peer).path is None)  # type: ignore[union-attr]
        with other.offer("echo", echo):
            stream = await one.open_service(other.peer, "echo")
            for _ in range(20):
                await trio.sleep(3)
                await stream.send_all(b"still here")
                assert await stream.receive_some() == b"still here"
            await stream.aclose()
            await until(lambda: one.view.get(other.peer).path is None, limit=20)  # type: ignore[union-attr]


# ── keeping to the LAN ───────────────────────────────────────────────────────────────────────────────────────────


async def test_offline_only_private_addresses_and_those_of_invites_are_dialled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        offline = MeshConfig(admission=AdmissionConfig(offline=True))
        mesh = await place._open(1, mesh_key=key(100), config=offline)
        admission, away = mesh._driver.admission, "/ip4/198.18.0.1/tcp/1"
        public, name = "/ip4/8.8.8.8/tcp/1", "/dns/example.com/tcp/1"
        near = ("/ip4/192.168.1.2/tcp/1", "/ip4/127.0.0.1/tcp/1", "/ip6/fd00::1/tcp/1", away)
        assert admission.allowed(peer(2), (*near, public, name)) == near
        mesh.add_contacts([(peer(3), (public, near[0]))])  # what was kept is not what somebody gave
        assert admission.allowed(peer(3), (public, near[0])) == (near[0],)
        admission.add_contacts([(peer(4), (public, name))])
        assert admission.allowed(peer(4), (name, public, "/ip4/1.1.1.1/tcp/1")) == (name, public)


async def test_online_everything_may_be_dialled(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        mesh = await place.found()
        addresses = ("/ip4/8.8.8.8/tcp/1", "/dns/example.com/tcp/1")
        assert mesh._driver.admission.allowed(peer(2), addresses) == addresses

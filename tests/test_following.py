"""Peers that only follow: they see and use the mesh, and nobody but those whom they connect to hears of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from libmesh import (
    AdmissionConfig,
    AdmissionRefused,
    Mesh,
    MeshConfig,
    PeerState,
    Scope,
    Stream,
    read_invite,
    wire,
)
from libmesh.core.membership_io import Leave
from libmesh.core.summary import Digest
from libmesh.following import PROTOCOL
from libmesh.framing import frame, receive_frame
from libmesh.peers import PeerId
from tests.members import key, peer
from tests.town import Town, client_invite, settled, state, town, until


async def follower(place: Town, number: int, token: str) -> Mesh:
    return await place._open(number, invite=token, follow=True)


def knows(mesh: Mesh, others: list[Mesh]) -> bool:
    return all(state(mesh, other) is PeerState.ALIVE for other in others)


def digests(meshes: list[Mesh]) -> set[PeerId]:
    """Whom any of them has in its table."""
    return {known for mesh in meshes for known in mesh._driver.membership.digest().ages}


@contextmanager
def gossip_counted(place: Town) -> Iterator[list[int]]:
    """The sizes of all that is published from now on."""
    published: list[int] = []
    publish = place.hub.publish

    def count(origin: PeerId, topic: str, data: bytes) -> None:
        published.append(len(data))
        publish(origin, topic, data)

    place.hub.publish = count  # type: ignore[method-assign]
    yield published
    place.hub.publish = publish  # type: ignore[method-assign]


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def test_a_follower_sees_everybody_and_stands_in_nobodys_table(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = await place.of(4)
        late = await follower(place, 9, client_invite(meshes[0]))
        await until(lambda: knows(late, meshes), limit=5)
        assert late.following
        await trio.sleep(200)
        assert late.peer not in digests([*meshes, late])
        assert all(mesh.view.get(late.peer) is None for mesh in meshes)


async def test_those_whom_a_follower_is_connected_to_show_it_with_what_it_says_of_itself(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        (founder,) = await place.of(1)
        late = await place._open(9, invite=client_invite(founder), follow=True, wait=False)
        late.announce(b"laptop")
        await until(lambda: founder.view.followers != (), limit=5)
        (shown,) = founder.view.followers
        assert (shown.peer, shown.state, shown.attributes) == (late.peer, PeerState.ALIVE, b"laptop")
        assert shown.path is not None
        async with founder.watch() as views:
            await views.receive()
            place.hub.partition({founder.peer}, {late.peer})
            assert (await views.receive()).followers == ()


async def test_news_reach_a_follower_without_gossip_and_within_a_second(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = await place.of(6)
        late = await follower(place, 9, client_invite(meshes[0]))
        await until(lambda: knows(late, meshes), limit=5)
        await trio.sleep(5)
        with meshes[3].offer("new", echo):
            meshes[4].announce(b"said")

            def heard() -> bool:
                three, four = late.view.get(meshes[3].peer), late.view.get(meshes[4].peer)
                return bool(three and three.services and four and four.attributes == b"said")

            await until(heard, limit=1)
        joined = await place.join(7, client_invite(meshes[0]))
        await until(lambda: knows(late, [joined]), limit=1)


async def test_a_follower_uses_services_of_peers_that_have_never_heard_of_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = await place.of(8)
        late = await follower(place, 9, client_invite(meshes[0]))
        for mesh in meshes:
            with mesh.offer("echo", echo):
                await until(lambda mesh=mesh: bool(late.view.get(mesh.peer).services), limit=2)  # type: ignore[misc, union-attr]
                stream = await late.open_service(mesh.peer, "echo")
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
                await stream.aclose()


async def test_a_follower_learns_of_goodbyes_and_convinces_itself_of_deaths(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = await place.of(8)
        late = await follower(place, 9, client_invite(meshes[0]))
        await until(lambda: knows(late, meshes), limit=5)
        lost = meshes[5]
        everybody = {mesh.peer for mesh in meshes} | {late.peer}
        place.hub.partition(everybody - {lost.peer}, {lost.peer})
        await until(lambda: state(late, lost) is PeerState.DEAD, limit=15)
        assert knows(late, [mesh for mesh in meshes if mesh is not lost])
        meshes[6]._driver.handle(Leave())
        await until(lambda: state(late, meshes[6]) is PeerState.LEFT, limit=2)


@pytest.mark.parametrize("many", [20])
async def test_followers_cost_gossip_nothing_however_many_there_are(
    autojump_clock: trio.testing.MockClock, many: int
) -> None:
    async with town() as place:
        meshes = await place.of(4)
        await trio.sleep(5)
        token = client_invite(meshes[0])
        with gossip_counted(place) as published:
            followers = [await follower(place, 20 + number, token) for number in range(many)]
            await until(lambda: all(knows(late, meshes) for late in followers), limit=10)
            await trio.sleep(120)
            assert published == []
        assert digests(meshes) == {mesh.peer for mesh in meshes}
        shown = [follower.peer for mesh in meshes for follower in mesh.view.followers]
        assert set(shown) == {late.peer for late in followers}


async def test_what_a_follower_revokes_holds_everywhere(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        meshes = await place.of(3)
        late = await follower(place, 9, meshes[0].invite(scope=Scope.INVITE, not_after_unix=None))
        await until(lambda: knows(late, meshes), limit=5)
        token = client_invite(late)
        guest = await place.join(10, token)
        await until(lambda: all(state(mesh, guest) is PeerState.ALIVE for mesh in meshes), limit=5)
        late.revoke(read_invite(token).chain)
        await until(lambda: all(state(mesh, guest) is PeerState.DEAD for mesh in meshes), limit=5)


async def test_a_followers_invite_names_others_as_ways_in(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        meshes = await place.of(2)
        late = await follower(place, 9, meshes[0].invite(scope=Scope.INVITE, not_after_unix=None))
        await until(lambda: knows(late, meshes), limit=5)
        assert late.peer not in [contact for contact, _ in late._ways_in()]
        await place.join(10, client_invite(late))


@pytest.mark.parametrize("how", ["offer", "publish", "subscribe"])
async def test_a_follower_that_has_something_to_say_becomes_a_peer_like_any_other(
    autojump_clock: trio.testing.MockClock, how: str
) -> None:
    async with town() as place:
        meshes = await place.of(5)
        late = await follower(place, 9, client_invite(meshes[0]))
        late.announce(b"mine")
        await until(lambda: knows(late, meshes), limit=5)
        match how:
            case "offer":
                place._stack.enter_context(late.offer("echo", echo))
            case "publish":
                await late.publish("topic", b"data")
            case "subscribe":
                await place._stack.enter_async_context(late.subscribe("topic"))
        await settled([*meshes, late])
        assert not late.following
        for mesh in meshes:
            entry = mesh.view.get(late.peer)
            assert entry is not None
            assert entry.attributes == b"mine"
            assert mesh.view.followers == ()


async def test_more_followers_than_there_is_room_for_are_refused_and_peers_are_not(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        founder = await place._open(
            1, mesh_key=key(100), config=MeshConfig(admission=AdmissionConfig(max_followers=2))
        )
        token = client_invite(founder)
        for number in (2, 3):
            await follower(place, number, token)
        with pytest.raises(AdmissionRefused, match="no room now"):
            await follower(place, 4, token)
        await place.join(5, token)


async def test_a_follower_survives_the_loss_of_those_whom_it_follows(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = await place.of(5)
        late = await follower(place, 9, client_invite(meshes[0]))
        await until(lambda: len(late._driver._following.sources) == 2, limit=5)
        gone = late._driver._following.sources
        stay = [mesh for mesh in meshes if mesh.peer not in gone]
        place.hub.partition({mesh.peer for mesh in stay} | {late.peer}, set(gone))
        await trio.sleep(20)
        stay[0].announce(b"later")
        await until(lambda: late.view.get(stay[0].peer).attributes == b"later", limit=2)  # type: ignore[union-attr]


# ── on the wire ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_follower_that_does_not_read_costs_a_line_for_each_peer_and_then_gets_the_newest(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = await place.of(3)
        stream = await meshes[1]._driver.network.open_stream(meshes[0].peer, PROTOCOL)
        await stream.send_all(frame(wire.encode_digest(Digest({}))))
        for number in range(60):
            meshes[2].announce(bytes(20_000) + b"%d" % number)
            await trio.sleep(0.5)
        inbox = meshes[0]._driver._herald._inboxes[meshes[1].peer]
        assert len(inbox.peers) <= 3
        newest = b""
        while not newest.endswith(b"59"):
            said = wire.decode_gossip(await receive_frame(stream, wire.MAX_RECORD))
            assert hasattr(said, "announcement")
            if said.announcement.peer == meshes[2].peer:
                newest = said.announcement.attributes
        stream.reset()


@pytest.mark.parametrize("said", [b"\xff\xff\xff\xff", b"\x02\xff\xff", b""])
async def test_who_asks_for_news_in_nonsense_is_told_none(
    autojump_clock: trio.testing.MockClock, said: bytes
) -> None:
    async with town() as place:
        meshes = await place.of(2)
        stream = await meshes[1]._driver.network.open_stream(meshes[0].peer, PROTOCOL)
        await stream.send_all(said)
        await stream.send_eof()
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(12):
            await stream.receive_some()
        assert meshes[0]._driver._herald._inboxes == {}
        await settled(meshes)


async def test_a_follower_has_one_stream_of_news_and_the_last_one_counts(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = await place.of(2)
        opening = frame(wire.encode_digest(Digest({})))
        streams = []
        for _ in range(3):
            streams.append(await meshes[1]._driver.network.open_stream(meshes[0].peer, PROTOCOL))
            await streams[-1].send_all(opening)
            await trio.sleep(1)
        assert len(meshes[0]._driver._herald._inboxes) == 1
        for former in streams[:2]:
            await former.receive_some()
            with pytest.raises(trio.BrokenResourceError):
                await former.receive_some()
        assert await streams[2].receive_some()


async def test_strangers_are_told_no_news(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder = await place.found()
        stranger = await place.network(9)
        await stranger.connect(founder.peer, founder.addresses)
        stream = await stranger.open_stream(founder.peer, PROTOCOL)
        await stream.send_all(frame(wire.encode_digest(Digest({}))))
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(12):
            await stream.receive_some()


async def test_a_mesh_of_one_who_left_is_followed_again_when_it_is_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        founder = await place.found()
        token = client_invite(founder)
        late = await follower(place, 9, token)
        place.hub.cut(founder.peer, late.peer)
        await until(lambda: founder.view.followers != (), limit=40)
        assert founder.view.followers[0].peer == late.peer == peer(9)


async def test_following_is_for_guests_and_founders_alike(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        alone = await place._open(3, mesh_key=key(100), follow=True)
        guest = await place.join(4, client_invite(alone))
        assert guest.view.followers[0].peer == alone.peer
        await until(lambda: knows(alone, [guest]), limit=3)

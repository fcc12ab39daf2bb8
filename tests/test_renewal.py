"""A membership that nears its end is renewed by another invite, without leaving; one that ends is cut off. Virtual time."""

from __future__ import annotations

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
    StreamReset,
    open_mesh,
    read_invite,
)
from tests.members import NOW, key
from tests.town import clock, state, town, until

END = 100
"""Seconds until the first membership ends."""


async def echo(stream: Stream) -> None:
    async for data in stream:
        await stream.send_all(data)


def invite(mesh: Mesh, *, scope: Scope = Scope.CLIENT, ends: int | None = END) -> str:
    return mesh.invite(scope=scope, not_after_unix=None if ends is None else NOW + ends)


@pytest.mark.parametrize("follow", [False, True], ids=["member", "follower"])
async def test_membership_that_ends_ends_its_streams(
    autojump_clock: trio.testing.MockClock, follow: bool
) -> None:
    async with town() as place:
        founder = await place.found()
        guest = await place._open(2, invite=invite(founder), follow=follow)
        with founder.offer("echo", echo):
            stream = await guest.open_service(founder.peer, "echo")
            started = trio.current_time()
            with pytest.raises(StreamReset), trio.fail_after(END + 60):
                await stream.receive_some()
            assert trio.current_time() - started <= END + 31
        assert founder.view.followers == ()
        await until(lambda: state(founder, guest) in (None, PeerState.DEAD), limit=1)


@pytest.mark.parametrize("follow", [False, True], ids=["member", "follower"])
async def test_renewed_membership_keeps_its_streams_beyond_the_first_end(
    autojump_clock: trio.testing.MockClock, follow: bool
) -> None:
    async with town() as place:
        founder, other = await place.of(2)
        guest = await place._open(3, invite=invite(founder), follow=follow)
        await until(lambda: state(guest, other) is PeerState.ALIVE)
        with founder.offer("echo", echo), other.offer("echo", echo):
            streams = [await guest.open_service(mesh.peer, "echo") for mesh in (founder, other)]
            await trio.sleep(END - 10)
            await guest.renew(invite(founder, scope=Scope.WORKER, ends=None))
            assert (guest.scope, guest.view.scope, guest.expires_unix) == (Scope.WORKER, Scope.WORKER, None)
            await trio.sleep(2 * END)
            for stream in streams:
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"
        for mesh in (founder, other):
            _, end = mesh.admission_of(guest.peer) or ((), 0)
            assert end is None


async def test_follower_renews_where_there_is_room_for_no_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        full = MeshConfig(admission=AdmissionConfig(max_followers=1))
        founder = await place._open(1, mesh_key=key(100), config=full)
        guest = await place._open(2, invite=invite(founder), follow=True)
        with founder.offer("echo", echo):
            stream = await guest.open_service(founder.peer, "echo")
            await guest.renew(invite(founder, ends=None))
            await trio.sleep(2 * END)
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            with pytest.raises(AdmissionRefused, match="no room"):
                await place._open(3, invite=invite(founder, ends=None), follow=True)


async def test_renewals_in_a_row_keep_a_followers_streams(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder, other = await place.of(2)
        guest = await place._open(3, invite=invite(founder), follow=True)
        await until(lambda: state(guest, other) is PeerState.ALIVE)
        with founder.offer("echo", echo), other.offer("echo", echo):
            streams = [await guest.open_service(mesh.peer, "echo") for mesh in (founder, other)]
            for ends in (END + 1, END + 2, END + 3, None):
                await guest.renew(invite(founder, ends=ends))
            await trio.sleep(2 * END)
            for stream in streams:
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"


async def test_wider_scope_counts_on_connections_that_stand(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder = await place.found()
        guest = await place.join(2, invite(founder))
        with founder.offer("work", echo, scope=Scope.WORKER):
            await guest.renew(invite(founder, scope=Scope.WORKER))
            await trio.sleep(1)
            stream = await guest.open_service(founder.peer, "work")
            await stream.aclose()


async def test_ended_membership_is_renewed_by_coming_back(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder = await place.found()
        guest = await place.join(2, invite(founder))
        await until(lambda: state(founder, guest) is PeerState.DEAD, limit=2 * END)
        await guest.renew(invite(founder, ends=None))
        await until(lambda: state(founder, guest) is PeerState.ALIVE, limit=10)


async def test_invite_that_does_not_hold_here_changes_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        founder = await place.found()
        elsewhere = await place.found(4, mesh_key=key(200))
        guest = await place.join(2, invite(founder))
        revoked = invite(founder, ends=None)
        founder.revoke(read_invite(revoked).chain)
        await trio.sleep(1)
        for token, reason in ((invite(elsewhere), "wrong_mesh"), (revoked, "revoked")):
            with pytest.raises(AdmissionRefused) as refused:
                await guest.renew(token)
            assert refused.value.reason == reason
        assert guest.expires_unix == NOW + END


async def test_one_who_renews_and_leaves_at_once_says_goodbye(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder = await place.found()
        network = await place.network(2)
        async with open_mesh(key(2), invite=invite(founder), network=network, wall_clock=clock) as guest:
            await until(lambda: state(founder, guest) is PeerState.ALIVE)
            await guest.renew(invite(founder, ends=None))
        await until(lambda: state(founder, guest) is PeerState.LEFT, limit=1)

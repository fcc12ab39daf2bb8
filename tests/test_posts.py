"""Posts: applications' own messages reach the members who want them, and come from members only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing

from libmesh import Libp2pConfig, Mesh, Post, Scope, SecretKey, open_mesh, wire
from libmesh.posts import BACKLOG, Posts
from libmesh.testing.memory import MemoryHub

FOUNDER, *GUESTS = (SecretKey(bytes([n]) * 32) for n in range(1, 5))


@asynccontextmanager
async def mesh_of(count: int) -> AsyncIterator[list[Mesh]]:
    """The founder and `count - 1` guests, all of whom know each other."""
    hub = MemoryHub()
    async with AsyncExitStack() as stack:
        network = await stack.enter_async_context(hub.open_network(FOUNDER.seed))
        first = await stack.enter_async_context(
            open_mesh(FOUNDER, mesh_key=SecretKey(b"m" * 32), network=network)
        )
        token = first.invite(scope=Scope.CLIENT, not_after_unix=None)
        meshes = [first]
        for guest in GUESTS[: count - 1]:
            network = await stack.enter_async_context(hub.open_network(guest.seed))
            meshes.append(await stack.enter_async_context(open_mesh(guest, invite=token, network=network)))
        for mesh in meshes:
            async with mesh.watch() as views:
                async for view in views:
                    if sum(entry.path is not None for entry in view.peers) == count - 1:
                        break
        yield meshes


async def test_a_post_reaches_the_subscribers_of_its_topic_and_not_its_author(autojump_clock: object) -> None:
    async with mesh_of(3) as (alice, bob, carol), AsyncExitStack() as stack:
        at_alice = await stack.enter_async_context(alice.subscribe("chat"))
        at_bob = await stack.enter_async_context(bob.subscribe("chat"))
        at_carol = await stack.enter_async_context(carol.subscribe("other"))
        await alice.publish("chat", b"hello")
        assert await at_bob.receive() == Post(alice.peer, "chat", b"hello")
        await alice.publish("other", b"hi")
        assert await at_carol.receive() == Post(alice.peer, "other", b"hi")
        for silent in (at_alice, at_bob, at_carol):
            with pytest.raises(trio.WouldBlock):
                silent.receive_nowait()


async def test_who_publishes_without_end_lets_others_run_and_can_be_cancelled() -> None:
    listen = Libp2pConfig(hosts=("127.0.0.1",))
    with trio.fail_after(60):
        async with open_mesh(FOUNDER, mesh_key=SecretKey(b"m" * 32), listen=listen) as mesh:
            with trio.testing.assert_checkpoints():
                await mesh.publish("chat", b"hello")


async def test_a_slow_subscriber_loses_the_oldest_posts() -> None:
    async with mesh_of(1) as (alice,):
        posts = Posts(alice._driver.network, alice.mesh_id, lambda _: True)
        async with posts.subscribe("chat") as read:
            for number in range(BACKLOG + 3):
                posts.deliver(GUESTS[0].peer, wire.encode_post("chat", bytes([number % 256])))
            assert (await read.receive()).data == bytes([3])


@pytest.mark.parametrize(
    ("member", "data"), [(False, wire.encode_post("chat", b"x")), (True, b"\xff\xff"), (True, wire.encode_post("", b""))]
)  # fmt: skip
async def test_strangers_and_garbage_are_not_listened_to(member: bool, data: bytes) -> None:
    async with mesh_of(1) as (alice,):
        posts = Posts(alice._driver.network, alice.mesh_id, lambda _: member)
        async with posts.subscribe("chat") as read:
            posts.deliver(GUESTS[0].peer, data)
            with pytest.raises(trio.WouldBlock):
                read.receive_nowait()


async def test_bad_topics_and_too_much_data_are_refused() -> None:
    async with mesh_of(1) as (alice,):
        with pytest.raises(ValueError, match="no topic"):
            await alice.publish("", b"")
        with pytest.raises(ValueError, match="at most"):
            await alice.publish("chat", bytes(wire.MAX_POST_DATA + 1))

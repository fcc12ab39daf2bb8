"""The js peer of the examples in a mesh with a peer of ours: each sees, hears and serves the other."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

import libmesh
from libmesh import Libp2pConfig, Mesh, MeshConfig, PeerState, PeerView, Scope, SecretKey, Stream
from tests.test_examples_posts import Lines

LIMIT = 90
"""Seconds for a whole test. Starting node takes one of them, or several on a busy machine."""

pytestmark = pytest.mark.slow


@asynccontextmanager
async def js_peer(command: list[str], *arguments: str) -> AsyncIterator[tuple[Lines, trio.Process]]:
    async with trio.open_nursery() as nursery:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        run = partial(trio.run_process, [*command, *arguments], check=False, **pipes)
        process: trio.Process = await nursery.start(run)
        try:
            yield Lines(process), process
        finally:
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def our_peer() -> AsyncIterator[Mesh]:
    listen = Libp2pConfig(hosts=("127.0.0.1",))
    config = MeshConfig(farewell=0.01)
    async with libmesh.open_mesh(
        SecretKey.generate(), mesh_key=SecretKey.generate(), listen=listen, config=config
    ) as mesh:
        yield mesh


async def until(mesh: Mesh, state: PeerState, service: str | None = None) -> PeerView:
    """The only other peer, once it is in this state, and offers this service."""
    async with mesh.watch() as views:
        async for view in views:
            for peer in view.peers:
                offered = [each.name for each in peer.services]
                if peer.state is state and (service is None or service in offered):
                    return peer
    raise AssertionError("the mesh ended")


async def echo(stream: Stream) -> None:
    async for data in stream:
        await stream.send_all(data.upper())


async def say(process: trio.Process, line: str) -> None:
    assert process.stdin is not None
    await process.stdin.send_all(line.encode() + b"\n")


async def test_it_joins_by_token_and_serves_and_uses_services(js_peer_command: list[str]) -> None:
    with trio.fail_after(LIMIT):
        async with our_peer() as mesh:
            token = mesh.invite(scope=Scope.CLIENT, not_after_unix=None)
            with mesh.offer("shout", echo):
                async with js_peer(js_peer_command, token) as (printed, js):
                    await printed.until("offering: shout")
                    await printed.until("you are")
                    peer = (await until(mesh, PeerState.ALIVE, "echo")).peer
                    async with await mesh.open_service(peer, "echo") as stream:
                        await stream.send_all(b"there and back" * 10_000)
                        await stream.send_eof()
                        assert b"".join([data async for data in stream]) == b"there and back" * 10_000
                    await say(js, "/call shout from node")
                    assert await printed.until("answered") == "shout answered: FROM NODE"


async def test_it_chats(js_peer_command: list[str]) -> None:
    with trio.fail_after(LIMIT):
        async with our_peer() as mesh, mesh.subscribe("chat") as posts, trio.open_nursery() as nursery:
            token = mesh.invite(scope=Scope.CLIENT, not_after_unix=None)
            async with js_peer(js_peer_command, token) as (printed, js):
                await printed.until("you are")
                nursery.start_soon(repeat, partial(mesh.publish, "chat", b"hello from python"))
                await printed.until("hello from python")
                nursery.start_soon(repeat, partial(say, js, "hello from node"))
                assert (await posts.receive()).data == b"hello from node"
                nursery.cancel_scope.cancel()


async def repeat(speak: Callable[[], Awaitable[None]]) -> None:
    """Each second: posts are best effort, and gossip takes a moment to find its paths."""
    while True:
        await speak()
        await trio.sleep(1)


async def test_its_end_of_input_is_a_goodbye(js_peer_command: list[str]) -> None:
    with trio.fail_after(LIMIT):
        async with our_peer() as mesh:
            token = mesh.invite(scope=Scope.CLIENT, not_after_unix=None)
            async with js_peer(js_peer_command, token) as (printed, js):
                await printed.until("you are")
                await until(mesh, PeerState.ALIVE, "echo")
                assert js.stdin is not None
                await js.stdin.aclose()
                await until(mesh, PeerState.LEFT)
                assert await js.wait() == 0


async def test_it_says_in_words_why_it_was_refused(js_peer_command: list[str]) -> None:
    with trio.fail_after(LIMIT):
        async with our_peer() as mesh:
            token = mesh.invite(scope=Scope.CLIENT, not_after_unix=None)
            mesh.revoke(libmesh.read_invite(token).chain)
            done = await trio.run_process([*js_peer_command, token], check=False, capture_stderr=True)
    assert done.returncode == 1
    assert done.stderr.decode() == "the mesh refused this peer: revoked\n"

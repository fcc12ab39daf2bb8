"""What is no argument is refused at once, by name, and harms nothing that runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from libmesh import (
    InviteMalformed,
    Libp2pConfig,
    Mesh,
    MeshClosed,
    PeerUnreachable,
    Scope,
    SecretKey,
    Stream,
    expose,
    open_mesh,
    read_invite,
    serve_tunnel,
)
from libmesh.testing.memory import MemoryHub

FOUNDER, GUEST = (SecretKey(bytes([n]) * 32) for n in range(1, 3))
MESH_KEY = SecretKey(b"m" * 32)

WRONG: Any = "text"
NONE: Any = None


async def _serve(stream: Stream) -> None:
    await stream.receive_some()


def _offer(mesh: Mesh, name: Any = "a", handler: Any = _serve, **wrong: Any) -> None:
    with mesh.offer(name, handler, **wrong):
        pass


CALLS: list[tuple[Callable[[Mesh], object], type[Exception], str]] = [
    (lambda mesh: mesh.announce(WRONG), TypeError, "bytes-like"),
    (lambda mesh: _offer(mesh, scope=7), ValueError, "Scope"),
    (lambda mesh: _offer(mesh, scope="client"), ValueError, "Scope"),
    (lambda mesh: mesh.invite(scope=WRONG, not_after_unix=None), ValueError, "Scope"),
    (lambda mesh: mesh.invite(scope=Scope.CLIENT, not_after_unix=-1), ValueError, "no time"),
    (lambda mesh: mesh.invite(scope=Scope.CLIENT, not_after_unix=2.0**64), ValueError, "no time"),
    (lambda mesh: mesh.invite(scope=Scope.CLIENT, not_after_unix=float("inf")), ValueError, "no time"),
    (lambda mesh: mesh.invite(scope=Scope.CLIENT, not_after_unix=float("nan")), ValueError, "no time"),
    (lambda mesh: _offer(mesh, handler=None), TypeError, "async function that takes a stream, not None"),
    (lambda mesh: _offer(mesh, handler=_serve, name=None), ValueError, "None is no service name"),
    (lambda mesh: mesh.readdress(NONE), TypeError, "an invite is a text, not NoneType"),
    (lambda mesh: mesh.revoke(b"junk"), InviteMalformed, "names no invite"),
    (lambda mesh: mesh.add_contacts([(GUEST.peer, WRONG)]), TypeError, "a tuple of texts, not the text"),
]


async def test_a_wrong_argument_is_refused_and_the_mesh_lives_on(autojump_clock: object) -> None:
    hub = MemoryHub()
    async with (
        hub.open_network(FOUNDER.seed) as at_founder,
        hub.open_network(GUEST.seed) as at_guest,
        open_mesh(FOUNDER, mesh_key=MESH_KEY, network=at_founder) as founder,
    ):
        token = founder.invite(scope=Scope.WORKER, not_after_unix=None)
        async with open_mesh(GUEST, invite=token, network=at_guest) as guest:
            for call, error, words in CALLS:
                with pytest.raises(error, match=words):
                    call(founder)
            with pytest.raises(TypeError, match="bytes-like"):
                await founder.publish("chat", WRONG)
            with pytest.raises(ValueError, match="no topic"):
                await founder.publish("", b"")
            with pytest.raises(ValueError, match="no topic"):
                async with founder.subscribe("a\nb"):
                    pass
            with pytest.raises(ValueError, match="port 0"):
                await expose(founder, "a", "127.0.0.1", 0)
            with pytest.raises(ValueError, match="port 65536"):
                await serve_tunnel(founder, GUEST.peer, "a", port=65536)
            with pytest.raises(TypeError, match="a host is a text, not None"):
                await expose(founder, "a", NONE, 80)
            with pytest.raises(TypeError, match="a door is a function"):
                await expose(founder, "a", "127.0.0.1", 80, door=WRONG)
            with pytest.raises(TypeError, match="a framing is a function"):
                await expose(founder, "a", "127.0.0.1", 80, framing=WRONG)
            with pytest.raises(ValueError, match="'' is no service name"):
                await serve_tunnel(founder, GUEST.peer, "")
            with pytest.raises(ValueError, match="None is no service name"):
                await founder.open_service(GUEST.peer, NONE)
            with pytest.raises(TypeError, match="an invite is a text, not NoneType"):
                await founder.join(NONE)
            with pytest.raises(PeerUnreachable, match="this node itself"):
                await founder.open_service(FOUNDER.peer, "a")
            founder.announce(bytearray(b"still here"))  # type: ignore[arg-type]
            with founder.offer("a", _serve):
                await trio.sleep(600)  # virtual: announced anew
                seen = guest.view.get(FOUNDER.peer)
                assert seen is not None
                assert seen.attributes == b"still here"
                assert [service.name for service in seen.services] == ["a"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"port": -1}, "port=-1"),
        ({"port": 65536}, "port=65536"),
        ({"port": "80"}, "port='80'"),
        ({"websocket_port": 65536}, "websocket_port=65536"),
        ({"hosts": "0.0.0.0"}, "hosts='0.0.0.0'"),
        ({"announce": "/ip4/192.0.2.1/tcp/1"}, "a tuple of texts"),
        ({"announce": ("junk",)}, "'junk' is no multiaddr"),
        ({"announce": ("/ip4/192.0.2.999/tcp/1",)}, "is no multiaddr"),
    ],
)
def test_an_impossible_place_to_listen_is_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Libp2pConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"key": None}, "key is a SecretKey, not NoneType"),
        ({"key": b"k" * 32}, "key is a SecretKey, not bytes"),
        ({"mesh_key": b"k" * 32}, "mesh_key is a SecretKey, not bytes"),
        ({"network": 5}, "network is a Network, not int"),
        ({"listen": "0.0.0.0"}, "listen is a Libp2pConfig, not str"),
        ({"config": {}}, "config is a MeshConfig, not dict"),
        ({"revocations": ["text"]}, "bytes-like"),
        ({"mesh_key": None, "invite": b"lm1"}, "an invite is a text, not bytes"),
    ],
)
async def test_what_opens_no_mesh_is_named_before_anything_is_opened(
    wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        async with open_mesh(**{"key": FOUNDER, "mesh_key": MESH_KEY} | wrong):
            raise AssertionError("it opened")


async def _watch(mesh: Mesh) -> None:
    async with mesh.watch():
        pass


async def _subscribe(mesh: Mesh) -> None:
    async with mesh.subscribe("chat"):
        pass


async def test_a_mesh_that_is_closed_says_so_and_still_tells_what_it_knew(autojump_clock: object) -> None:
    hub = MemoryHub()
    async with (
        hub.open_network(FOUNDER.seed) as at_founder,
        hub.open_network(GUEST.seed) as at_guest,
        open_mesh(FOUNDER, mesh_key=MESH_KEY, network=at_founder) as founder,
    ):
        token = founder.invite(scope=Scope.INVITE, not_after_unix=None)
        async with AsyncExitStack() as later:
            async with open_mesh(GUEST, invite=token, network=at_guest) as guest:
                below = guest.invite(scope=Scope.CLIENT, not_after_unix=None)
                views = await later.enter_async_context(guest.watch())
                posts = await later.enter_async_context(guest.subscribe("chat"))
                later.enter_context(guest.offer("a", _serve))
            assert guest.closed
            for call in (
                lambda: guest.announce(b"x"),
                lambda: _offer(guest, "c"),
                lambda: guest.invite(scope=Scope.CLIENT, not_after_unix=None),
                lambda: guest.readdress(below),
                lambda: guest.revoke(read_invite(below).chain),
                lambda: guest.revoke_peer(FOUNDER.peer),
                lambda: guest.add_contacts([]),
            ):
                with pytest.raises(MeshClosed):
                    call()
            for waiting in (
                lambda: _watch(guest),
                lambda: _subscribe(guest),
                lambda: guest.publish("chat", b"x"),
                lambda: guest.open_service(FOUNDER.peer, "a"),
                lambda: guest.open_service(FOUNDER.peer, "a", lasting=True),
                lambda: guest.open_tunnel(FOUNDER.peer, "a"),
                lambda: guest.join(token),
                lambda: guest.renew(token),
                lambda: expose(guest, "b", "127.0.0.1", 80),
                lambda: serve_tunnel(guest, FOUNDER.peer, "a"),
            ):
                with pytest.raises(MeshClosed):
                    await waiting()
            assert guest.peer == GUEST.peer
            assert guest.scope is Scope.INVITE
            assert guest.admission_of(FOUNDER.peer) is not None
            assert [entry.peer for entry in guest.view.peers] == [FOUNDER.peer]
            assert [post async for post in posts] == []
            assert [view.me async for view in views] == [GUEST.peer]


def test_a_key_is_bytes_and_its_file_any_path(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="bytes, not str"):
        SecretKey("x" * 32)  # type: ignore[arg-type]
    made = SecretKey.load_or_create(str(tmp_path / "a.key"))
    assert SecretKey.load_or_create(tmp_path / "a.key") == made

"""What is no argument is refused at once, by name, and harms nothing that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from libmesh import (
    AdmissionConfig,
    Libp2pConfig,
    Mesh,
    PeerUnreachable,
    Scope,
    SecretKey,
    Stream,
    expose,
    open_mesh,
    serve_tunnel,
)
from libmesh.testing.memory import MemoryHub

FOUNDER, GUEST = (SecretKey(bytes([n]) * 32) for n in range(1, 3))
MESH_KEY = SecretKey(b"m" * 32)

WRONG: Any = "text"


async def _serve(stream: Stream) -> None:
    await stream.receive_some()


def _offer(mesh: Mesh, **wrong: Any) -> None:
    with mesh.offer("a", _serve, **wrong):
        pass


CALLS: list[tuple[Callable[[Mesh], object], type[Exception], str]] = [
    (lambda mesh: mesh.announce(WRONG), TypeError, "bytes-like"),
    (lambda mesh: _offer(mesh, scope=7), ValueError, "Scope"),
    (lambda mesh: _offer(mesh, scope="client"), ValueError, "Scope"),
    (lambda mesh: mesh.invite(scope=WRONG, not_after_unix=None), ValueError, "Scope"),
    (lambda mesh: mesh.invite(scope=Scope.CLIENT, not_after_unix=-1), ValueError, "no time"),
    (lambda mesh: mesh.invite(scope=Scope.CLIENT, not_after_unix=2.0**64), ValueError, "no time"),
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


@pytest.mark.parametrize("field", ["hello_limit", "seek_min", "seek_max"])
def test_admission_takes_time(field: str) -> None:
    wrong: dict[str, Any] = {field: 0.0}
    with pytest.raises(ValueError, match=field):
        AdmissionConfig(**wrong)


def test_a_key_is_bytes_and_its_file_any_path(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="bytes, not str"):
        SecretKey("x" * 32)  # type: ignore[arg-type]
    made = SecretKey.load_or_create(str(tmp_path / "a.key"))
    assert SecretKey.load_or_create(tmp_path / "a.key") == made

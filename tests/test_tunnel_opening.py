"""How a tunnelled connection begins over a real transport: who speaks first, and what leaves with what."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio
import trio.testing

from libmesh import Libp2pConfig, Mesh, MeshConfig, Scope, StreamReset, expose, open_mesh, serve_tunnel, wire
from libmesh.framing import frame
from libmesh.net.base import Stream
from libmesh.net.negotiate import accept_stream, open_lazy_stream
from libmesh.net.records import Piece, RecordChannel
from libmesh.peers import PeerId
from tests.members import key
from tests.net.pairs import muxed_pair

PEER = PeerId("somebody")
PATIENCE = 60.0
Service = Callable[[trio.SocketStream], object]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was sealed in this process, record by record."""
    records: list[bytes] = []
    seal = RecordChannel._put_record

    def put_record(channel: RecordChannel, pieces: list[Piece]) -> None:
        records.append(b"".join(pieces))
        seal(channel, pieces)

    monkeypatch.setattr(RecordChannel, "_put_record", put_record)
    return records


@asynccontextmanager
async def two_meshes() -> AsyncIterator[tuple[Mesh, Mesh, trio.Nursery]]:
    """A founder, a member, one connection between them, and a nursery that is cancelled at the end."""
    listen, quick = Libp2pConfig(hosts=("127.0.0.1",)), MeshConfig(farewell=0.01)
    with trio.fail_after(PATIENCE):
        async with open_mesh(key(1), mesh_key=key(100), listen=listen, config=quick) as far:
            token = far.invite(scope=Scope.CLIENT, not_after_unix=None)
            async with (
                open_mesh(key(2), invite=token, listen=listen, config=quick) as near,
                trio.open_nursery() as nursery,
            ):
                yield near, far, nursery
                nursery.cancel_scope.cancel()


@asynccontextmanager
async def tunnel_to(service: Service | None) -> AsyncIterator[int]:
    """A local port that leads to `service`, or to a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        target = taken.getsockname()[1]
        async with two_meshes() as (near, far, nursery):
            if service is not None:
                listeners = await nursery.start(partial(trio.serve_tcp, service, 0, host="127.0.0.1"))
                target = listeners[0].socket.getsockname()[1]
            await nursery.start(expose, far, "service", "127.0.0.1", target)
            port: int = await nursery.start(serve_tunnel, near, far.peer, "service")
            yield port


def client_of(port: int, said: bytes = b"") -> trio.SocketStream:
    """A client whose first bytes are in the tunnel's socket before the tunnel has seen the connection."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(said)
    sock.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(data) async for data in stream])


async def ask(stream: trio.SocketStream, said: bytes) -> bytes:
    """The answer. A reset is told once: to whoever is sending a long question, or to the reader."""
    await stream.send_all(said)
    return await read_all(stream)


async def echo(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):
        async for data in stream:
            await stream.send_all(data)


def together(records: Sequence[bytes], *pieces: bytes) -> bool:
    """Whether one record has all of `pieces`."""
    return any(all(piece in record for piece in pieces) for record in records)


async def test_the_clients_first_bytes_leave_with_the_question(sent: list[bytes]) -> None:
    async with tunnel_to(echo) as port, client_of(port, b"first bytes") as client:
        assert await client.receive_some() == b"first bytes"
    assert together(sent, frame(wire.encode_open("service")), b"first bytes")


async def test_a_service_that_speaks_first_is_heard_though_the_client_says_nothing() -> None:
    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 welcome")
        await echo(stream)

    async with tunnel_to(greet) as port, client_of(port) as client:
        assert await client.receive_some() == b"220 welcome"
        await client.send_all(b"HELO")
        assert await client.receive_some() == b"HELO"


async def test_a_refusal_resets_a_client_whose_bytes_have_left_already() -> None:
    async with tunnel_to(None) as port:
        for said in (b"", b"nobody wants this", bytes(1_000_000)):
            async with await trio.open_tcp_stream("127.0.0.1", port) as client:
                with pytest.raises(trio.BrokenResourceError):
                    await ask(client, said)


@pytest.mark.parametrize("said", [b"", b"a request"])
async def test_a_client_that_ends_its_side_at_once_gets_the_whole_answer(said: bytes) -> None:
    async def answer_after_the_end(stream: trio.SocketStream) -> None:
        await stream.send_all(b"asked for " + await read_all(stream))

    async with tunnel_to(answer_after_the_end) as port, client_of(port, said) as client:
        await client.send_eof()
        assert await read_all(client) == b"asked for " + said


async def test_a_client_that_resets_resets_the_service() -> None:
    heard, ended = trio.Event(), trio.Event()

    async def listen(stream: trio.SocketStream) -> None:
        assert await stream.receive_some() == b"x"
        heard.set()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        ended.set()

    async with tunnel_to(listen) as port:
        client = client_of(port, b"x")
        await heard.wait()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await client.aclose()
        await ended.wait()


async def test_what_a_client_sent_that_has_closed_at_once_arrives() -> None:
    send, seen = trio.open_memory_channel[bytes](1)

    async def count(stream: trio.SocketStream) -> None:
        await send.send(await read_all(stream))

    async with tunnel_to(count) as port:
        await client_of(port, b"bytes and an end").aclose()
        assert await seen.receive() == b"bytes and an end"


@asynccontextmanager
async def streams() -> AsyncIterator[tuple[Stream, Callable[[], object]]]:
    """A stream, and what accepts its other end."""
    async with muxed_pair() as (a, b):

        async def accept() -> Stream:
            return await accept_stream(await b.accept_stream(), PEER, lambda _: True)

        yield await open_lazy_stream(a, PEER, "/service"), accept


async def test_what_is_posted_leaves_with_what_is_sent_next_on_both_sides(sent: list[bytes]) -> None:
    async with streams() as (near, accept):
        assert near.post(b"question")
        assert near.send_nowait(b"bytes") == 5
        far: Stream = await accept()  # type: ignore[misc]
        assert far.receive_nowait(8) == b"question"
        assert far.post(b"yes")
        assert far.send_nowait(b"reply") == 5
        assert await far.receive_some() == b"bytes"
        assert await near.receive_some() == b"yesreply"
    assert together(sent, b"question", b"bytes")
    assert together(sent, b"yes", b"reply")


async def test_what_is_posted_leaves_though_nothing_follows() -> None:
    async with streams() as (near, accept):
        assert near.post(b"question")
        far: Stream = await accept()  # type: ignore[misc]
        assert await far.receive_some(4) == b"ques"
        assert far.post(b"yes")  # the opener has sent more already, so this may wait a little
        assert await near.receive_some() == b"yes"
        assert await far.receive_some() == b"tion"


async def test_what_there_is_no_room_for_is_not_posted() -> None:
    async with streams() as (near, accept):
        posted = next(number for number in range(1000) if not near.post(bytes(1000)))
        await near.send_eof()
        far: Stream = await accept()  # type: ignore[misc]
        assert len(await read_all(far)) == 1000 * posted > 200_000


@pytest.mark.parametrize("end", ["aclose", "reset"])
async def test_posting_to_a_stream_that_is_over_does_nothing_and_the_next_call_tells(end: str) -> None:
    async with streams() as (near, accept):
        assert near.post(b"question")
        far: Stream = await accept()  # type: ignore[misc]
        near.reset()
        with pytest.raises(StreamReset):
            await read_all(far)
        assert far.post(b"yes")
        with pytest.raises(StreamReset):
            await far.send_all(b"x")
        if end == "aclose":
            await far.aclose()
        else:
            far.reset()
        assert far.post(b"yes")
        with pytest.raises(trio.ClosedResourceError):
            await far.send_all(b"x")

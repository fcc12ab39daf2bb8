"""Sessions of the first mesh's fork, played by a small program: REGISTER_PEER leads from worker to worker."""

from __future__ import annotations

import os
import socket
import struct
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from libmesh_node.llama.engine import Binary
from libmesh_node.llama.rpc.borrower import Borrowed, SessionRefused
from libmesh_node.llama.rpc.fork import Doors
from libmesh_node.llama.rpc.frames import ProtocolError, frame
from libmesh_node.llama.rpc.lender import Lender, LentModel
from libmesh_node.llama.rpc.opening import Neighbour, SessionRequest
from libmesh_node.llama.rpc.register_peer import REGISTER_PEER
from libmesh_node.llama.rpc.weights import LearnedHashes, open_weights
from libmesh_node.models.demo import TINY, write_model
from libmesh_node.placement.seen import SERVICE

from libmesh import Mesh, PeerId, Scope, Stream
from tests.llama.rpc.ends import DIGEST, PATIENCE
from tests.town import Town, settled, town

FORK = """
    # Serves several at a time. SET_TENSOR keeps its data, GET_TENSOR gives it, REGISTER_PEER keeps an address, and
    # PUSH_TENSOR_TO_PEER sends what is kept to a peer, as PEER_TENSOR_DATA over a connection of its own.
    import socket, struct, sys, threading
    kept, peers = [b""], {}
    def exchange(connection, command, payload):
        connection.sendall(struct.pack("<BQ", command, len(payload)) + payload)
        (size,) = struct.unpack("<Q", connection.recv(8, socket.MSG_WAITALL))
        return connection.recv(size, socket.MSG_WAITALL)
    def push(peer):
        host, port = peers[peer].rsplit(":", 1)
        with socket.create_connection((host, int(port))) as connection:
            assert exchange(connection, 14, b"")[0] == 4
            return exchange(connection, 20, kept[0])
    def serve(connection):
        greeted = False
        with connection:
            while len(head := connection.recv(9, socket.MSG_WAITALL)) == 9:
                command, size = struct.unpack("<BQ", head)
                payload = connection.recv(size, socket.MSG_WAITALL) if size else b""
                if (command == 14) == greeted:
                    return
                greeted, said = True, None
                if command == 14: said = bytes([4, 1, 0]) if not payload else b""
                if command == 15: said = struct.pack("<I", 1)
                if command == 1: said = struct.pack("<Q", 64)
                if command == 2: said = struct.pack("<Q", 1 << 40)
                if command == 11: said = struct.pack("<QQ", 1 << 33, 1 << 33)
                if command == 6: kept[0] = payload
                if command == 8: said = kept[0]
                if command == 18:
                    peers[struct.unpack_from("<I", payload)[0]] = payload[4:].split(b"\\0")[0].decode()
                    said = b"\\1"
                if command == 19: said = push(struct.unpack_from("<I", payload)[0])
                if command == 20: kept[0], said = payload, b"\\1"
                if said is not None:
                    connection.sendall(struct.pack("<Q", len(said)) + said)
    listener = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("-p") + 1])))
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


@pytest.fixture
def fork(tmp_path: Path) -> Binary:
    path = tmp_path / "rpc-server"
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(FORK)}")
    path.chmod(0o755)
    return Binary(path=path, version="fork", rpc_protocol="4.1.0", origin="here")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_model(path, TINY, 7)
    return path


async def _lend(
    mesh: Mesh, lender: Lender, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with mesh.offer(SERVICE, lender.serve, scope=Scope.WORKER, lasting=True):
        task_status.started()
        await trio.sleep_forever()


async def _open(mesh: Mesh, peer: str) -> Stream:
    return await mesh.open_service(PeerId(peer), SERVICE)


def token(at: int) -> bytes:
    return bytes([at]) * 16


@asynccontextmanager
async def mesh_of(place: Town, count: int) -> AsyncIterator[list[Mesh]]:
    host = await place.found(1)
    invite = host.invite(scope=Scope.WORKER, not_after_unix=None)
    meshes = [host, *[await place.join(2 + at, invite) for at in range(count)]]
    await settled(meshes)
    yield meshes


@asynccontextmanager
async def split(fork: Binary, model: Path, count: int = 2) -> AsyncIterator[list[Borrowed]]:
    """Workers with the fork, and the host's ports to them."""
    async with town() as place, mesh_of(place, count) as (host, *workers), trio.open_nursery() as nursery:
        borrowed: list[Borrowed] = []
        with open_weights((model,)) as weights:
            for at, mesh in enumerate(workers):
                lender = Lender(
                    fork,
                    memory=lambda: 1 << 33,
                    environment=os.environ,
                    open_stream=partial(_open, mesh),
                )
                lender.models[DIGEST] = LentModel(name="model", digest=DIGEST, parts=(model,))
                await nursery.start(_lend, mesh, lender)
                asked = SessionRequest(
                    digest=DIGEST, memory_bytes=1 << 20, protocol=(4, 1, 0), token=token(at)
                )
                opener = partial(host.open_service, mesh.peer, SERVICE, lasting=True)
                borrowed.append(Borrowed(opener, asked, weights, LearnedHashes(None)))
                await borrowed[-1].bind()
            neighbours = tuple(
                Neighbour(each.port, mesh.peer, each.token)
                for each, mesh in zip(borrowed, workers, strict=True)
            )
            for each in borrowed:
                each.introduce(neighbours)
                await each.open()
                await each.listen(nursery)
            with trio.fail_after(PATIENCE):
                yield borrowed
            nursery.cancel_scope.cancel()


class Client:
    """The fork's host, by hand: one connection to one port, each message in pieces of so many bytes."""

    def __init__(self, stream: trio.SocketStream, step: int) -> None:
        self._stream, self._step = stream, step

    async def say(self, command: int, payload: bytes = b"") -> None:
        message = frame(command, payload)
        for start in range(0, len(message), self._step):
            await self._stream.send_all(message[start : start + self._step])
            if self._step < 100:
                await trio.testing.wait_all_tasks_blocked()  # so that pieces arrive as such

    async def ask(self, command: int, payload: bytes = b"") -> bytes:
        await self.say(command, payload)
        data = b""
        while len(data) < 8 or len(data) < 8 + int.from_bytes(data[:8], "little"):
            received = await self._stream.receive_some()
            assert received, "the connection ended"
            data += received
        return data[8:]


@asynccontextmanager
async def client(worker: Borrowed, step: int = 1 << 20) -> AsyncIterator[Client]:
    async with await trio.open_tcp_stream("127.0.0.1", worker.port) as stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield Client(stream, step)


def named(peer: int, port: int) -> bytes:
    return struct.pack("<I", peer) + f"127.0.0.1:{port}".encode().ljust(128, b"\0")


@pytest.mark.parametrize("step", [1 << 20, 1])
async def test_a_worker_pushes_to_the_next_one_by_the_address_that_the_host_named(
    fork: Binary, model: Path, step: int
) -> None:
    async with split(fork, model) as (one, other):
        async with client(one, step) as first, client(other, step) as second:
            for each in (first, second):
                assert await each.ask(14) == bytes([4, 1, 0])
            assert await first.ask(REGISTER_PEER, named(7, other.port)) == b"\x01"
            assert await second.ask(REGISTER_PEER, named(3, one.port)) == b"\x01"
            await first.say(6, b"an activation")
            assert await first.ask(19, struct.pack("<I", 7)) == b"\x01"
            assert await second.ask(8) == b"an activation"
            await second.say(6, b"and one back")
            assert await second.ask(19, struct.pack("<I", 3)) == b"\x01"
            assert await first.ask(8) == b"and one back"
        assert not one.lost.is_set()


async def test_each_connection_is_a_session_of_its_own(fork: Binary, model: Path) -> None:
    async with split(fork, model, 1) as (worker,):
        for _ in range(2):
            async with client(worker) as only:
                assert await only.ask(14) == bytes([4, 1, 0])
                assert await only.ask(8) == b""  # nothing is left of the session before
                await only.say(6, b"x")
        assert not worker.lost.is_set()


async def test_what_is_no_message_of_the_forks_ends_the_session(
    fork: Binary, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with split(fork, model, 1) as (worker,), client(worker) as only:
        assert await only.ask(14) == bytes([4, 1, 0])
        await only.say(REGISTER_PEER, bytes(131))
        await worker.lost.wait()
    assert "speaks to the fork's rpc-server and makes no sense" in caplog.text


async def test_stock_and_fork_are_told_apart(fork: Binary, model: Path) -> None:
    async with town() as place, mesh_of(place, 1) as (host, worker), trio.open_nursery() as nursery:
        lender = Lender(fork, memory=lambda: 1 << 33, environment=os.environ)
        lender.models[DIGEST] = LentModel(name="model", digest=DIGEST, parts=(model,))
        await nursery.start(_lend, worker, lender)
        asked = SessionRequest(digest=DIGEST, memory_bytes=1 << 20, protocol=(7, 0, 0))
        with open_weights((model,)) as weights:
            opener = partial(host.open_service, worker.peer, SERVICE)
            with pytest.raises(SessionRefused, match=r"7\.0\.0, the worker 4\.1\.0"):
                await Borrowed(opener, asked, weights, LearnedHashes(None)).open()
        nursery.cancel_scope.cancel()


async def test_only_neighbours_reach_a_worker_of_the_forks() -> None:
    doors = Doors()
    doors.add(token(1), [Neighbour(5001, "friend", token(2))], 1)

    class Stranger:
        peer = PeerId("stranger")

    for given in (token(1), token(2)):
        with pytest.raises(ProtocolError):
            await doors.serve(Stranger(), given, b"")  # type: ignore[arg-type]
    doors.remove(token(1), 2)  # another session's, by now
    assert doors._known
    doors.remove(token(1), 1)
    assert not doors._known

"""What leaves together, what waits for company, and what never does."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest
import trio
import trio.testing
from libmesh_node.llama.rpc.borrower import borrow
from libmesh_node.llama.rpc.facts import Device, WorkerFacts
from libmesh_node.llama.rpc.frames import Command, Reply, answer, frame
from libmesh_node.llama.rpc.opening import SessionRequest, encode_answer
from libmesh_node.llama.rpc.outbox import HELD, Outbox, receive
from libmesh_node.llama.rpc.weights import LearnedHashes, open_weights
from libmesh_node.llama.rpc.worker import WorkerEnd
from libmesh_node.llama.rpc.working import ENDED, Working
from libmesh_node.models.demo import ModelShape, write_model

from libmesh import PeerId, Stream
from tests.llama.rpc.messages import set_tensor

SHAPE = ModelShape(layers=1, width=64, heads=4, kv_heads=2, feed_forward=64, vocabulary=400)
FACTS = WorkerFacts((7, 0, 0), (Device(64, 1 << 40, 100, 200, True),))


class Recorder:
    """A sink that takes `takes` bytes of each message at once, and all of what it is made to wait for."""

    def __init__(self, takes: int = 1 << 30) -> None:
        self.takes = takes
        self.at_once: list[bytes] = []
        self.waited: list[bytes] = []

    def send_nowait(self, data: bytes) -> int:
        self.at_once.append(data[: self.takes])
        return len(self.at_once[-1])

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.waited.append(data)


def test_what_is_put_in_together_leaves_as_one() -> None:
    sink = Recorder()
    outbox = Outbox(sink)
    outbox.put(b"a", more=True)
    outbox.put(b"b", more=True)
    assert not sink.at_once
    outbox.put(b"c")
    assert sink.at_once == [b"abc"]
    outbox.put(b"d", more=True)
    outbox.flush()
    outbox.flush()
    assert sink.at_once == [b"abc", b"d"]


def test_what_is_held_back_is_bounded() -> None:
    sink = Recorder()
    outbox = Outbox(sink)
    for _ in range(8):
        outbox.put(bytes(HELD // 4), more=True)
    assert [len(data) for data in sink.at_once] == [HELD, HELD]
    outbox.put(b"head", more=True)
    outbox.put(bytes(HELD), more=True)
    assert [len(data) for data in sink.at_once[2:]] == [4, HELD]  # a large piece is not copied


async def test_the_order_is_kept_whoever_sends_and_whatever_is_held() -> None:
    sink = Recorder(takes=1)
    outbox = Outbox(sink)

    async def work() -> None:
        await sink.send_all(b"file")

    outbox.put(b"ab", more=True)
    outbox.put(work)
    outbox.put(b"cd", more=True)
    outbox.put(b"ef")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert (sink.at_once, sink.waited) == ([b"a"], [b"b", b"file", b"cdef"])


async def test_what_is_put_in_for_later_leaves_in_its_order_when_others_had_their_turn() -> None:
    outbox = Outbox(sink := Recorder())
    outbox.put(b"a", more=True)
    outbox.put_later(b"b")
    assert sink.at_once == [b"a"]
    outbox.put(b"c")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert (sink.at_once, sink.waited) == ([b"a"], [b"b", b"c"])


async def test_who_waits_until_all_is_sent_sees_what_was_held_back_leave() -> None:
    outbox = Outbox(sink := Recorder(takes=1))
    outbox.put(b"ab")
    outbox.put(b"cd", more=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        with trio.fail_after(60):
            await outbox.sent()
            await outbox.sent()
        nursery.cancel_scope.cancel()
    assert (sink.at_once, sink.waited) == ([b"a"], [b"b", b"cd"])


async def test_receiving_ends_as_the_connection_does() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    ours = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
    async with listener, ours, await listener.accept() as theirs:
        with trio.move_on_after(0):
            await receive(ours, 100)  # cancelled: takes nothing
        await theirs.send_all(b"abc")
        assert await receive(ours, 2) == b"ab"
        assert await receive(ours, 2) == b"c"
        await theirs.send_eof()
        assert await receive(ours, 2) == b""


class Worker(Stream):
    """Grants a session, and notes what comes after that."""

    def __init__(self) -> None:
        self.peer, self.protocol = PeerId("peer"), "test"
        self.asked = False
        self.messages: list[bytes] = []
        self.told = trio.Event()

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        self.messages.append(bytes(data))
        self.told.set()
        return len(data)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.asked

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if not self.asked:
            self.asked = True
            return frame(Reply.OPENED, encode_answer(FACTS))
        await trio.sleep_forever()
        raise AssertionError

    async def wait_send_all_might_not_block(self) -> None: ...

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...

    def reset(self) -> None: ...


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "one.gguf", SHAPE, 3)
    return tmp_path / "one.gguf"


async def test_small_uploads_cross_with_the_command_that_uses_them(model: Path) -> None:
    worker = Worker()

    async def open_stream() -> Stream:
        return worker

    asked = SessionRequest(digest="ab" * 32, memory_bytes=1, protocol=(7, 0, 0), model="one")
    uploads = [set_tensor(bytes([number]) * 100) for number in range(5)]
    recompute = frame(Command.GRAPH_RECOMPUTE, struct.pack("<I", 0))
    with open_weights((model,)) as weights:
        async with borrow(open_stream, asked, weights, LearnedHashes(None)) as borrowed:
            sock = await trio.open_tcp_stream("127.0.0.1", borrowed.port)
            async with sock:
                for upload in uploads:  # with a question that is answered before they leave
                    await sock.send_all(upload + frame(Command.DEVICE_COUNT))
                    assert await sock.receive_some(100) == answer(struct.pack("<I", 1))
                assert worker.messages == []
                await sock.send_all(recompute)
                await worker.told.wait()
                assert worker.messages == [b"".join(uploads) + recompute]


@pytest.mark.parametrize("abruptly", [True, False])
async def test_a_host_is_told_when_the_rpc_server_ends(model: Path, abruptly: bool) -> None:
    """Also when it dies over its work: its connection is reset then."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    ours = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
    host = Worker()
    host.asked = True
    with open_weights((model,)) as weights:
        session = Working(host, ours, WorkerEnd(1 << 20, 1, weights.holds), weights)
        async with listener, ours, trio.open_nursery() as nursery:
            server = await listener.accept()
            if abruptly:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            nursery.start_soon(server.aclose)
            with trio.fail_after(60):
                assert await session.run(b"") == ENDED
    assert host.messages == [frame(Reply.LOST, ENDED.encode())]


async def test_a_host_that_cannot_be_told_any_more_is_no_failure_of_the_session(model: Path) -> None:
    class Gone(Worker):
        def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
            raise trio.BrokenResourceError

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    ours = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
    host = Gone()
    host.asked = True
    with open_weights((model,)) as weights:
        session = Working(host, ours, WorkerEnd(1 << 20, 1, weights.holds), weights)
        async with listener, ours:
            await (await listener.accept()).aclose()
            with trio.fail_after(60):
                assert await session.run(b"") == ENDED

"""Members that mean harm, at a lender: whatever they say, they end their own session, and nobody else's."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing
from libmesh_node.llama.engine import Binary, Engine
from libmesh_node.llama.rpc import lender as lending
from libmesh_node.llama.rpc.frames import (
    SET_HEADER,
    Command,
    Frame,
    FrameParser,
    FramePiece,
    FrameStart,
    Link,
    ProtocolError,
    Reply,
    frame,
)
from libmesh_node.llama.rpc.lender import Lender
from libmesh_node.llama.rpc.opening import MAX_MESSAGE, Refusal, decode_answer, encode_request
from libmesh_node.llama.rpc.weights import Weights
from libmesh_node.llama.rpc.worker import MAX_WAITING, WorkerEnd
from libmesh_node.llama.rpc.working import ASK_LIMIT, IDLE_LIMIT, Working
from libmesh_node.models.demo import TINY, write_model
from libmesh_node.placement.seen import SERVICE

from libmesh import Mesh, Scope, Stream
from tests.llama.rpc import ends, messages
from tests.llama.rpc.messages import tensor
from tests.net.pairs import socket_pair
from tests.town import settled, town

NOWHERE = Binary(path=Path("/nonexistent"), version="", rpc_protocol="7.0.0", origin="here")


@asynccontextmanager
async def lent(lender: Lender) -> AsyncIterator[Callable[[], Awaitable[Stream]]]:
    """Streams of a member to a lender."""
    async with town() as place:
        far = await place.found(1)
        near = await place.join(2, far.invite(scope=Scope.WORKER, not_after_unix=None))
        await settled([far, near])

        async def open_stream() -> Stream:
            return await near.open_service(far.peer, SERVICE)

        with offered(far, lender):
            yield open_stream


def offered(mesh: Mesh, lender: Lender):  # type: ignore[no-untyped-def]
    return mesh.offer(SERVICE, lender.serve, scope=Scope.WORKER, lasting=True)


def nobodys(**how: int) -> Lender:
    """A lender that never gets as far as starting a program."""
    return Lender(NOWHERE, memory=lambda: how.get("memory", 0), environment={})


async def drip(stream: Stream, said: bytes) -> None:
    for byte in said:
        await stream.send_all(bytes([byte]))
        await trio.sleep(1)


async def hears_nothing(stream: Stream, said: bytes) -> None:
    await stream.send_all(said)
    await stream.receive_some()


# ── before there is a session ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("said", [b"", b"\x80", frame(Link.OPEN, bytes(100))[:50]])
async def test_who_does_not_ask_is_gone_after_a_while(
    said: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async with lent(nobodys()) as open_stream, await open_stream() as stream:
        started = trio.current_time()
        if said:
            await stream.send_all(said)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        assert trio.current_time() - started == ASK_LIMIT


async def test_who_asks_byte_by_byte_has_no_more_time_than_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lent(nobodys()) as open_stream, await open_stream() as stream:
        started = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await drip(stream, frame(Link.OPEN, bytes(MAX_MESSAGE)))
        assert trio.current_time() - started == pytest.approx(ASK_LIMIT, abs=1)


@pytest.mark.parametrize(
    "said",
    [
        struct.pack("<BQ", Link.OPEN, 1 << 63),
        struct.pack("<BQ", Link.OPEN, MAX_MESSAGE + 1),
        frame(Link.OPEN, b"\xff" * 40),
        frame(Link.OPEN),
        frame(Link.PUSH_OPEN, bytes(15)),
        frame(Link.REACH, bytes(16)),
        frame(Link.REACH, bytes(1 << 16)),
        frame(Command.HELLO, bytes(24)),
        frame(0xFF, bytes(9)),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_nonsense_instead_of_a_request_is_cut_off_at_once(
    said: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async with lent(nobodys()) as open_stream, await open_stream() as stream:
        started = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await hears_nothing(stream, said)
        assert trio.current_time() == started


async def test_results_for_nobody_are_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    async with lent(nobodys()) as open_stream, await open_stream() as stream:
        started = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await hears_nothing(stream, frame(Link.PUSH_OPEN, bytes(16)))
        assert trio.current_time() - started == ASK_LIMIT  # the session may still have been starting


# ── in a session ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_session_that_holds_nothing_ends_when_it_asks_for_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with working(WorkerEnd(1 << 20, 1, lambda place: False)) as (near, reasons):
        told = await near.receive_some()
        assert trio.current_time() == IDLE_LIMIT
        assert told == frame(Reply.LOST, b"no memory was asked for, nor anything else within 300 s")
        await trio.testing.wait_all_tasks_blocked()
        assert reasons == ["no memory was asked for, nor anything else within 300 s"]


async def test_a_request_that_stops_midway_ends_its_session(autojump_clock: trio.testing.MockClock) -> None:
    end = WorkerEnd(1 << 20, 1, lambda place: False)
    end.from_host(messages.allocate(64))
    end.from_server(struct.pack("<QQQ", 16, 1, 64))
    end.from_server(struct.pack("<QQ", 8, 1 << 20))
    async with working(end) as (near, reasons):
        await trio.sleep(10 * IDLE_LIMIT)  # between requests a host that holds something may take its time
        assert not reasons
        await near.send_all(frame(Command.ALLOC_BUFFER, bytes(12))[:15])
        with trio.fail_after(2 * ASK_LIMIT):
            told = await near.receive_some()
        assert told == frame(Reply.LOST, b"a request was not finished within 10 s")
        await trio.testing.wait_all_tasks_blocked()
        assert reasons == ["a request was not finished within 10 s"]


@asynccontextmanager
async def working(end: WorkerEnd) -> AsyncIterator[tuple[trio.SocketStream, list[str]]]:
    """A session at work: its host's end, and why it has ended, once it has."""
    near, far = await socket_pair()
    sock, server = await socket_pair()
    reasons: list[str] = []
    async with near, far, sock, server, trio.open_nursery() as nursery:
        session = Working(ends.SocketStream(far), sock, end, Weights([], [], {}))

        async def work() -> None:
            reasons.append(await session.run(b""))

        nursery.start_soon(work)
        yield near, reasons


def test_only_so_many_questions_wait_for_their_answers() -> None:
    end = WorkerEnd(1 << 20, 1, lambda place: False)
    asked = frame(Command.GET_ALLOC_SIZE, bytes(4) + tensor(buffer=0, data=0) * 11)
    end.from_host(asked * MAX_WAITING)
    with pytest.raises(ProtocolError, match="requests at once"):
        end.from_host(asked)


# ── with the real program ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_model(path, TINY, 7)
    return path


class Host:
    """Speaks to a lender by hand."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._parser = FrameParser(lambda kind, size: None, {Reply.ANSWER: 0})
        self._frames: list[Frame] = []

    async def ask(self, message: bytes) -> Frame:
        await self.stream.send_all(message)
        return await self.hear()

    async def hear(self) -> Frame:
        head, rest = b"", 0
        while not self._frames:
            data = await self.stream.receive_some()
            assert data, "the stream ended"
            for event in self._parser.feed(bytes(data)):
                match event:
                    case Frame():
                        self._frames.append(event)
                    case FrameStart(size=rest):
                        head = event.head
                    case FramePiece(last=True):
                        self._frames.append(Frame(Reply.ANSWER, head + bytes(rest)))
        return self._frames.pop(0)

    async def has_a_buffer(self, size: int = 1 << 16) -> bytes:
        """A tensor's beginnings: in a new buffer, at its base."""
        told = (await self.ask(messages.allocate(size))).payload
        pointer, given, base = struct.unpack("<QQQ", told)
        assert given >= size
        return tensor(buffer=pointer, data=base)


async def session(open_stream: Callable[[], Awaitable[Stream]], engine: Engine) -> Host:
    host = Host(await open_stream())
    told = await host.ask(frame(Link.OPEN, encode_request(ends.request(engine, memory=1 << 20))))
    assert told.kind == Reply.OPENED
    assert not isinstance(decode_answer(told.payload), Refusal)
    return host


def hostile(about: bytes) -> dict[str, bytes]:
    """What a host may say of a tensor that it has."""
    start = struct.unpack_from("<Q", about, 220)[0]
    return {
        "an upload of 2^63 bytes": struct.pack("<BQ", Command.SET_TENSOR, (1 << 63) + 1),
        "an upload of 4 GiB": struct.pack("<BQ", Command.SET_TENSOR, (1 << 32) + SET_HEADER)
        + about
        + bytes(9),
        "a graph of 2^40 bytes": struct.pack("<BQ", Command.GRAPH_COMPUTE, 1 << 40),
        "a read beyond the buffer": messages.get_tensor(1 << 20, about),
        "a read of 2^63 bytes": messages.get_tensor(1 << 63, about),
        "a read elsewhere": messages.get_tensor(
            64, about[:220] + struct.pack("<Q", start - 4096) + about[228:]
        ),
        "an unknown operation": messages.graph(about[:52] + struct.pack("<I", 9999) + about[56:]),
        "an unknown command": frame(0x42, bytes(100)),
        "a hash, which would stay": messages.set_hash(about, 1),
    }


@pytest.mark.llama
async def test_no_hostile_host_harms_the_program_of_another_one(engine: Engine, model: Path) -> None:
    lender = ends.lender(engine, model, memory=1 << 30)
    async with lent(lender) as open_stream:
        with trio.fail_after(4 * ends.PATIENCE):
            bystander = await session(open_stream, engine)
            about = await bystander.has_a_buffer()
            await bystander.stream.send_all(messages.set_tensor(b"mine".ljust(64), about))
            (theirs,) = lender.processes
            for name in hostile(about):
                host = await session(open_stream, engine)
                message = hostile(await host.has_a_buffer())[name]
                pids = {process.pid for process in lender.processes} - {theirs.pid}
                with suppress(trio.BrokenResourceError):
                    await host.stream.send_all(message)
                assert (await host.hear()).kind == Reply.LOST, name
                while lender.processes != (theirs,):  # noqa: ASYNC110 - a process ends
                    await trio.sleep(0.01)
                assert not any(psutil.pid_exists(pid) for pid in pids if pid)
            assert (await bystander.ask(messages.get_tensor(64, about))).payload == b"mine".ljust(64)
            bystander.stream.reset()


@pytest.mark.llama
async def test_no_host_gets_more_sessions_or_memory_than_there_is(
    engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lending, "MAX_SESSIONS", 1)
    lender = ends.lender(engine, model, memory=1 << 21)
    async with lent(lender) as open_stream:
        with trio.fail_after(ends.PATIENCE):
            first = await session(open_stream, engine)
            refused = Host(await open_stream())
            asked = frame(Link.OPEN, encode_request(ends.request(engine, memory=1 << 20)))
            answered = decode_answer((await refused.ask(asked)).payload)
            assert answered == Refusal("it has 1 sessions already", later=True)
            told = await first.ask(messages.allocate((1 << 20) + 1))
            assert told.payload == bytes(24)  # more than it was granted: out of memory, as llama.cpp says it
            first.stream.reset()

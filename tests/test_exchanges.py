"""Services with a framing: several exchanges on one stream, each over a connection of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from libmesh import Door, Mesh, ServiceRefused, StreamReset, expose, serve_tunnel, tunnel
from libmesh.exchanges import HOLD_BYTES, Exchanges
from libmesh.net.base import Sink
from libmesh.net.splice import reset_on_close
from libmesh.testing.memory_streams import MemoryStream, Pipe
from tests.test_tunnel import reset_is_seen, serve, two_meshes
from tests.town import client_invite, settled, town


class Lines:
    """A line is asked, and a line is answered."""

    def __init__(self) -> None:
        self._asked = b""

    def asked(self, data: bytes | bytearray) -> None:
        self._asked += data

    def answered(self, data: bytes) -> bool:
        return data.endswith(b"\n") and self._asked.find(b"\n") == len(self._asked) - 1


class Service:
    """Answers one line on each connection, then closes it."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.go_on = trio.Event()
        self.go_on.set()
        self.closed = 0

    async def take(self, stream: trio.SocketStream) -> None:
        try:
            said = b""
            while not said.endswith(b"\n"):
                said += (more := await stream.receive_some())
                if not more:
                    break
            self.asked.append(said)
            await self.go_on.wait()
            await stream.send_all(b"re " + said)
        finally:
            self.closed += 1


@asynccontextmanager
async def exposed(
    handler: Callable[[trio.SocketStream], object] | None = None, *, door: Door | None = None
) -> AsyncIterator[tuple[trio.SocketStream, Mesh, trio.CancelScope]]:
    """A connection through a tunnel to `handler`, the mesh that has it, and what ends the service."""

    async def offer(*, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                await inner.start(partial(expose, near, "tcp", "127.0.0.1", behind, door=door, framing=Lines))
                task_status.started(scope)

    with trio.fail_after(60):
        async with two_meshes() as (near, far, nursery):
            behind = 9 if handler is None else await serve(nursery, handler)
            scope: trio.CancelScope = await nursery.start(offer)
            port: int = await nursery.start(serve_tunnel, far, near.peer, "tcp")
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                yield stream, near, scope


@asynccontextmanager
async def tunnelled_far(
    handler: Callable[[trio.SocketStream], object],
) -> AsyncIterator[tuple[Mesh, Mesh, int, Callable[[], None]]]:
    """Two members on machines of their own, the port of a tunnel to `handler`, and what cuts their connection."""
    async with town() as place:
        relay = await place.found(1)
        near, far = [await place.join(number, client_invite(relay)) for number in (2, 3)]
        await settled([relay, near, far])
        async with trio.open_nursery() as nursery:
            behind = await serve(nursery, handler)
            await nursery.start(partial(expose, far, "tcp", "127.0.0.1", behind, framing=Lines))
            port: int = await nursery.start(serve_tunnel, near, far.peer, "tcp")
            yield near, far, port, partial(place.hub.cut, near.peer, far.peer)
            nursery.cancel_scope.cancel()


async def line(stream: trio.SocketStream) -> bytes:
    """Whole, and nothing behind it."""
    said = b""
    while not said.endswith(b"\n"):
        said += (more := await stream.receive_some())
        assert more
    return said


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - sockets tell nobody
        await trio.sleep(0.01)


async def test_each_exchange_has_a_connection_and_a_place_of_its_own() -> None:
    service, inside, entered = Service(), list[str](), 0

    @asynccontextmanager
    async def door(peer: str) -> AsyncIterator[tuple[str, int] | None]:
        nonlocal entered
        entered += 1
        inside.append(peer)
        yield None
        inside.remove(peer)

    async with exposed(service.take, door=door) as (stream, *_):
        for number in range(5):
            await stream.send_all(b"%d\n" % number)
            assert await line(stream) == b"re %d\n" % number
        await until(lambda: not inside)
        assert (entered, service.asked) == (5, [b"%d\n" % number for number in range(5)])
        await stream.send_eof()
        assert await stream.receive_some() == b""


async def test_connection_to_the_service_is_closed_with_the_exchange() -> None:
    lingering = 0

    async def linger(stream: trio.SocketStream) -> None:
        nonlocal lingering
        lingering += 1
        await line(stream)
        await stream.send_all(b"yes\n")
        assert await stream.receive_some() == b""  # and no reset
        lingering -= 1

    async with exposed(linger) as (stream, *_):
        await stream.send_all(b"?\n")
        assert await line(stream) == b"yes\n"
        await until(lambda: not lingering)


async def test_what_is_long_crosses_whole_in_both_directions() -> None:
    service, opened = Service(), trio.Event()

    @asynccontextmanager
    async def door(_: str) -> AsyncIterator[tuple[str, int] | None]:
        await opened.wait()
        yield None

    async with exposed(service.take, door=door) as (stream, *_), trio.open_nursery() as nursery:
        for long in (b"a" * (5 * HOLD_BYTES) + b"\n", b"b" * (2 * HOLD_BYTES) + b"\n"):
            nursery.start_soon(stream.send_all, long)
            await trio.testing.wait_all_tasks_blocked(0.05)
            opened.set()
            assert await line(stream) == b"re " + long


async def test_an_end_of_file_reaches_the_service_which_may_answer_still() -> None:
    async def after_the_end(stream: trio.SocketStream) -> None:
        said = b"".join([data async for data in stream])
        await stream.send_all(b"got " + said)

    async with exposed(after_the_end) as (stream, *_):
        await stream.send_all(b"half")
        await stream.send_eof()
        assert b"".join([data async for data in stream]) == b"got half"


async def test_opener_that_is_gone_takes_its_exchange_with_it() -> None:
    ended = trio.Event()

    async def talk(stream: trio.SocketStream) -> None:
        try:
            await line(stream)
            while True:
                await stream.send_all(b"and ")
                await trio.sleep(0.01)
        except trio.BrokenResourceError:
            ended.set()

    async with exposed(talk) as (stream, *_):
        await stream.send_all(b"tell\n")
        await stream.receive_some()
        await stream.aclose()
        await ended.wait()


@pytest.mark.parametrize("asked", [b"let me in\n", b"a" * (HOLD_BYTES // 2)])
async def test_opener_that_is_gone_before_its_turn_is_never_served(asked: bytes) -> None:
    service, waiting = Service(), 0

    @asynccontextmanager
    async def door(_: str) -> AsyncIterator[tuple[str, int] | None]:
        nonlocal waiting
        waiting += 1
        try:
            await trio.sleep_forever()
            yield None
        finally:
            waiting -= 1

    async with exposed(service.take, door=door) as (stream, *_):
        await stream.send_all(asked)
        await until(lambda: waiting == 1)
        await trio.testing.wait_all_tasks_blocked(0.05)
        reset_on_close(stream.socket)
        await stream.aclose()
        await until(lambda: not waiting)
        assert not service.asked


@pytest.mark.parametrize("resets", [False, True])
async def test_service_that_ends_in_the_middle_ends_the_stream_alike(resets: bool) -> None:
    async def half(stream: trio.SocketStream) -> None:
        await line(stream)
        await stream.send_all(b"ha")
        if resets:
            await trio.sleep(0.05)  # a reset overtakes what was sent
            reset_on_close(stream.socket)

    async with exposed(half) as (stream, *_):
        await stream.send_all(b"?\n")
        if resets:
            await reset_is_seen(stream)
        else:
            assert b"".join([data async for data in stream]) == b"ha"


async def test_service_that_ends_leaves_no_tunnel_that_might_go_on() -> None:
    async def half(stream: trio.SocketStream) -> None:
        await line(stream)
        await stream.send_all(b"ha")

    with trio.fail_after(5):
        async with tunnelled_far(half) as (near, far, port, _):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"?\n")
                assert b"".join([data async for data in stream]) == b"ha"
            await until(lambda: not near.resumption.tunnels and not far.resumption.tunnels)


async def test_stream_goes_on_when_its_connection_is_lost_in_an_exchange_and_between_two() -> None:
    service = Service()
    with trio.fail_after(30):
        async with tunnelled_far(service.take) as (near, far, port, cut):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                for number in range(3):
                    service.go_on = trio.Event()
                    await stream.send_all(b"%d\n" % number)
                    await until(lambda: len(service.asked) > number)  # noqa: B023 - it is not called later
                    cut()
                    service.go_on.set()
                    assert await line(stream) == b"re %d\n" % number
                    assert len(far.resumption.tunnels) == 1
                    cut()
            await until(lambda: not near.resumption.tunnels and not far.resumption.tunnels)


async def test_nothing_behind_the_service_is_a_reset() -> None:
    async with exposed() as (stream, *_):
        await stream.send_all(b"?\n")
        await reset_is_seen(stream)


async def test_who_is_refused_at_the_door_is_reset() -> None:
    @asynccontextmanager
    async def door(_: str) -> AsyncIterator[tuple[str, int] | None]:
        raise ServiceRefused("no", reason="busy")
        yield None

    async with exposed(Service().take, door=door) as (stream, *_):
        await stream.send_all(b"?\n")
        await reset_is_seen(stream)


async def test_what_is_said_before_the_answer_belongs_to_the_exchange_under_way() -> None:
    service = Service()
    service.go_on = trio.Event()
    async with exposed(service.take) as (stream, *_):
        await stream.send_all(b"one\n")
        await until(lambda: len(service.asked) == 1)
        await stream.send_all(b"two\n")
        await trio.testing.wait_all_tasks_blocked(0.05)
        service.go_on.set()
        await reset_is_seen(stream)  # as by a service that closes without having read all
        assert service.asked == [b"one\n"]


async def test_stream_without_an_exchange_is_reset_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "IDLE_LIMIT", 0.05)
    async with exposed(Service().take) as (stream, *_):
        await stream.send_all(b"?\n")
        assert await line(stream) == b"re ?\n"
        await reset_is_seen(stream)


async def test_end_of_the_service_lets_an_exchange_finish_and_then_ends_its_stream() -> None:
    service = Service()
    service.go_on = trio.Event()
    async with exposed(service.take) as (stream, _, scope):
        await stream.send_all(b"long\n")
        await until(lambda: len(service.asked) == 1)
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked(0.05)
        service.go_on.set()
        assert await line(stream) == b"re long\n"
        assert await stream.receive_some() == b""


async def test_bytes_of_each_exchange_are_counted_when_it_is_over() -> None:
    async with exposed(Service().take) as (stream, mesh, _):
        await stream.send_all(b"?\n")
        assert await line(stream) == b"re ?\n"
        counts = dict(mesh.tunnelled)
        assert sorted(counts.values()) == [2, 5]


async def test_end_of_the_service_ends_idle_streams() -> None:
    async with exposed(Service().take) as (stream, _, scope):
        await stream.send_all(b"?\n")
        assert await line(stream) == b"re ?\n"
        await trio.testing.wait_all_tasks_blocked(0.05)
        scope.cancel()
        await reset_is_seen(stream)


class LostAtOnce(MemoryStream):
    """Is reset in the turn in which it was asked something."""

    async def receive_past(self, sink: Sink) -> bytes:
        await trio.testing.wait_all_tasks_blocked()
        sink([b"?\n"])
        raise StreamReset("the peer reset it")


async def test_what_is_asked_on_a_stream_that_is_lost_in_the_same_turn_is_not_served() -> None:
    service = Service()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            port = await serve(nursery, service.take)
            exchanges = Exchanges(
                "127.0.0.1",
                port,
                door=None,
                framing=Lines,
                counter=lambda _: lambda *_: None,
                connect_limit=10,
                idle_limit=10,
            )
            for _ in range(20):  # the order of tasks is drawn by lot
                there, back = Pipe(), Pipe()
                near = MemoryStream("far", "/lines", there, back)
                await exchanges.serve(LostAtOnce("near", "/lines", back, there))
                with pytest.raises(StreamReset):
                    await near.receive_some()
            assert not service.asked
            nursery.cancel_scope.cancel()

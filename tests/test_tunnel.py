"""Services over streams, and TCP over services: what crosses, what is refused, and what a lying peer can do."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio
import trio.testing

from libmesh import (
    AddressUnavailable,
    Mesh,
    MeshConfig,
    PathKind,
    PeerUnreachable,
    Scope,
    ServiceRefused,
    Stream,
    StreamReset,
    expose,
    open_mesh,
    serve_tunnel,
    tunnel,
    wire,
)
from libmesh.framing import frame, receive_frame
from libmesh.testing.memory import MemoryHub
from tests.members import key, memory_streams, seed

QUICK = MeshConfig(farewell=0.01)


async def echo(stream: Stream, accept: tunnel.Accept) -> None:
    await accept()
    async for data in stream:
        await stream.send_all(data)
    await stream.aclose()


def choose(service: str) -> tunnel.RawHandler:
    if service == "echo":
        return echo
    raise ServiceRefused("no", reason="unknown_service")


@asynccontextmanager
async def answered(answer: Callable[[Stream], object] | None = None) -> AsyncIterator[Stream]:
    """A fresh stream whose other end is served by `tunnel.answer`, or by `answer`."""
    async with memory_streams() as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(answer or partial(tunnel.answer, choose=choose), far)  # type: ignore[arg-type]
        yield near
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("wait", [True, False])
async def test_an_accepted_stream_carries_the_services_bytes(wait: bool) -> None:
    async with answered() as stream:
        opened = await tunnel.request(stream, "echo", wait=wait)
        await opened.send_all(b"hello")
        await opened.send_eof()
        assert b"".join([bytes(data) async for data in opened]) == b"hello"
        await opened.aclose()


async def test_with_wait_a_refusal_comes_at_once() -> None:
    async with answered() as stream:
        with pytest.raises(ServiceRefused, match="no service 'nope'") as caught:
            await tunnel.request(stream, "nope", wait=True)
        assert caught.value.reason == "unknown_service"


async def test_without_wait_a_refusal_comes_out_of_the_first_receive_and_of_every_other() -> None:
    async with answered() as stream:
        opened = await tunnel.request(stream, "nope", wait=False)
        await opened.send_all(b"a request that nobody wants")
        with pytest.raises(ServiceRefused):
            await opened.receive_some()
        with pytest.raises((ServiceRefused, trio.ClosedResourceError)):
            await opened.receive_some()


async def test_a_refusal_that_a_handler_meets_later_is_not_said_among_the_services_bytes() -> None:
    async def gateway(stream: Stream, accept: tunnel.Accept) -> None:
        await accept()
        await stream.send_all(b"so far")
        raise ServiceRefused("no", reason="unknown_service")

    async def served(stream: Stream) -> None:
        with pytest.raises(ServiceRefused):
            await tunnel.answer(stream, lambda _: gateway)
        stream.reset()

    async with answered(served) as stream:
        opened = await tunnel.request(stream, "gateway", wait=True)
        assert await opened.receive_some() == b"so far"
        with pytest.raises(StreamReset):
            await opened.receive_some()


async def test_a_receive_that_was_cancelled_before_the_answer_loses_nothing() -> None:
    step, steps = trio.open_memory_channel[None](0)
    refusal = frame(wire.encode_opened("busy"))

    async def hesitate(stream: Stream) -> None:
        await receive_frame(stream, wire.MAX_OPEN)
        for byte in refusal:
            await steps.receive()
            await stream.send_all(bytes([byte]))
        await trio.sleep_forever()

    async with answered(hesitate) as stream:
        opened = await tunnel.request(stream, "echo", wait=False)
        for _ in refusal[1:]:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(opened.receive_some)
                    await step.send(None)
                    await trio.testing.wait_all_tasks_blocked()  # the byte has been taken in
                    scope.cancel()
        await step.send(None)
        with pytest.raises(ServiceRefused) as caught:
            await opened.receive_some()
        assert caught.value.reason == "busy"


@pytest.mark.parametrize("said", [b"\x80\x80\x80\x80", frame(b"\xff\xff"), b"\xff\x7f", b""])
@pytest.mark.parametrize("wait", [True, False])
async def test_an_answer_that_makes_no_sense_is_an_error_of_the_stream(said: bytes, wait: bool) -> None:
    async def lie(stream: Stream) -> None:
        await stream.send_all(said)
        await stream.send_eof()
        await trio.sleep_forever()

    async with answered(lie) as stream:
        if wait:
            with pytest.raises(PeerUnreachable, match="did not answer as a mesh does"):
                await tunnel.request(stream, "echo", wait=True)
        else:
            opened = await tunnel.request(stream, "echo", wait=False)
            with pytest.raises(StreamReset):
                await opened.receive_some()


@pytest.mark.parametrize(
    "said", [b"\x80\x80\x80\x80", frame(b"\xff\xff"), frame(b""), b"\x85\x10", b"GET / HTTP/1.1\r\n"]
)
async def test_garbage_instead_of_an_open_resets_the_stream(said: bytes) -> None:
    async with answered() as stream:
        await stream.send_all(said)
        await stream.send_eof()
        with pytest.raises(StreamReset):
            await stream.receive_some()


async def test_whoever_opens_and_says_nothing_is_reset(autojump_clock: trio.abc.Clock) -> None:
    async with answered() as stream:
        await stream.send_all(frame(wire.encode_open("echo"))[:-1])
        started = trio.current_time()
        with pytest.raises(StreamReset):
            await stream.receive_some()
        assert trio.current_time() - started == pytest.approx(tunnel.OPEN_LIMIT)


async def test_a_request_that_is_cancelled_leaves_no_stream_behind() -> None:
    seen: list[type[BaseException]] = []

    async def ponder(stream: Stream) -> None:
        await receive_frame(stream, wire.MAX_OPEN)
        try:
            await stream.receive_some()
        except trio.BrokenResourceError as exc:
            seen.append(type(exc))

    async with answered(ponder) as stream:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(tunnel.request, stream, "echo", wait=True))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
    assert seen == [StreamReset]


# ── TCP at both ends ─────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def two_meshes() -> AsyncIterator[tuple[Mesh, Mesh, trio.Nursery]]:
    """A founder, a worker that joined it, and a nursery that is cancelled at the end."""
    hub = MemoryHub()
    async with (
        hub.open_network(seed(1)) as one,
        hub.open_network(seed(2)) as two,
        open_mesh(key(1), mesh_key=key(100), network=one, config=QUICK) as near,
    ):
        token = near.invite(scope=Scope.WORKER, not_after_unix=None)
        async with (
            open_mesh(key(2), invite=token, network=two, config=QUICK) as far,
            trio.open_nursery() as nursery,
        ):
            yield near, far, nursery
            nursery.cancel_scope.cancel()


async def serve(nursery: trio.Nursery, handler: Callable[[trio.SocketStream], object]) -> int:
    """Listen on a free port; the port."""
    listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
    port: int = listeners[0].socket.getsockname()[1]
    return port


async def tcp_echo(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):
        async for data in stream:
            await stream.send_all(data)


async def tunnelled(
    near: Mesh, far: Mesh, nursery: trio.Nursery, target: int, scope: Scope = Scope.CLIENT
) -> int:
    """The far side's local port that leads to `target` on the near side."""
    await nursery.start(partial(expose, near, "tcp", "127.0.0.1", target, scope=scope))
    port: int = await nursery.start(serve_tunnel, far, near.peer, "tcp")
    return port


async def reset_is_seen(stream: trio.SocketStream) -> None:
    async def read() -> None:
        async for _ in stream:
            continue

    with pytest.raises(trio.BrokenResourceError):
        await read()


async def test_a_local_port_leads_to_the_exposed_one() -> None:
    async with two_meshes() as (near, far, nursery):
        port = await tunnelled(near, far, nursery, await serve(nursery, tcp_echo))
        for text in (b"one", b"two" * 100_000):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                nursery.start_soon(send, stream, text)
                assert b"".join([data async for data in stream]) == text
        counted = {(PathKind.DIRECT, "sent"): 300_003, (PathKind.DIRECT, "received"): 300_003}
        with trio.fail_after(60):
            while not near.tunnelled == far.tunnelled == counted:  # noqa: ASYNC110 - counters tell nobody
                await trio.sleep(0.01)


async def send(stream: trio.SocketStream, data: bytes) -> None:
    await stream.send_all(data)
    await stream.send_eof()


async def test_an_end_of_file_crosses_while_the_other_direction_goes_on() -> None:
    async def reply_after_the_end(stream: trio.SocketStream) -> None:
        request = b"".join([data async for data in stream])
        await stream.send_all(b"got " + request)

    async with two_meshes() as (near, far, nursery):
        port = await tunnelled(near, far, nursery, await serve(nursery, reply_after_the_end))
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await send(stream, b"request")
            assert b"".join([data async for data in stream]) == b"got request"


async def test_a_reset_crosses_and_is_no_end_of_file() -> None:
    async def die(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with two_meshes() as (near, far, nursery):
        port = await tunnelled(near, far, nursery, await serve(nursery, die))
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"x")
            await reset_is_seen(stream)


async def test_what_cannot_be_a_hosts_name_is_unavailable_too() -> None:
    async with two_meshes() as (near, far, nursery):
        await nursery.start(expose, near, "tcp", "a..b", 80)
        with pytest.raises(ServiceRefused) as caught:
            await far.open_service(near.peer, "tcp")
        assert caught.value.reason == "unavailable"


async def test_nothing_behind_the_service_resets_the_connection_and_the_tunnel_lives() -> None:
    async with two_meshes() as (near, far, nursery):
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))  # taken, and nobody listens
        with sock:
            port = await tunnelled(near, far, nursery, sock.getsockname()[1])
            with pytest.raises(ServiceRefused) as caught:
                await far.open_service(near.peer, "tcp")
            assert caught.value.reason == "unavailable"
            for _ in range(3):
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    await reset_is_seen(stream)


async def test_a_service_that_is_gone_resets_the_connection_and_serves_again_when_it_is_back() -> None:
    async with two_meshes() as (near, far, nursery):
        port: int = await nursery.start(serve_tunnel, far, near.peer, "tcp")
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await reset_is_seen(stream)
        await nursery.start(expose, near, "tcp", "127.0.0.1", await serve(nursery, tcp_echo))
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await send(stream, b"x")
            assert await stream.receive_some() == b"x"


@pytest.mark.parametrize("said", [b"\x80\x80\x80\x80", frame(b"\xff\xff"), b""])
async def test_a_lying_peer_costs_a_connection_and_not_the_tunnel(said: bytes) -> None:
    async def lie(stream: Stream) -> None:
        await stream.send_all(said)
        await stream.send_eof()
        await stream.receive_some()

    async with two_meshes() as (near, far, nursery):
        near._driver.network.set_handler(tunnel.PROTOCOL, lie)
        port: int = await nursery.start(serve_tunnel, far, near.peer, "tcp")
        for _ in range(3):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"x")
                await reset_is_seen(stream)


async def test_a_peer_that_cannot_be_reached_costs_a_connection_and_not_the_tunnel() -> None:
    async with two_meshes() as (near, far, nursery):
        port: int = await nursery.start(serve_tunnel, near, key(9).peer, "tcp")
        for _ in range(2):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await reset_is_seen(stream)
        assert far.view.get(near.peer) is not None


async def test_a_port_that_is_taken_is_said() -> None:
    async with two_meshes() as (near, far, nursery):
        taken = await serve(nursery, tcp_echo)
        with pytest.raises(AddressUnavailable, match=f"{taken}.*already in use"):
            await serve_tunnel(far, near.peer, "tcp", port=taken)
        with pytest.raises(AddressUnavailable, match="cannot be used"):
            await serve_tunnel(far, near.peer, "tcp", host="192.0.2.1")


async def test_cancelling_a_tunnel_closes_its_port_and_its_connections() -> None:
    async with two_meshes() as (near, far, nursery):
        await nursery.start(expose, near, "tcp", "127.0.0.1", await serve(nursery, tcp_echo))
        async with trio.open_nursery() as inner:
            port: int = await inner.start(serve_tunnel, far, near.peer, "tcp")
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            inner.cancel_scope.cancel()
        await reset_is_seen(stream)
        await stream.aclose()
        with pytest.raises(OSError, match="connect"):
            await trio.open_tcp_stream("127.0.0.1", port)


async def test_connections_in_a_nursery_of_their_own_outlive_the_tunnel() -> None:
    async with two_meshes() as (near, far, nursery), trio.open_nursery() as connections:
        await nursery.start(expose, near, "tcp", "127.0.0.1", await serve(nursery, tcp_echo))
        async with trio.open_nursery() as inner:
            carry = partial(serve_tunnel, handler_nursery=connections)
            port: int = await inner.start(carry, far, near.peer, "tcp")
            client = await trio.open_tcp_stream("127.0.0.1", port)
            await client.send_all(b"before")
            assert await client.receive_some() == b"before"
            inner.cancel_scope.cancel()
        async with client:
            await client.send_all(b"after")
            assert await client.receive_some() == b"after"


async def test_an_exposed_port_needs_the_scope_that_was_asked_for() -> None:
    async with two_meshes() as (near, far, nursery):
        await nursery.start(partial(expose, near, "invite", "127.0.0.1", 1, scope=Scope.INVITE))
        with pytest.raises(ServiceRefused) as caught:
            await far.open_service(near.peer, "invite")
        assert caught.value.reason == "scope"


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 256])
async def test_a_bad_name_is_not_exposed(name: str) -> None:
    async with two_meshes() as (near, _, _):
        with pytest.raises(ValueError, match="service name"):
            await expose(near, name, "127.0.0.1", 1)

"""Rules of the transport, up to the first stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

from libmesh._pb import mesh_pb2 as pb
from libmesh.errors import MeshError
from libmesh.net import tcp
from libmesh.net.negotiate import open_lazy_stream
from libmesh.testing.conformance.bench import AGENT, HELLO, KIB, PROBE, Bench
from libmesh.testing.conformance.chains import Identity
from libmesh.testing.conformance.foreign import HandshakeFailed, foreign_connection
from libmesh.testing.conformance.rules import RuleBroken, require, rule
from libmesh.testing.conformance.streams import frame, receive

REFUSALS = (HandshakeFailed, MeshError, RuleBroken, trio.BrokenResourceError)
"""How a connection or a stream may end that the peer does not want."""

MULTISTREAM = "/multistream/1.0.0"
CLEAR = ("/plaintext/2.0.0", "/plaintext/1.0.0", "/secio/1.0.0")


def line(text: str) -> bytes:
    """A line of multistream-select."""
    return bytes([len(text) + 1]) + text.encode() + b"\n"


@asynccontextmanager
async def raw_connection(bench: Bench) -> AsyncIterator[trio.SocketStream]:
    """A TCP connection on which nothing was said."""
    stream = await tcp.dial(bench.target.address)
    async with stream:
        yield stream


async def read_line(stream: trio.SocketStream) -> str:
    """A line of multistream-select; empty if the connection was closed."""
    try:
        size = await stream.receive_some(1)
        data = b""
        while size and len(data) < size[0]:
            piece = await stream.receive_some(size[0] - len(data))
            if not piece:
                return ""
            data += piece
    except trio.BrokenResourceError:
        return ""
    return data.decode("utf-8", "replace").strip("\n")


async def is_closed(stream: trio.SocketStream, within: float) -> bool:
    """Whether the other side closes the connection within that many seconds, whatever it says before."""
    with trio.move_on_after(within):
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            return True
        return True
    return False


@rule(
    "transport.noise",
    "Connections are secured by Noise, agreed on by multistream-select.",
    place='"Transport"',
)
async def noise(bench: Bench) -> None:
    """Ask for /noise in clear."""
    async with raw_connection(bench) as stream:
        await stream.send_all(line(MULTISTREAM) + line("/noise"))
        said = [await read_line(stream), await read_line(stream)]
    require(said == [MULTISTREAM, "/noise"], f"it answered {said}")


@rule(
    "transport.no_plaintext",
    "A connection that is not to be secured by Noise is refused.",
    place='"Transport"',
)
async def no_plaintext(bench: Bench) -> None:
    """Ask for everything but Noise, and for a stream in clear."""
    async with raw_connection(bench) as stream:
        await stream.send_all(line(MULTISTREAM))
        await read_line(stream)
        for proposal in (*CLEAR, "/yamux/1.0.0", PROBE):
            await stream.send_all(line(proposal))
            said = await read_line(stream)
            require(said in ("na", ""), f"it agreed to {proposal}: {said!r}")
            if not said:
                return


@rule(
    "transport.garbage",
    "Bytes that are no handshake end the connection, and nothing else.",
    place='"Transport"',
)
async def garbage(bench: Bench) -> None:
    """Send HTTP, and a Noise handshake of zeros."""
    openings = (
        b"GET / HTTP/1.1\r\nHost: mesh\r\n\r\n" * 8,
        line(MULTISTREAM) + line("/noise") + b"\x00\x60" + bytes(96),
    )
    for opening in openings:
        async with raw_connection(bench) as stream:
            await stream.send_all(opening)
            require(await is_closed(stream, 4), f"it left the connection open after {opening[:14]!r}…")
    await bench.require_alive()


@rule(
    "transport.identity",
    "The handshake proves the Ed25519 key that is in the peer's id.",
    place='"Transport"',
)
async def identity(bench: Bench) -> None:
    """Our own end of the handshake checks it; a connection is the proof."""
    async with bench.stranger() as guest:
        require(guest.network.path(bench.target.peer) is not None, "there is no connection to that id")


@rule("transport.ed25519_only", "A peer whose key is not an Ed25519 key is not let in.", place='"Transport"')
async def ed25519_only(bench: Bench) -> None:
    """Come with a secp256k1 key. Where it is refused, in the handshake or at the hello, is the peer's choice."""
    hello = pb.Hello(agent=AGENT, credential=bench.credential(Identity.fresh()))
    reply = None
    async with raw_connection(bench) as stream:
        await stream.send_all(line(MULTISTREAM) + line("/noise"))
        require(
            [await read_line(stream), await read_line(stream)] == [MULTISTREAM, "/noise"], "it has no /noise"
        )
        with suppress(*REFUSALS):
            async with foreign_connection(stream) as connection:
                with suppress(*REFUSALS):
                    opened = await open_lazy_stream(connection, bench.target.peer, HELLO)
                    await opened.send_all(frame(hello))
                    reply = await receive(opened, pb.HelloReply, 4 * KIB)
    require(reply is None or reply.HasField("refusal"), "it let it in")
    await bench.require_alive()


@rule("transport.yamux", "A hundred streams at once share a connection.", place='"Transport"')
async def yamux(bench: Bench) -> None:
    """A hundred probes that are all asked before any is answered."""
    answered = 0
    async with bench.member() as guest:
        streams = [await guest.open(PROBE) for _ in range(100)]

        async def ask(number: int) -> None:
            nonlocal answered
            try:
                await streams[number].send_all(frame(b""))
                if await streams[number].receive_some(1):
                    answered += 1
            except trio.BrokenResourceError as exc:
                raise RuleBroken(f"one of a hundred streams failed: {exc}") from exc

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(ask, number)
    require(answered == 100, f"{answered} of a hundred streams were answered")

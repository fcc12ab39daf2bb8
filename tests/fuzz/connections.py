"""A target for a whole connection: our muxer and all that runs on it, against a peer of any behaviour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import trio
import trio.testing
from libp2p.io.exceptions import IOException
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable

from libmesh import tunnel, wire
from libmesh.core.yamux_frames import (
    ACK,
    DATA,
    FIN,
    HEADER,
    PING,
    RST,
    SPEC_WINDOW,
    SYN,
    WINDOW_UPDATE,
    Options,
)
from libmesh.errors import PeerUnreachable, ServiceRefused
from libmesh.framing import frame
from libmesh.net.base import Stream
from libmesh.net.lines import HEADER as MULTISTREAM
from libmesh.net.lines import encode_line
from libmesh.net.muxer import YamuxConnection
from libmesh.net.negotiate import accept_stream, open_lazy_stream
from libmesh.peers import PeerId
from tests.fuzz.channels import in_virtual_time
from tests.fuzz.target import Lots, Target
from tests.members import peer
from tests.net.pairs import KEYS, peer_of

SMALL = Options(max_inbound=8, backlog=4, max_unacknowledged=4, max_unread=2 * SPEC_WINDOW, linger=1.0)
LENGTHS = (0, 1, 7, 256, SPEC_WINDOW, SPEC_WINDOW + 1, 2**32 - 1)
LINES = (
    *map(encode_line, (MULTISTREAM, tunnel.PROTOCOL, "/echo/1", "na", "ls", "")),
    b"\xff\xff\xff",
    b"\0",
    b"\x05abcde",
)
PEER = PeerId(peer(2))
AFTERMATH = 100.0
"""Virtual seconds after the peer's last word in which all must have ended: pings find it dead after 15."""


class Scripted:
    """A secure connection to a peer that follows a script. What it is sent is counted and dropped."""

    def __init__(self, script: list[bytes | float], is_initiator: bool, hangs_up: bool) -> None:
        self._script, self.is_initiator, self._hangs_up = script, is_initiator, hangs_up
        self._closed = trio.Event()
        self.sent = 0

    async def read(self, n: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while self._script and not self._closed.is_set():
            step = self._script.pop(0)
            if isinstance(step, bytes):
                return step
            await trio.sleep(step)
        if not self._hangs_up:
            await self._closed.wait()
        raise IOException("the script is over")

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += len(data)

    async def close(self) -> None:
        self._closed.set()


def _script(lots: Lots) -> list[bytes | float]:
    script: list[bytes | float] = []
    while lots:
        stream_id = lots.below(12)
        match lots.below(9):
            case 0:
                script.append(lots.piece())
            case 1:
                script.append(lots.number() / 8)
            case 2:
                kind, flags = lots.one_of((DATA, WINDOW_UPDATE, PING, 3, 4)), lots.below(16)
                script.append(HEADER.pack(0, kind, flags, stream_id, lots.one_of(LENGTHS)))
            case 3:
                script.append(HEADER.pack(0, WINDOW_UPDATE, lots.one_of((SYN, ACK, FIN, RST)), stream_id, 0))
            case 4 | 5:
                lines = b"".join(lots.one_of(LINES) for _ in range(1 + lots.below(3)))
                flag = SYN if lots.below(2) else 0
                script.append(HEADER.pack(0, DATA, flag, stream_id, len(lines)) + lines)
            case 6:
                said = frame(wire.encode_open("echo")) if lots.below(2) else frame(wire.encode_opened(None))
                script.append(HEADER.pack(0, DATA, 0, stream_id, len(said)) + said)
            case _:
                body = lots.piece()
                script.append(HEADER.pack(0, DATA, 0, stream_id, len(body)) + body)
    return script


async def _echo(stream: Stream, accept: tunnel.Accept) -> None:
    await accept()
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.aclose()


async def _serve(muxed: Any) -> None:
    try:
        stream = await accept_stream(muxed, PEER, lambda protocol: protocol in (tunnel.PROTOCOL, "/echo/1"))
        await tunnel.answer(stream, lambda _: _echo)
    except trio.BrokenResourceError as exc:
        assert str(exc)  # noqa: PT017 - the only way in which a stream may fail here


async def _use(connection: YamuxConnection) -> None:
    try:
        stream = await open_lazy_stream(connection, PEER, tunnel.PROTOCOL)
        opened = await tunnel.request(stream, "echo", wait=False)
        await opened.send_all(b"question")
        while await opened.receive_some(1000):
            pass
        await opened.aclose()
    except (PeerUnreachable, ServiceRefused, trio.BrokenResourceError) as exc:
        assert str(exc)  # noqa: PT017 - as above


async def _accept_all(connection: YamuxConnection, nursery: trio.Nursery) -> None:
    while True:
        try:
            muxed = await connection.accept_stream()
        except MuxedConnUnavailable:
            return
        nursery.start_soon(_serve, muxed)


async def _connection_with(data: bytes) -> None:
    lots = Lots(data)
    initiator, hangs_up, uses = bool(lots.below(2)), bool(lots.below(2)), lots.below(4)
    script = _script(lots)
    lasts = sum(step for step in script if isinstance(step, float))
    secured: Any = Scripted(script, initiator, hangs_up)
    connection = YamuxConnection(secured, peer_of(KEYS[1]), SMALL)
    with trio.fail_after(lasts + AFTERMATH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.start)
            await connection.event_started.wait()
            nursery.start_soon(_accept_all, connection, nursery)
            for _ in range(uses):
                nursery.start_soon(_use, connection)
            if lots.below(2):
                await trio.sleep(5)
                await connection.close()
    assert connection.is_closed
    assert secured.sent < 64 * 1024 + 16 * len(data)


def _connection(data: bytes) -> None:
    in_virtual_time(_connection_with, data)


def _seeds() -> Iterator[bytes]:
    header, ours, line = 0, 1, 4
    proposal = bytes([1, line, 1, header, ours, 1])  # stream 1, two lines, SYN
    yield bytes([0, 1, 0]) + proposal + bytes([1, 6, 1]) + bytes([1, 7, 5]) + b"hello" + bytes([1, 3, 2])
    yield bytes([1, 0, 2, 1, line, 1, header, ours, 0, 1, 6, 0, 1, 7, 5]) + b"hello" + bytes([1, 3, 2])
    yield bytes([1, 0, 2, 1, line, 1, header, 3, 0])
    yield bytes([0, 0, 0, 0, 1, 255])


CONNECTIONS = (
    Target(
        "connection",
        "a connection to any peer ends, and only its own streams with it",
        _connection,
        _seeds,
        512,
    ),
)

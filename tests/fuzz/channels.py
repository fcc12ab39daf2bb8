"""Targets for what stands between a socket and a service: the handshake, records, streams and first messages."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import trio
import trio.testing
from libp2p.io.exceptions import IOException
from libp2p.security.noise.exceptions import NoiseFailure

from libmesh import hello, keys, syncing, tunnel, wire
from libmesh.errors import AdmissionRefused, PeerUnreachable, ServiceRefused
from libmesh.framing import frame
from libmesh.net.base import Stream, StreamReset
from libmesh.net.noise import Noise
from libmesh.net.pipes import BufferPool, Pipe
from libmesh.net.records import BUFFER_BYTES, RecordChannel
from libmesh.peers import PeerId
from libmesh.wire_pieces import WireError
from tests.fuzz.target import Lots, Target, drive
from tests.members import NOW, credential, membership, peer
from tests.net.pairs import KEYS, peer_of


def in_virtual_time(function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    """Run in trio under a clock that jumps over every wait."""

    async def bounded() -> Any:
        with trio.fail_after(86400):
            return await function(*arguments)

    return trio.run(bounded, clock=trio.testing.MockClock(autojump_threshold=0))


# ── the handshake ────────────────────────────────────────────────────────────────────────────────────────────────


class Wire:
    """A raw connection over a stream in memory. What passes is changed where `meddling` says: position → mask."""

    def __init__(self, stream: Any, is_initiator: bool, meddling: dict[int, int] | None = None) -> None:
        self.stream, self.is_initiator = stream, is_initiator
        self._meddling, self._seen = meddling or {}, 0
        self.changed = False

    async def read(self, n: int | None = None) -> bytes:
        data = bytearray(await self.stream.receive_some(n))
        for position, mask in self._meddling.items():
            if 0 <= position - self._seen < len(data) and mask:
                data[position - self._seen] ^= mask
                self.changed = True
        self._seen += len(data)
        return bytes(data)

    async def write(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except trio.BrokenResourceError as exc:
            raise IOException(str(exc)) from exc


class Liar(Noise):
    """Does all of the handshake right but for what it says of itself."""

    def __init__(self, payload: bytes) -> None:
        super().__init__(KEYS[1])
        self._payload = payload


async def _handshake_with(data: bytes, initiator: bool) -> None:
    """Whatever it is, it does not know our keys."""
    near, far = trio.testing.memory_stream_pair()
    await far.send_all(data)
    await far.send_eof()
    conn: Any = Wire(near, initiator)
    noise = Noise(KEYS[0])
    try:
        await (noise.secure_outbound(conn, peer_of(KEYS[1])) if initiator else noise.secure_inbound(conn))
    except NoiseFailure:
        return
    raise AssertionError("a handshake with nobody succeeded")


def _noise_bytes(data: bytes) -> None:
    in_virtual_time(_handshake_with, data[1:], bool(data[:1] and data[0] & 1))


async def _handshake_with_liar(data: bytes) -> None:
    lots = Lots(data)
    initiator = bool(lots.below(2))
    meddling = {lots.number(): lots.number() for _ in range(lots.below(3))}
    honest, liar = Noise(KEYS[0]), Liar(lots.rest())
    a, b = trio.testing.memory_stream_pair()
    near, far = Wire(a, initiator, meddling), Wire(b, not initiator)

    async def lie() -> None:
        conn: Any = far
        try:
            await (liar.secure_inbound(conn) if initiator else liar.secure_outbound(conn, peer_of(KEYS[0])))
        except NoiseFailure:
            await b.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lie)
        conn: Any = near
        try:
            session: Any = await (
                honest.secure_outbound(conn, peer_of(KEYS[1])) if initiator else honest.secure_inbound(conn)
            )
        except NoiseFailure:
            await a.aclose()
        else:
            assert not near.changed, "a changed handshake succeeded"
            raise AssertionError(f"{session.get_remote_peer()} was believed without a signature")
        nursery.cancel_scope.cancel()


def _noise_payload(data: bytes) -> None:
    in_virtual_time(_handshake_with_liar, data)


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Collector(Pipe):
    """Keeps what is sent; gives what it is told, in pieces."""

    def __init__(self, incoming: bytes = b"", most: int = 1) -> None:
        self.sent = bytearray()
        self._incoming, self._most = incoming, most

    async def receive_into(self, view: memoryview) -> int:
        piece = self._incoming[: min(self._most, len(view))]
        view[: len(piece)] = piece
        self._incoming = self._incoming[len(piece) :]
        return len(piece)

    def send_nowait(self, view: memoryview) -> int:
        self.sent += view
        return len(view)

    async def send_some(self, view: memoryview) -> int:
        return self.send_nowait(view)

    async def aclose(self) -> None:
        return


SIZES = (0, 1, 12, 8191, 8192, 8193, 65519, 65520, 131038, 200000)
POOL = BufferPool(BUFFER_BYTES)


def _records(data: bytes) -> None:
    lots = Lots(data)
    one, two = bytes(32), bytes([1]) * 32
    sender = Collector()
    channel = RecordChannel(sender, one, two, POOL)
    plain = b""
    for _ in range(lots.below(6)):
        pieces = [bytes([lots.number()]) * lots.one_of(SIZES) for _ in range(1 + lots.below(3))]
        channel.put(pieces)
        assert channel.flush_nowait()
        plain += b"".join(pieces)
    sealed, damaged = bytearray(sender.sent), False
    for _ in range(lots.below(3)):
        position, mask = lots.number(3), lots.number()
        if position < len(sealed) and mask:
            sealed[position] ^= mask
            damaged = bytes(sealed) != bytes(sender.sent)
    behind = lots.piece()
    most = max(1 + lots.number(3), len(sealed) // 256)  # byte by byte takes too long for large ones
    receiver = RecordChannel(Collector(bytes(sealed) + behind, most), two, one, POOL)
    got = b""
    try:
        while pieces := drive(receiver.receive()):
            assert all(pieces)
            got += b"".join(pieces)
    except StreamReset:
        assert damaged or behind
        assert plain.startswith(got)
    else:
        assert not damaged or not plain
        assert got == plain


# ── first messages ───────────────────────────────────────────────────────────────────────────────────────────────


class ScriptedStream(Stream):
    """A stream of a peer that says what it was told to say, and takes everything."""

    def __init__(self, data: bytes, most: int, resets: bool) -> None:
        self.peer, self.protocol = PeerId(peer(2)), "/scripted/1"
        self._data, self._most, self._resets = data, most, resets
        self.sent = bytearray()
        self.over = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.over:
            raise trio.ClosedResourceError
        if not self._data and self._resets:
            raise StreamReset("reset by the script")
        count = self._most if max_bytes is None else min(max_bytes, self._most)
        piece, self._data = self._data[:count], self._data[count:]
        return piece

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self.over:
            raise trio.ClosedResourceError
        self.sent += data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.over = True
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        self.over = True


async def _hello(stream: Stream, part: int) -> None:
    machine = membership(1)
    greeting = hello.Greeting("fuzz", credential(1), machine, float(NOW))
    try:
        match part:
            case 0 | 1:
                shown = await (hello.greet, hello.answer)[part](stream, greeting)
                assert shown.credential.links[-1].subject == keys.public_key_of(stream.peer)
            case _:
                events = await syncing.exchange(
                    stream, machine, lambda event: void(machine.handle(event, NOW)), opener=part == 2
                )
                for event in events:
                    machine.handle(event, NOW)
    except (AdmissionRefused, WireError, trio.BrokenResourceError) as exc:
        assert str(exc)  # noqa: PT017 - one of these, or nothing; without words it is no help


def void(_: object) -> None:
    """Drop a value."""


async def _tunnel(stream: Stream, part: int) -> None:
    if part == 0:

        async def refuse(_stream: Stream, _accept: tunnel.Accept) -> None:
            raise ServiceRefused("nothing here", reason="unavailable")

        async def echo(stream: Stream, accept: tunnel.Accept) -> None:
            await accept()
            while data := await stream.receive_some():
                await stream.send_all(data)

        await tunnel.answer(stream, lambda service: echo if service == "echo" else refuse)
        return
    try:
        opened = await tunnel.request(stream, "echo", wait=part == 1)
        await opened.send_all(b"question")
        while await opened.receive_some(100):
            pass
    except (PeerUnreachable, ServiceRefused, trio.BrokenResourceError) as exc:
        assert str(exc)  # noqa: PT017 - as above


def _first_messages(data: bytes) -> None:
    lots = Lots(data)
    part, most, resets = lots.below(7), 1 + lots.number(), bool(lots.below(2))
    said = b""
    while lots:
        said += frame(lots.take(lots.number(2) % 2048)) if lots.below(4) else lots.piece()
    stream = ScriptedStream(said, most, resets)
    in_virtual_time(_hello if part < 4 else _tunnel, stream, part if part < 4 else part - 4)
    assert len(stream.sent) < math.inf


def _message_seeds() -> Iterator[bytes]:
    said = wire.encode_hello(wire.Hello(agent="x", credential=credential(2)))
    reply = wire.encode_hello_reply(wire.HelloReply(agent="x", credential=credential(2)))
    digest = wire.encode_digest(membership(2).digest())
    records = wire.encode_records([membership(2).me])
    parts = {0: [reply], 1: [said], 2: [digest, records], 3: [digest, records]}
    parts |= {
        4: [wire.encode_open("echo"), b"hi"],
        5: [wire.encode_opened(None)],
        6: [wire.encode_opened("busy")],
    }
    for part, messages in parts.items():
        yield bytes([part, 255, 0]) + b"".join(b"\1" + len(m).to_bytes(2, "big") + m for m in messages)


CHANNELS = (
    Target("noise", "any bytes for a handshake are a NoiseFailure", _noise_bytes, longest=512),
    Target(
        "noise_payload",
        "no payload is believed without the signature that it needs",
        _noise_payload,
        longest=512,
    ),
    Target(
        "records", "damaged records are told from whole ones, and those are delivered", _records, longest=64
    ),
    Target(
        "first_messages", "any first message is answered or refused in words", _first_messages, _message_seeds
    ),
)

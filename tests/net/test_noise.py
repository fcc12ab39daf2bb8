"""The Noise channel: with itself, with py-libp2p's own, with strangers and with liars."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.io.exceptions import IOException
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.noise.exceptions import NoiseFailure, PeerIDMismatchesPubkey
from libp2p.security.noise.transport import Transport as StockNoise

from libmesh.net.base import StreamReset
from libmesh.net.noise import Noise, NoiseSession
from libmesh.net.pipes import BufferPool, SocketPipe, pipe_of
from libmesh.net.records import BUFFER_BYTES, RecordChannel
from tests.net.pairs import KEYS, noise_pair, peer_of, raw_pair, socket_pair


async def both(
    near: Callable[[], Awaitable[ISecureConn]], far: Callable[[], Awaitable[ISecureConn]]
) -> tuple[ISecureConn, ISecureConn]:
    done: dict[int, ISecureConn] = {}

    async def run(index: int, call: Callable[[], Awaitable[ISecureConn]]) -> None:
        done[index] = await call()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, 0, near)
        nursery.start_soon(run, 1, far)
    return done[0], done[1]


async def exchange(near: ISecureConn, far: ISecureConn) -> None:
    """A megabyte each way, at once."""
    data = random.Random(7).randbytes(1_000_000)

    async def send(conn: ISecureConn) -> None:
        await conn.write(data)

    async def receive(conn: ISecureConn) -> None:
        got = b""
        while len(got) < len(data):
            got += await conn.read(min(70_000, len(data) - len(got)))
        assert got == data

    async with trio.open_nursery() as nursery:
        for conn in (near, far):
            nursery.start_soon(send, conn)
            nursery.start_soon(receive, conn)


async def test_both_sides_learn_who_the_other_is() -> None:
    near, far = await noise_pair()
    assert near.get_remote_peer() == peer_of(KEYS[1])
    assert far.get_remote_peer() == peer_of(KEYS[0])
    assert far.get_remote_public_key() == KEYS[0].public_key
    assert near.early_muxer == far.early_muxer == "/yamux/1.0.0"
    assert near.is_initiator
    assert not far.is_initiator
    await exchange(near, far)
    await near.close()
    await far.close()


@pytest.mark.parametrize("stock_dials", [True, False])
async def test_it_works_with_py_libp2ps_own(stock_dials: bool) -> None:
    stock = StockNoise(KEYS[0], noise_privkey=create_x25519().private_key)
    ours = Noise(KEYS[1])
    raw_a, raw_b = await raw_pair()
    if stock_dials:
        near, far = await both(
            lambda: stock.secure_outbound(raw_a, peer_of(KEYS[1])), lambda: ours.secure_inbound(raw_b)
        )
        ours_session = far
    else:
        near, far = await both(
            lambda: ours.secure_outbound(raw_a, peer_of(KEYS[0])), lambda: stock.secure_inbound(raw_b)
        )
        ours_session = near
    assert isinstance(ours_session, NoiseSession)
    assert ours_session.get_remote_peer() == peer_of(KEYS[0])
    assert ours_session.early_muxer is None
    await exchange(near, far)
    await near.close()
    await far.close()


async def test_a_peer_that_is_not_the_one_dialled_is_refused() -> None:
    raw_a, raw_b = await raw_pair()
    stranger = create_new_key_pair(bytes([9]) * 32)
    async with trio.open_nursery() as nursery:

        async def answer() -> None:
            session = await Noise(stranger).secure_inbound(raw_b)
            await session.close()

        nursery.start_soon(answer)
        with pytest.raises(PeerIDMismatchesPubkey):
            await Noise(KEYS[0]).secure_outbound(raw_a, peer_of(KEYS[1]))
    await raw_a.close()


@pytest.mark.parametrize(
    ("offers", "agreed"),
    [
        ((("/a", "/b"), ("/b", "/a")), "/a"),
        ((("/c", "/b"), ("/b", "/a")), "/b"),
        ((("/c",), ("/b",)), None),
        (((), ("/b",)), None),
    ],
)
async def test_the_initiators_first_common_muxer_is_used(
    offers: tuple[tuple[str, ...], tuple[str, ...]], agreed: str | None
) -> None:
    raw_a, raw_b = await raw_pair()
    near, far = await both(
        lambda: Noise(KEYS[0], muxers=offers[0]).secure_outbound(raw_a, peer_of(KEYS[1])),
        lambda: Noise(KEYS[1], muxers=offers[1]).secure_inbound(raw_b),
    )
    assert isinstance(near, NoiseSession)
    assert isinstance(far, NoiseSession)
    assert near.early_muxer == far.early_muxer == agreed
    await near.close()
    await far.close()


class ScriptedConn:
    """A raw connection that says what it was told to say."""

    def __init__(self, incoming: bytes) -> None:
        self._incoming = incoming
        self.is_initiator = True

    async def read(self, n: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        count = len(self._incoming) if n is None else n
        data, self._incoming = self._incoming[:count], self._incoming[count:]
        return data

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("initiator", [True, False])
@pytest.mark.parametrize("seed", range(40))
async def test_any_bytes_in_a_handshake_raise_noise_failure_only(seed: int, initiator: bool) -> None:
    lots = random.Random(seed)
    incoming = b""
    for _ in range(lots.randrange(1, 4)):
        body = lots.randbytes(lots.choice((0, 1, 31, 32, 48, 96, 200)))
        size = lots.choice((len(body), len(body), 0, 65535))
        incoming += size.to_bytes(2, "big") + body
    conn: IRawConnection = ScriptedConn(incoming)  # type: ignore[assignment]
    noise = Noise(KEYS[0])
    with pytest.raises(NoiseFailure):
        await (noise.secure_outbound(conn, peer_of(KEYS[1])) if initiator else noise.secure_inbound(conn))


async def test_an_all_zero_key_is_refused() -> None:
    conn: IRawConnection = ScriptedConn(b"\x00\x20" + bytes(32))  # type: ignore[assignment]
    with pytest.raises(NoiseFailure):
        await Noise(KEYS[0]).secure_inbound(conn)


class MeddlingConn:
    """A raw connection that flips one bit of the nth byte it receives."""

    def __init__(self, raw: RawConnection, position: int) -> None:
        self._raw, self._position, self._seen = raw, position, 0
        self.is_initiator = raw.is_initiator

    async def read(self, n: int | None = None) -> bytes:
        data = bytearray(await self._raw.read(n))
        index = self._position - self._seen
        self._seen += len(data)
        if 0 <= index < len(data):
            data[index] ^= 1
        return bytes(data)

    async def write(self, data: bytes) -> None:
        await self._raw.write(data)


@pytest.mark.parametrize("position", [0, 1, 2, 20, 33, 34, 60, 90, 150, 200])
async def test_a_bit_changed_in_the_answer_is_noticed(position: int) -> None:
    raw_a, raw_b = await raw_pair()
    meddled: IRawConnection = MeddlingConn(raw_a, position)  # type: ignore[assignment]

    async def answer() -> None:
        with pytest.raises(NoiseFailure):
            await Noise(KEYS[1]).secure_inbound(raw_b)
        await raw_b.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        with pytest.raises(NoiseFailure):
            await Noise(KEYS[0], handshake_timeout=0.2).secure_outbound(meddled, peer_of(KEYS[1]))
        await raw_a.close()


async def test_a_peer_that_says_nothing_is_given_up() -> None:
    raw_a, raw_b = await raw_pair()
    with pytest.raises(NoiseFailure, match=r"within 0\.05 s"):
        await Noise(KEYS[0], handshake_timeout=0.05).secure_outbound(raw_a, peer_of(KEYS[1]))
    await raw_a.close()
    await raw_b.close()


# ---- records ----------------------------------------------------------------------------------------------------


async def channel_pair() -> tuple[RecordChannel, RecordChannel, trio.SocketStream]:
    """Two channels with known keys; also the sending one's socket."""
    near, far = await socket_pair()
    pool = BufferPool(BUFFER_BYTES)
    one, two = bytes(32), bytes([1]) * 32
    return (
        RecordChannel(SocketPipe(near), one, two, pool),
        RecordChannel(SocketPipe(far), two, one, pool),
        near,
    )


@pytest.mark.parametrize(
    "sizes", [[1], [12, 65519], [8192, 8193, 1], [65519, 65520], [200_000], [5] * 300, [0, 3]]
)
async def test_pieces_of_any_size_arrive_whole_and_in_order(sizes: list[int]) -> None:
    near, far, _ = await channel_pair()
    lots = random.Random(len(sizes))
    pieces = [lots.randbytes(size) for size in sizes]
    near.put(pieces)
    got: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            while not near.flush_nowait():
                await near.flush()

        nursery.start_soon(send)
        while len(b"".join(got)) < sum(sizes):
            got += map(bytes, await far.receive())  # a view is good until the next call
    assert b"".join(got) == b"".join(pieces)
    assert all(0 < len(piece) <= BUFFER_BYTES for piece in got)
    await near.aclose()
    assert await far.receive() == []
    await far.aclose()


async def test_what_is_put_while_a_flush_waits_follows_what_was_there() -> None:
    near, far, _ = await channel_pair()
    first, second = random.Random(1).randbytes(8_000_000), random.Random(2).randbytes(3_000_000)
    near.put([first])
    assert not near.flush_nowait()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            while not near.flush_nowait():
                await near.flush()

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        near.put([second])
        near.flush_nowait()
        got = b""
        while len(got) < len(first) + len(second):
            got += b"".join(await far.receive())
    assert got == first + second
    await near.aclose()
    await far.aclose()


async def test_a_cancelled_flush_leaves_the_rest_for_the_next() -> None:
    near, far, _ = await channel_pair()
    data = random.Random(3).randbytes(8_000_000)
    near.put([data])
    got = b""
    for _ in range(50):
        with trio.CancelScope() as scope:
            scope.cancel()
            near.flush_nowait()
            await near.flush()
        with trio.move_on_after(0.0001):
            got += b"".join(await far.receive())
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            while not near.flush_nowait():
                await near.flush()

        nursery.start_soon(send)
        while len(got) < len(data):
            got += b"".join(await far.receive())
    assert got == data
    await near.aclose()
    await far.aclose()


@pytest.mark.parametrize(
    "junk", [b"\x00\x20" + bytes(32), b"\x00\x00", b"\x00\x0f" + bytes(15), b"GET / HTTP/1.1\r\n" * 9000]
)
async def test_a_record_that_was_not_sealed_by_the_peer_ends_the_connection(junk: bytes) -> None:
    near, far, socket = await channel_pair()
    with trio.move_on_after(0.2):  # it stops reading, so not all may fit
        await socket.send_all(junk)
    with pytest.raises(StreamReset, match="damaged"):
        await far.receive()
    await near.aclose()
    await far.aclose()


async def test_an_end_inside_a_record_is_no_end_of_file() -> None:
    near, far, socket = await channel_pair()
    await socket.send_all(b"\x00\x20" + bytes(10))
    await near.aclose()
    with pytest.raises(StreamReset, match="inside a record"):
        await far.receive()
    await far.aclose()


async def test_reading_a_closed_session_raises_as_py_libp2p_expects() -> None:
    near, far = await noise_pair()
    await near.close()
    with pytest.raises(IOException):
        await far.read(1)
    with pytest.raises(IOException):
        await near.write(b"x")
    await far.close()


async def test_idle_connections_hold_no_buffers() -> None:
    pool = BufferPool(1000, keep=2)
    buffers = [pool.take() for _ in range(4)]
    for buffer in buffers:
        pool.give(buffer)
    assert pool.take() is buffers[1]
    assert pool.take() is buffers[0]
    assert not any(pool.take() is buffer for buffer in buffers)
    pool.give(bytearray(5))
    assert len(pool.take()) == 1000


async def test_raw_connections_of_tcp_are_driven_by_their_descriptor() -> None:
    near, far = await raw_pair()
    assert isinstance(pipe_of(near), SocketPipe)
    await near.close()
    await far.close()


async def test_waiting_on_a_closed_pipe_is_a_reset_every_time() -> None:
    near, far = await socket_pair()
    pipe = SocketPipe(near)
    await near.aclose()
    for _ in range(2):
        with pytest.raises(StreamReset):
            await pipe.wait_readable()
        with pytest.raises(StreamReset):
            await pipe.wait_writable()
        with pytest.raises(StreamReset):
            await pipe.receive_into(memoryview(bytearray(10)))
    await far.aclose()

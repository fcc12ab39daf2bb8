"""The TLS channel: with itself, under our muxer, with strangers, and with bad certificates."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing
from libp2p.abc import ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.io.exceptions import IOException
from OpenSSL import SSL

from libmesh.net.base import StreamReset
from libmesh.net.certificate import TlsFailure, make_certificate
from libmesh.net.muxer import YamuxConnection
from libmesh.net.pipes import BufferPool, RawPipe, pipe_of
from libmesh.net.records import BUFFER_BYTES
from libmesh.net.tls import MAX_HANDSHAKE_BYTES, Tls, TlsChannel, TlsSession
from tests.net.pairs import KEYS, peer_of, raw_pair, stream_pair


async def tls_pair(near: Tls | None = None, far: Tls | None = None) -> tuple[TlsSession, TlsSession]:
    """Two ends of a secured connection; the first one dialled."""
    sessions: dict[int, TlsSession] = {}
    raws = await raw_pair()

    async def outbound() -> None:
        session = await (near or Tls(KEYS[0])).secure_outbound(raws[0], peer_of(KEYS[1]))
        assert isinstance(session, TlsSession)
        sessions[0] = session

    async def inbound() -> None:
        session = await (far or Tls(KEYS[1])).secure_inbound(raws[1])
        assert isinstance(session, TlsSession)
        sessions[1] = session

    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbound)
        nursery.start_soon(inbound)
    return sessions[0], sessions[1]


async def exchange(near: TlsSession, far: TlsSession, size: int = 3_000_000) -> None:
    """A few megabytes each way, at once."""
    data = random.Random(7).randbytes(size)

    async def receive(session: TlsSession) -> None:
        got = b""
        while len(got) < size:
            got += await session.read(min(70_000, size - len(got)))
        assert got == data

    async with trio.open_nursery() as nursery:
        for session in (near, far):
            nursery.start_soon(session.write, data)
            nursery.start_soon(receive, session)


async def test_both_sides_learn_who_the_other_is() -> None:
    near, far = await tls_pair()
    assert near.get_remote_peer() == peer_of(KEYS[1])
    assert far.get_remote_peer() == peer_of(KEYS[0])
    assert far.get_remote_public_key() == KEYS[0].public_key
    assert near.early_muxer == far.early_muxer == "/yamux/1.0.0"
    assert (near.is_initiator, far.is_initiator) == (True, False)
    await exchange(near, far)
    await near.close()
    assert await far.channel.receive() == []
    await far.close()


@pytest.mark.parametrize(
    ("offers", "agreed"),
    [
        ((("/a", "/b"), ("/b", "/a")), "/a"),
        ((("/c", "/b"), ("/b", "/a")), "/b"),
        ((("/c",), ("/b",)), None),
        (((), ("/b",)), None),
    ],
)
async def test_the_clients_first_common_muxer_is_used(
    offers: tuple[tuple[str, ...], tuple[str, ...]], agreed: str | None
) -> None:
    near, far = await tls_pair(Tls(KEYS[0], muxers=offers[0]), Tls(KEYS[1], muxers=offers[1]))
    assert near.early_muxer == far.early_muxer == agreed
    await near.close()
    await far.close()


async def test_our_muxer_runs_on_it() -> None:
    near, far = await tls_pair()
    a, b = YamuxConnection(near, peer_of(KEYS[1])), YamuxConnection(far, peer_of(KEYS[0]))
    data = random.Random(1).randbytes(5_000_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.start)
        nursery.start_soon(b.start)
        await a.event_started.wait()
        await b.event_started.wait()
        one, other = await stream_pair(a, b)

        async def send() -> None:
            await one.send_all(data)
            await one.send_eof()

        nursery.start_soon(send)
        got = bytearray()
        while piece := await other.receive_some():
            got += piece
        assert bytes(got) == data
        await a.close()
        await b.close()


async def test_part_of_a_record_is_told_of() -> None:
    near, far = await tls_pair()
    assert isinstance(far.channel, TlsChannel)
    parts, told = trio.open_memory_channel[None](100)
    near.channel.heard = lambda: parts.send_nowait(None)
    far.channel.put([bytes(10_000)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.channel.receive)
        with trio.fail_after(60):
            for start in range(3):
                await far.channel._pipe.send_some(memoryview(far.channel._out)[start : start + 1])
                await told.receive()
        nursery.cancel_scope.cancel()
    await near.close()
    await far.close()


async def test_a_peer_that_is_not_the_one_dialled_is_refused() -> None:
    raws = await raw_pair()
    stranger = Tls(create_new_key_pair(bytes([9]) * 32))

    async def answer() -> None:
        await stranger.secure_inbound(raws[1])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        with pytest.raises(TlsFailure, match="another peer answered"):
            await Tls(KEYS[0]).secure_outbound(raws[0], peer_of(KEYS[1]))
    for raw in raws:
        await raw.close()


# ---- strangers --------------------------------------------------------------------------------------------------


def context(identity: Any = KEYS[0], **changes: Any) -> SSL.Context:
    """What an honest client has, but for the changes."""
    own = make_certificate(identity)
    made = SSL.Context(SSL.TLS_METHOD)
    if changes.get("highest"):
        made.set_max_proto_version(changes["highest"])
    if changes.get("certificate", True):
        made.use_privatekey(own.key)
        made.use_certificate(own.certificate)
    if "extra" in changes:
        made.add_extra_chain_cert(changes["extra"])
    if (offers := changes.get("offers", [b"libp2p"])) is not None:
        made.set_alpn_protos(offers)
    return made


async def against(client: SSL.Context) -> TlsSession:
    """What our server makes of a client."""
    raws = await raw_pair()
    tls = SSL.Connection(client, None)
    tls.set_connect_state()
    channel = TlsChannel(pipe_of(raws[0]), tls, BufferPool(BUFFER_BYTES))

    async def dial() -> None:
        try:
            await channel.handshake()
            while await channel.receive():
                pass
        except (SSL.Error, StreamReset):
            return
        finally:
            await channel.aclose()

    result: ISecureConn | TlsFailure
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dial)
        try:
            result = await Tls(KEYS[1]).secure_inbound(raws[1])
        except TlsFailure as exc:
            result = exc
        await raws[1].close()
        nursery.cancel_scope.cancel()
    if isinstance(result, TlsFailure):
        raise result
    assert isinstance(result, TlsSession)
    return result


async def test_an_honest_client_is_let_in() -> None:
    session = await against(context())
    assert session.get_remote_peer() == peer_of(KEYS[0])
    assert session.early_muxer is None


async def test_a_client_that_offers_nothing_in_alpn_negotiates_the_muxer_later() -> None:
    assert (await against(context(offers=None))).early_muxer is None


@pytest.mark.parametrize(
    "changes",
    [
        {"certificate": False},
        {"highest": SSL.TLS1_2_VERSION},
        {"extra": make_certificate(KEYS[1]).certificate},
        {"offers": [b"h2", b"http/1.1"]},
    ],
    ids=["no certificate", "TLS 1.2", "two certificates", "other protocols"],
)
async def test_a_client_that_breaks_the_specification_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TlsFailure):
        await against(context(**changes))


@pytest.mark.parametrize("initiator", [True, False])
@pytest.mark.parametrize("seed", range(10))
async def test_any_bytes_in_a_handshake_raise_tls_failure_only(seed: int, initiator: bool) -> None:
    lots = random.Random(seed)
    raws = await raw_pair()
    head = lots.choice(
        (b"", b"\x16\x03\x01", b"\x16\x03\x03\x00\x40\x02", b"\x15\x03\x03\x00\x02", b"\x17\x03\x03")
    )
    await raws[1].write(head + lots.randbytes(lots.choice((0, 1, 5, 100, 20_000))))
    stream: Any = raws[1].stream
    await stream.stream.send_eof()
    tls = Tls(KEYS[0])
    with pytest.raises(TlsFailure):
        await (tls.secure_outbound(raws[0], peer_of(KEYS[1])) if initiator else tls.secure_inbound(raws[0]))
    for raw in raws:
        await raw.close()


async def test_a_handshake_that_does_not_end_is_cut_off() -> None:
    """A ClientHello of endless length, a record of 16 KiB at a time."""
    raws = await raw_pair()
    record = b"\x16\x03\x01\x40\x00" + b"\x01\xff\xff\xff" + bytes(16380)

    async def flood() -> None:
        with suppress(IOException):  # it is hung up on
            for _ in range(10 * MAX_HANDSHAKE_BYTES // len(record)):
                await raws[1].write(record)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        with pytest.raises(TlsFailure):
            await Tls(KEYS[0]).secure_inbound(raws[0])
        nursery.cancel_scope.cancel()
        await raws[0].close()
    await raws[1].close()


async def test_a_peer_that_says_nothing_is_given_up() -> None:
    raws = await raw_pair()
    with pytest.raises(TlsFailure, match=r"within 0\.05 s"):
        await Tls(KEYS[0], handshake_timeout=0.05).secure_outbound(raws[0], peer_of(KEYS[1]))
    for raw in raws:
        await raw.close()


async def until_the_end(session: TlsSession) -> None:
    while await session.channel.receive():
        pass


# ---- records ----------------------------------------------------------------------------------------------------


async def test_a_damaged_record_ends_the_connection() -> None:
    near, far = await tls_pair()
    raw: Any = near.raw
    near.channel.put([b"x" * 1000])
    await raw.stream.stream.send_all(b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(StreamReset, match="damaged"):
        await until_the_end(far)
    for session in (near, far):
        await session.close()


async def test_an_end_without_goodbye_is_no_end_of_file() -> None:
    near, far = await tls_pair()
    raw: Any = near.raw
    await raw.stream.stream.send_eof()
    with pytest.raises(StreamReset):
        await until_the_end(far)
    for session in (near, far):
        await session.close()


async def test_a_cancelled_flush_leaves_the_rest_for_the_next() -> None:
    near, far = await tls_pair()
    data = random.Random(3).randbytes(8_000_000)
    near.channel.put([data[:100_000], data[100_000:]])
    got = b""
    for _ in range(50):
        with trio.CancelScope() as scope:
            scope.cancel()
            near.channel.flush_nowait()
            await near.channel.flush()
        with trio.move_on_after(0.0001):
            got += b"".join(await far.channel.receive())
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            while not near.channel.flush_nowait():
                await near.channel.flush()

        nursery.start_soon(send)
        while len(got) < len(data):
            got += b"".join(await far.channel.receive())
    assert got == data
    for session in (near, far):
        await session.close()


async def test_an_answer_does_not_overtake_what_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = await tls_pair()
    pipe = CrowdedPipe(near.raw)
    monkeypatch.setattr(near.channel, "_pipe", pipe)
    near.channel.put([b"first"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.channel.flush)
        await trio.testing.wait_all_tasks_blocked()
        assert not near.channel.flush_nowait()  # as `receive` does, with the answer to a key update
        pipe.room.set()
    near.channel.put([b" then"])
    assert near.channel.flush_nowait()
    got = b""
    while len(got) < 10:
        got += b"".join(await far.channel.receive())
    assert got == b"first then"
    for session in (near, far):
        await session.close()


class CrowdedPipe(RawPipe):
    """A circuit: one send waits for room, while another one would find some."""

    def __init__(self, raw: Any) -> None:
        super().__init__(raw)
        self.room = trio.Event()
        self.send_nowait = pipe_of(raw).send_nowait  # type: ignore[method-assign]

    async def send_some(self, view: memoryview) -> int:
        await self.room.wait()
        return await super().send_some(view)

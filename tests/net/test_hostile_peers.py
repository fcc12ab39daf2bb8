"""A host with an honest peer in the middle of a transfer, and a hostile one on another connection."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from libp2p.io.exceptions import IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection

from libmesh.core.yamux_frames import ACK, DATA, PING, RST, SPEC_WINDOW, SYN, WINDOW_UPDATE
from libmesh.net.base import Stream, StreamReset
from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork, open_libp2p_network
from libmesh.net.lines import HEADER, encode_line
from libmesh.net.noise import PROTOCOL_ID, Noise, NoiseSession
from libmesh.net.swarm import libp2p_id
from tests.core.yamux_by_hand import frame
from tests.net.pairs import KEYS, peer_of

ECHO = "/echo/1.0.0"
CONFIG = Libp2pConfig(hosts=("127.0.0.1",))
SIZE = 8_000_000
PATIENCE = 120  # seconds; an outcome, not a speed
REQUEST = encode_line(HEADER) + encode_line(ECHO)

Attack = Callable[[NoiseSession], Awaitable[None]]


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def honest_transfer(network: Libp2pNetwork, host: Libp2pNetwork) -> None:
    data = random.Random(5).randbytes(SIZE)
    got = bytearray()
    await network.connect(host.peer, host.addresses())
    for _ in range(2):
        stream = await network.open_stream(host.peer, ECHO)
        got.clear()
        async with trio.open_nursery() as nursery:

            async def send(stream: Stream = stream) -> None:
                await stream.send_all(data)
                await stream.send_eof()

            nursery.start_soon(send)
            while piece := await stream.receive_some():
                got += piece
        assert bytes(got) == data


@asynccontextmanager
async def hostile(host: Libp2pNetwork) -> AsyncIterator[NoiseSession]:
    """A connection that has proved its key, and agreed on yamux in the handshake. What comes is not read."""
    address = host.addresses()[0].split("/")
    dialled = await trio.open_tcp_stream(address[2], int(address[4]))
    raw = RawConnection(TrioTCPStream(dialled), True)
    lines = encode_line(HEADER) + encode_line(PROTOCOL_ID)
    await raw.write(lines)
    said = b""
    while len(said) < len(lines):
        said += await raw.read(len(lines) - len(said))
    expected: Any = libp2p_id(host.peer)
    session = await Noise(KEYS[0]).secure_outbound(raw, expected)
    assert isinstance(session, NoiseSession)
    try:
        yield session
    finally:
        with trio.CancelScope(shield=True):
            await session.close()


# ---- what hostile peers do; each returns when it cannot go on -------------------------------------------------------


async def opens_streams_without_end(session: NoiseSession) -> None:
    number = 1
    while True:
        await session.write(b"".join(frame(WINDOW_UPDATE, SYN, number + 2 * n, 0) for n in range(500)))
        number += 1000


async def opens_and_resets_without_end(session: NoiseSession) -> None:
    number = 1
    while True:
        said = b"".join(
            frame(WINDOW_UPDATE, SYN, each, 0) + frame(WINDOW_UPDATE, RST, each, 0)
            for each in range(number, number + 200, 2)
        )
        await session.write(said)
        number += 200
        await trio.sleep(0.001)


async def sends_beyond_its_window(session: NoiseSession) -> None:
    await session.write(frame(DATA, SYN, 1, len(REQUEST), REQUEST))
    while True:
        await session.write(frame(DATA, 0, 1, SPEC_WINDOW, bytes(SPEC_WINDOW)))


async def claims_a_frame_of_four_gigabytes(session: NoiseSession) -> None:
    await session.write(
        frame(DATA, SYN, 1, len(REQUEST), REQUEST) + frame(DATA, 0, 1, 2**32 - 1, bytes(1000))
    )
    await until_cut_off(session)


async def acknowledges_what_was_never_opened(session: NoiseSession) -> None:
    await session.write(frame(WINDOW_UPDATE, ACK | SYN, 2, 0))
    await until_cut_off(session)


async def speaks_no_yamux(session: NoiseSession) -> None:
    while True:
        await session.write(random.Random(3).randbytes(5000))


async def breaks_off_in_a_record(session: NoiseSession) -> None:
    raw: Any = session.raw
    await raw.stream.stream.send_all(b"\xff\xff" + bytes(70_000))
    await until_cut_off(session)


async def until_cut_off(session: NoiseSession) -> None:
    while True:
        await session.read(65536)


CUT_OFF: list[Attack] = [
    opens_streams_without_end,
    sends_beyond_its_window,
    claims_a_frame_of_four_gigabytes,
    acknowledges_what_was_never_opened,
    speaks_no_yamux,
    breaks_off_in_a_record,
]


@pytest.mark.parametrize("attack", CUT_OFF, ids=lambda attack: attack.__name__)
async def test_a_hostile_peer_is_cut_off_and_others_are_unharmed(attack: Attack) -> None:
    async with (
        open_libp2p_network(b"h" * 32, CONFIG) as host,
        open_libp2p_network(b"o" * 32, CONFIG) as other,
    ):
        host.set_handler(ECHO, echo, admitted_only=False)
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery, hostile(host) as session:
                nursery.start_soon(honest_transfer, other, host)
                with pytest.raises((IOException, StreamReset)):
                    await attack(session)
            await until_gone(host)


async def until_gone(host: Libp2pNetwork) -> None:
    while host.path(_hostile_id()) is not None:  # noqa: ASYNC110 - events are not for us to consume
        await trio.sleep(0.01)


def _hostile_id() -> Any:
    return str(peer_of(KEYS[0]))


# ---- what is no offence, and costs us nothing -----------------------------------------------------------------------


async def lies_about_windows(session: NoiseSession) -> None:
    await session.write(frame(DATA, SYN, 1, len(REQUEST), REQUEST))
    for _ in range(1000):
        await session.write(frame(WINDOW_UPDATE, 0, 1, 2**32 - 1) * 20)


async def never_reads(session: NoiseSession) -> None:
    """Asks for echoes that it does not take, until nothing more is taken from it."""
    await session.write(frame(DATA, SYN, 1, len(REQUEST), REQUEST) + frame(WINDOW_UPDATE, 0, 1, 2**30))
    await session.write(frame(DATA, 0, 1, SPEC_WINDOW - len(REQUEST), bytes(SPEC_WINDOW - len(REQUEST))))
    await session.write(frame(PING, SYN, 0, 7) * 10_000)


@pytest.mark.parametrize(
    "attack",
    [lies_about_windows, never_reads, opens_and_resets_without_end],
    ids=lambda attack: attack.__name__,
)
async def test_a_greedy_peer_gains_nothing_and_others_are_unharmed(attack: Attack) -> None:
    async with (
        open_libp2p_network(b"h" * 32, CONFIG) as host,
        open_libp2p_network(b"o" * 32, CONFIG) as other,
    ):
        host.set_handler(ECHO, echo, admitted_only=False)
        with trio.fail_after(PATIENCE):
            async with hostile(host) as session, trio.open_nursery() as nursery:

                async def run() -> None:
                    try:
                        await attack(session)
                    except (IOException, StreamReset):
                        return

                nursery.start_soon(run)
                await honest_transfer(other, host)
                nursery.cancel_scope.cancel()
            await until_gone(host)

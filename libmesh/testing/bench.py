"""Two networks on the bench, and the motions that the contract puts their streams through."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import trio
import trio.testing

from libmesh.net.base import Network, Pieces, Stream, StreamReset

PROTOCOL = "/libmesh/contract/1.0.0"

_TOKEN_BYTES = 8
_STRAY = bytes(_TOKEN_BYTES)


@dataclass(kw_only=True)
class Bench:
    """What a check works with.

    Attributes:
        near, far: two connected networks. Streams are opened by `near`.
        seed: of everything random.
        rounds: how often a check that draws lots does so.
        pause: seconds for which a reader stops reading.
    """

    near: Network
    far: Network
    seed: int
    rounds: int
    pause: float
    _opened: int = 0
    _expected: dict[bytes, trio.Event] = field(init=False, default_factory=dict)
    _arrived: dict[bytes, Stream] = field(init=False, default_factory=dict)
    _released: trio.Event = field(init=False, default_factory=trio.Event)

    def __post_init__(self) -> None:
        """Serve the contract's protocol on the far side."""
        self._lots = random.Random(self.seed)
        self.far.set_handler(PROTOCOL, self._serve)

    async def _serve(self, stream: Stream) -> None:
        token = b""
        with suppress(trio.BrokenResourceError):
            while len(token) < _TOKEN_BYTES:
                piece = await stream.receive_some(_TOKEN_BYTES - len(token))
                if not piece:
                    break
                token += piece
        if token not in self._expected:
            await _answer_stray(stream, self._lots)
            return
        self._arrived[token] = stream
        self._expected.pop(token).set()
        await self._released.wait()

    async def open(self) -> tuple[Stream, Stream]:
        """A new stream, both ends, past its negotiation."""
        self._opened += 1
        token = self._opened.to_bytes(_TOKEN_BYTES, "big")
        expected = self._expected[token] = trio.Event()
        near = await self.near.open_stream(self.far.peer, PROTOCOL)
        await near.send_all(token)
        await expected.wait()
        far = self._arrived.pop(token)
        await far.send_all(b"!")
        assert await near.receive_some(1) == b"!"
        return near, far

    async def open_clogged(self) -> tuple[Stream, Stream]:
        """A new stream on which sending blocks, in both directions, until the other end reads."""
        pair = await self.open()
        for stream in pair:
            while True:
                with trio.move_on_after(0.2) as scope:
                    await stream.send_all(bytes(65536))
                if scope.cancelled_caught:
                    break
        return pair

    async def misbehave(self, lots: random.Random) -> None:
        """Open a stream, do something with it, leave it. To be cancelled."""
        stream = await self.near.open_stream(self.far.peer, PROTOCOL)
        try:
            for _ in range(lots.randrange(4)):
                await stream.send_all(bytes(lots.choice((1, 100, 5000, 70_000, 400_000))))
            if lots.random() < 0.5:
                await stream.send_eof()
            if lots.random() < 0.5:
                await stream.receive_some()
        except trio.BrokenResourceError:
            return
        finally:
            if lots.random() < 0.5:
                stream.reset()
            else:
                await stream.aclose()

    def release(self) -> None:
        """Let the handlers of all streams return."""
        self._released.set()


async def _answer_stray(stream: Stream, lots: random.Random) -> None:
    with suppress(trio.BrokenResourceError):
        if lots.random() < 0.3:
            await stream.send_all(bytes(lots.randrange(1, 2000)))
        if lots.random() < 0.5:
            while await stream.receive_some():
                pass
    if lots.random() < 0.5:
        stream.reset()
    else:
        await stream.aclose()


async def read_all(stream: Stream) -> bytes:
    """Everything up to the end of file."""
    pieces = []
    while data := await stream.receive_some():
        pieces.append(data)
    return b"".join(pieces)


async def send_and_finish(stream: Stream, data: bytes) -> None:
    """Send, then send an end of file."""
    await stream.send_all(data)
    await stream.send_eof()


async def transfer(sender: Stream, receiver: Stream, seed: int, size: int) -> None:
    """Send `size` random bytes and check that they arrive."""
    data = random.Random(seed).randbytes(size)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_and_finish, sender, data)
        got = await read_all(receiver)
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest(), "bytes were lost, added or moved"


async def transfer_until(sender: Stream, receiver: Stream, seed: int, stop: trio.Event) -> None:
    """Send random bytes until told to stop, and check that they arrive."""
    lots = random.Random(seed)
    sent, got = hashlib.sha256(), hashlib.sha256()

    async def send() -> None:
        while not stop.is_set():
            piece = lots.randbytes(lots.randrange(1, 100_000))
            sent.update(piece)
            await sender.send_all(piece)
            await trio.lowlevel.checkpoint()
        await sender.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while data := await receiver.receive_some():
            got.update(data)
    assert sent.digest() == got.digest(), "bytes were lost, added or moved"


async def transfer_past_a_sink(sender: Stream, receiver: Stream, seed: int) -> None:
    """Send random bytes to a receiver with a sink that takes now much, now nothing, and whose calls are cancelled now and then."""
    lots = random.Random(seed)
    data, got = lots.randbytes(2_000_000), bytearray()

    def take_some(pieces: Pieces) -> int:
        whole = b"".join(pieces)
        count = lots.choice((0, len(whole) // 2, len(whole)))
        got.extend(whole[:count])
        return count

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_and_finish, sender, data)
        received: bytes | bytearray | None = None
        while received != b"":
            received = None
            with trio.move_on_after(lots.choice((0, 0.001, 1))):
                received = await receiver.receive_past(take_some)
            got += received or b""
    assert got == data, "bytes were lost, added or moved"


async def still_works(bench: Bench) -> None:
    """Carry a message over a new stream."""
    near, far = await bench.open()
    await near.send_all(b"ping")
    assert await far.receive_some() == b"ping"
    await near.aclose()
    await far.aclose()


async def expect_reset(stream: Stream) -> None:
    """The next receive must raise `StreamReset`."""
    try:
        data = await stream.receive_some()
    except StreamReset:
        return
    raise AssertionError(f"a reset was seen as {data!r}")


async def second_is_busy(call: Callable[[], Awaitable[object]]) -> None:
    """Of two calls at once, the second must raise `BusyResourceError`."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        busy = False
        try:
            await call()
        except trio.BusyResourceError:
            busy = True
        nursery.cancel_scope.cancel()
    assert busy


async def turns(count: int) -> None:
    """Let `count` turns of the scheduler pass."""
    for _ in range(count):
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def cancelled_after(count: int) -> AsyncIterator[None]:
    """Cancel what is inside after so many turns of the scheduler, or at once."""
    async with trio.open_nursery() as nursery:

        async def cancel() -> None:
            await turns(count)
            nursery.cancel_scope.cancel()

        nursery.start_soon(cancel)
        yield
        nursery.cancel_scope.cancel()

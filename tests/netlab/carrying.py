"""A TCP connection through a tunnel that carries bytes there and back, slowly, while its path changes; for `peer.py`."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import trio

from libmesh import Mesh, PeerId, expose, serve_tunnel

SERVICE = "tcp-echo"
PIECE = 16 * 1024
PAUSE = 0.05
"""Seconds between pieces: some 300 KB a second, so that there is always something under way."""


@dataclass(slots=True)
class Progress:
    """How far a connection has come. `failure` says what went wrong with it; it never should."""

    sent: int = 0
    received: int = 0
    done: bool = False
    failure: str = ""


async def expose_echo(mesh: Mesh) -> None:
    """Offer a TCP server that gives back what it gets, until cancelled."""

    async def echo(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # a tunnel that was cut for good resets it
            async for data in stream:
                await stream.send_all(data)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
        await expose(mesh, SERVICE, "127.0.0.1", listeners[0].socket.getsockname()[1])


async def comes_back(port: int) -> bool:
    """Whether a new connection to a tunnel's local port gives a byte back, soon."""
    with trio.move_on_after(5):
        try:
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"?")
                return await stream.receive_some(1) == b"?"
        except (OSError, trio.BrokenResourceError):
            return False
    return False


class Carrier:
    """One connection to a peer's echo, through a tunnel. `run` ends when `stop` was called and all came back."""

    def __init__(self, mesh: Mesh, peer: PeerId) -> None:
        self._mesh, self._peer = mesh, peer
        self._stop = trio.Event()
        self.progress = Progress()

    def stop(self) -> None:
        """Send no more."""
        self._stop.set()

    def picture(self) -> dict[str, Any]:
        """The progress, for JSON."""
        return asdict(self.progress)

    async def run(self) -> None:
        """Carry, and compare what comes back."""
        try:
            async with trio.open_nursery() as nursery:
                port = await nursery.start(serve_tunnel, self._mesh, self._peer, SERVICE)
                async with (
                    await trio.open_tcp_stream("127.0.0.1", port) as stream,
                    trio.open_nursery() as both,
                ):
                    both.start_soon(self._send, stream)
                    both.start_soon(self._receive, stream)
                nursery.cancel_scope.cancel()
        except* (OSError, trio.BrokenResourceError, ValueError) as group:
            self.progress.failure = repr(group.exceptions)

    async def _send(self, stream: trio.SocketStream) -> None:
        rng = random.Random(7)
        while not self._stop.is_set():
            await stream.send_all(rng.randbytes(PIECE))
            self.progress.sent += PIECE
            await trio.sleep(PAUSE)
        await stream.send_eof()

    async def _receive(self, stream: trio.SocketStream) -> None:
        rng, expected = random.Random(7), b""
        async for data in stream:
            while len(expected) < len(data):
                expected += rng.randbytes(PIECE)
            if not expected.startswith(data):
                raise ValueError(f"other bytes came back after {self.progress.received}")
            expected = expected[len(data) :]
            self.progress.received += len(data)
        self.progress.done = self.progress.received == self.progress.sent
        if not self.progress.done:
            raise ValueError(f"{self.progress.received} of {self.progress.sent} bytes came back")

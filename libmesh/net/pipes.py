"""Bytes beneath the secure channel: a socket driven by its file descriptor, or anything that py-libp2p has.

trio's own `SocketStream` costs a checkpoint and a fresh bytes object for each call. Over loopback that is half of
what a relay can carry (measured: 610 MiB/s through two such hops, 1049 with the descriptor), so where there is a socket
we use it directly and wait only after the kernel said that it would block.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import Any, TypeVar, cast

import trio
from libp2p.io.exceptions import IOException

from libmesh.net.base import StreamReset

NOT_SENT_BYTES = 256 * 1024
"""TCP_NOTSENT_LOWAT: bytes that wait in the kernel for the network beyond what is under way.

More only makes control frames and small requests wait behind bulk (the kernel would take 4 MiB); less costs wake-ups.
The option does not limit throughput: data under way is not counted. Source: tcp(7), and Cloudflare's "HTTP/2
prioritization" for the same use."""

SHORT_BUFFER_BYTES = 1024 * 1024
"""SO_RCVBUF on a path so short that more would only be a queue; the kernel doubles it for its own overhead.

Over loopback, eight bulk streams beside a small request (measured, two processes): with the kernel's own tuning, which
lets 6 MiB and more pile up, the request takes 10 ms in the median and 36 at p99; so, 3 and 8, and bulk is as fast."""

RECORDS_AT_ONCE = 12

TAKE_BYTES = RECORDS_AT_ONCE * 65519
"""Most bytes taken from the kernel by one call: as many as fill some records, so that a pump leaves no crumbs.

With four records a tunnel in bulk took a quarter more of the processors, and with sixteen, which no longer fit the second
level cache (1 MiB here), as much as with eight."""


class BufferPool:
    """Byte buffers of one size, kept for the next user.

    A fresh buffer of this size costs an mmap and page faults each time, about a fifth of the throughput. At most
    `keep` are kept, so the pool of a node with many idle connections holds nothing for them; more are left to the
    allocator.
    """

    def __init__(self, size: int, keep: int = 4) -> None:
        self.size = size
        self._keep = keep
        self._free: list[bytearray] = []

    def take(self) -> bytearray:
        """A buffer with arbitrary content. Give it back when no view of it is in use any more."""
        return self._free.pop() if self._free else bytearray(self.size)

    def give(self, buffer: bytearray) -> None:
        """Return a buffer. Its content may be overwritten at once."""
        if len(self._free) < self._keep and len(buffer) == self.size:
            self._free.append(buffer)


class Pipe(ABC):
    """A two-way pipe of bytes. One task may receive while another sends.

    Errors of all kinds are raised as `StreamReset`; the pipe is then good for nothing but `aclose`.
    """

    async def wait_readable(self) -> None:
        """Return when `receive_into` would not block, or at once where that cannot be told."""
        return

    def receive_nowait(self, view: memoryview) -> int | None:
        """What `receive_into` does, but `None` at once where it would wait, or where that cannot be told."""
        return None

    @abstractmethod
    async def receive_into(self, view: memoryview) -> int:
        """Wait for bytes and put them at the start of `view`; 0 at the end. If cancelled, nothing was taken."""

    @abstractmethod
    def send_nowait(self, view: memoryview) -> int:
        """Send what can be sent at once and return how much that was. Never blocks."""

    @abstractmethod
    async def send_some(self, view: memoryview) -> int:
        """Wait until something can be sent, send it, and return how much it was, at least 1.

        Where the transport cannot be interrupted (not a socket), a cancelled call leaves the pipe unusable.
        """

    def shorten(self) -> None:
        """The path is short: keep no more in the kernel than it needs. Nothing by default."""
        return

    @abstractmethod
    async def aclose(self) -> None:
        """Close. Waiting calls on the other side of the process raise `StreamReset`."""


class SocketPipe(Pipe):
    """A connected TCP socket. Owns it."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._socket = stream.socket
        if self._socket.family in (socket.AF_INET, socket.AF_INET6):
            tune_socket(self._socket)

    def shorten(self) -> None:
        """See `Pipe.shorten`."""
        if self._socket.fileno() >= 0:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SHORT_BUFFER_BYTES)

    def _number(self) -> int:
        """The descriptor, to wait for. trio remembers waits for a closed one, -1, and then takes the next for busy."""
        number = self._socket.fileno()
        if number < 0:
            raise trio.ClosedResourceError("the socket was closed here")
        return number

    def receive_nowait(self, view: memoryview) -> int | None:
        """See `Pipe.receive_nowait`."""
        try:
            return os.readv(self._socket.fileno(), (view,))
        except BlockingIOError:
            return None
        except OSError as exc:
            raise StreamReset(f"connection lost: {exc}") from exc

    async def receive_into(self, view: memoryview) -> int:
        """See `Pipe.receive_into`."""
        while (count := self.receive_nowait(view)) is None:
            await self.wait_readable()
        return count

    async def wait_readable(self) -> None:
        """See `Pipe.wait_readable`."""
        try:
            await trio.lowlevel.wait_readable(self._number())
        except (OSError, trio.ClosedResourceError) as exc:
            raise StreamReset(f"connection lost: {exc}") from exc

    def send_nowait(self, view: memoryview) -> int:
        """See `Pipe.send_nowait`."""
        # The number is asked for each time: after a close it is -1, and never another file's.
        try:
            return os.write(self._socket.fileno(), view)
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise StreamReset(f"connection lost: {exc}") from exc

    async def wait_writable(self) -> None:
        """Return when `send_nowait` would send something."""
        try:
            await trio.lowlevel.wait_writable(self._number())
        except (OSError, trio.ClosedResourceError) as exc:
            raise StreamReset(f"connection lost: {exc}") from exc

    async def send_some(self, view: memoryview) -> int:
        """See `Pipe.send_some`."""
        while True:
            await self.wait_writable()
            if sent := self.send_nowait(view):
                return sent

    async def aclose(self) -> None:
        """See `Pipe.aclose`."""
        await self._stream.aclose()


class RawPipe(Pipe):
    """Any py-libp2p connection with `read(n)`, `write(data)` and `close()`: a relayed circuit, a WebSocket."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    async def receive_into(self, view: memoryview) -> int:
        """See `Pipe.receive_into`."""
        data = await guarded(self._raw.read(min(len(view), 65536)))
        view[: len(data)] = data
        return len(data)

    def send_nowait(self, view: memoryview) -> int:
        """See `Pipe.send_nowait`. Nothing can be sent without waiting."""
        return 0

    async def send_some(self, view: memoryview) -> int:
        """See `Pipe.send_some`."""
        piece = bytes(view[:65536])
        await guarded(self._raw.write(piece))
        return len(piece)

    async def aclose(self) -> None:
        """See `Pipe.aclose`."""
        await guarded(self._raw.close())


T = TypeVar("T")


async def guarded(call: Awaitable[T]) -> T:
    """Await a call of py-libp2p's; whatever it says of a lost connection becomes `StreamReset`."""
    try:
        return await call
    except (IOException, OSError, EOFError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise StreamReset(f"connection lost: {exc}") from exc


def pipe_of(raw: Any) -> Pipe:
    """The fastest pipe for a py-libp2p raw connection. Its own `read` and `write` must not be used any more."""
    face = getattr(raw, "stream", None)
    if (own := getattr(face, "pipe", None)) is not None:
        return cast(Pipe, own())
    inner = getattr(face, "stream", None)
    return SocketPipe(inner) if isinstance(inner, trio.SocketStream) else RawPipe(raw)


def tune_socket(sock: trio.socket.SocketType, *, not_sent: int = NOT_SENT_BYTES) -> None:
    """Options for a TCP socket that carries a connection or one end of a tunnel.

    NODELAY because we batch ourselves; KEEPALIVE so that the kernel forgets dead ends of tunnels that are idle. Buffer
    sizes are left to the kernel's own tuning, which a fixed size would switch off and which a long fat path needs;
    `Pipe.shorten` says when not. `not_sent` is TCP_NOTSENT_LOWAT.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, not_sent)

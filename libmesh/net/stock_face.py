"""The calls that py-libp2p makes on a muxed stream, in terms of ours."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Self

import trio
from libp2p.abc import IMuxedStream
from libp2p.stream_muxer.exceptions import (
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)

from libmesh.net.base import StreamReset

if TYPE_CHECKING:
    from types import TracebackType


class StockFace(IMuxedStream):
    """`read`, `write`, `close` and `reset`, with the meaning that they have on the stock muxer.

    `close` ends the sending direction only, and reading goes on being possible.
    """

    _write_lock: trio.Lock | None
    _deadline: float

    @abstractmethod
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""

    @abstractmethod
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""

    @abstractmethod
    def send_eof_nowait(self) -> None:
        """End the sending direction; harmless to repeat."""

    @abstractmethod
    def release(self) -> None:
        """End the sending direction for a user who will not come back: the stream must end even if the peer does not."""

    @abstractmethod
    def reset_nowait(self) -> None:
        """End both directions abruptly."""

    @property
    @abstractmethod
    def is_closed(self) -> bool:
        """True when neither direction can be used any more."""

    async def read(self, n: int | None = None) -> bytes:
        """At least one byte and at most `n`; raises `MuxedStreamEOF` at the end. If cancelled, nothing was taken."""
        if n == 0:
            return b""
        data = b""
        try:
            with trio.move_on_at(self._deadline) as scope:
                data = await self.receive_some(None if n is None or n < 0 else n)
        except StreamReset as exc:
            raise MuxedStreamReset(str(exc)) from exc
        except trio.ClosedResourceError as exc:
            raise MuxedStreamClosed(str(exc)) from exc
        if scope.cancelled_caught:
            raise MuxedStreamError("the deadline has passed")
        if not data:
            raise MuxedStreamEOF("the peer has finished")
        return data

    async def write(self, data: bytes) -> None:
        """Send all of `data`. Several tasks may write; their data is not interleaved."""
        if self._write_lock is None:
            self._write_lock = trio.Lock()
        try:
            with trio.move_on_at(self._deadline) as scope:
                async with self._write_lock:
                    await self.send_all(data)
        except StreamReset as exc:
            raise MuxedStreamReset(str(exc)) from exc
        except trio.ClosedResourceError as exc:
            raise MuxedStreamClosed(str(exc)) from exc
        if scope.cancelled_caught:
            raise MuxedStreamError("the deadline has passed")

    async def close_write(self) -> None:
        """End the sending direction."""
        if not self.is_closed:
            self.send_eof_nowait()
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        """End the sending direction, and have the stream reset if the peer does not end its own in time.

        Reading goes on being possible, as on the stock muxer. Nobody is going to close this stream again, so it
        must not depend on the peer to be freed.
        """
        self.release()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """End both directions abruptly.

        On a stream that is broken already, nothing: the swarm resets all streams of a dead connection, and their
        users are to learn why they ended.
        """
        if not self.is_closed:
            self.reset_nowait()
        await trio.lowlevel.checkpoint()

    def set_deadline(self, ttl: int) -> None:
        """Let `read` and `write` fail from `ttl` seconds on. Raises `ValueError` for a negative one."""
        if ttl < 0:
            raise ValueError(f"ttl={ttl}: at least 0")
        self._deadline = trio.current_time() + ttl

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

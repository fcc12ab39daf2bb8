"""Noise transport messages over a pipe: the ciphers, the framing and the buffers of one secured connection.

Wire (libp2p/specs `noise`, "Wire format"): each message is `length u16 big endian | ciphertext`, at most 65,535 bytes of
ciphertext, of which 16 are the tag; ChaCha20-Poly1305 with an empty associated data and a nonce of four zero bytes and
a 64-bit little-endian counter (Noise specification, 12.3), or what the handshake agreed on instead (`ciphers.py`).

Sealing writes the ciphertext straight into the buffer that the socket is given. Opening puts the records of one read one
behind the other into a buffer that is used again, so that a frame which fills several comes out in one piece, and a
pump hands it to its socket by one call (four made the other process wake four times, a third of what receiving cost). Only
who cannot take it at once copies it; a bytes object for each record cost more, in pages that the kernel had to clear.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from struct import Struct

import trio
from cryptography.exceptions import InvalidTag
from libp2p.abc import ISecureConn
from libp2p.io.exceptions import ConnectionClosedError

from libmesh.net.base import StreamReset
from libmesh.net.ciphers import CHACHA, Cipher
from libmesh.net.pipes import RECORDS_AT_ONCE, TAKE_BYTES, BufferPool, Pipe, SocketPipe, guarded

TAG_BYTES = 16
MAX_PLAINTEXT = 65535 - TAG_BYTES
_LARGEST = 65537
_BATCH_BYTES = TAKE_BYTES + RECORDS_AT_ONCE * (2 + TAG_BYTES) + RECORDS_AT_ONCE // 4 * (2 + 12 + TAG_BYTES)
"""Sealed, what a pump sends at once: full records, and the headers of their frames."""

BUFFER_BYTES = _BATCH_BYTES + _LARGEST
"""A full read behind the largest unfinished record; also room for a usual batch of sealed records."""

_LENGTH = Struct("!H")
_APART_BELOW = 4096  # a smaller record becomes bytes, which costs less than views of a buffer
_JOIN_BELOW = (
    8192  # smaller pieces are copied together into one record: a record costs as much as 3 KB of copying
)

_KEEP_SHARE = (
    8  # what waits for a full socket and takes less than this share of its buffer is moved to one of its size
)

Piece = bytes | bytearray | memoryview


class Channel(ABC):
    """What the muxer needs of a secured connection.

    `put` and `flush_nowait` may be called by any task at any time and never block. `flush` may be called by one task
    at a time; what it has not sent when it is cancelled stays with the channel.

    Attributes:
        heard: called when bytes have come that complete no record yet: on a slow path a full one takes seconds, and they
            are a sign of life. Set by the muxer.
    """

    heard: Callable[[], None] | None = None

    @abstractmethod
    async def receive(self) -> Sequence[bytes | memoryview]:
        """Wait for data; return it in pieces, none empty. None at all is the end.

        The memory of those that are views is used again by the next call. Raises `StreamReset` when the connection fails
        or was tampered with. If cancelled, nothing was taken.
        """

    @abstractmethod
    def put(self, pieces: Sequence[Piece]) -> None:
        """Queue pieces to be sent. Their memory is free again when this returns. The caller bounds the amount."""

    @abstractmethod
    def flush_nowait(self) -> bool:
        """Send what can be sent at once. True when nothing is left."""

    @abstractmethod
    async def flush(self) -> bool:
        """Send some of what is queued, waiting if need be. Returns after progress, or when nothing is left.

        True if the progress is a sign of life: a kernel that had been full takes more because the peer's has taken some.
        """

    def shorten(self) -> None:
        """The path is short: keep no more in the kernel than it needs. Nothing by default."""
        return

    @abstractmethod
    async def aclose(self) -> None:
        """Close the connection. What is queued is lost."""


class RecordChannel(Channel):
    """A pipe secured with the two keys of a finished Noise handshake. Owns the pipe.

    Attributes:
        cipher: the name of the one that is used, both ways.
    """

    def __init__(
        self, pipe: Pipe, send_key: bytes, receive_key: bytes, pool: BufferPool, cipher: str = CHACHA
    ) -> None:
        self.cipher = cipher
        self._pipe = pipe
        self._pool = pool
        self._seal = Cipher(cipher, send_key)
        self._open = Cipher(cipher, receive_key)
        self._rekey_every = self._seal.rekey_every
        self._sealed_count = 0
        self._opened_count = 0
        self._out: bytearray | None = None  # ciphertext from _out_start to _out_end waits to be sent
        self._out_start = 0
        self._out_end = 0
        self._tail = b""  # the beginning of a record whose rest has not come yet
        self._plain: bytearray | None = None  # what the views point into that were returned last
        self._more = False  # the last read filled its buffer, so more is likely to be there

    # ---- receiving --------------------------------------------------------------------------------------------

    async def receive(self) -> list[bytes | memoryview]:
        """See `Channel.receive`."""
        pipe, pool = self._pipe, self._pool
        if self._plain is not None:
            pool.give(self._plain)
            self._plain = None
        while True:
            if not self._more:
                await pipe.wait_readable()  # so that no connection holds a buffer while it waits
            buffer = pool.take()
            view = memoryview(buffer)
            try:
                tail = self._tail
                if start := len(tail):
                    view[:start] = tail
                # Where an unfinished record ends and no further than a batch, so that in bulk a read ends where a record
                # does. Reading what fits left nearly a record over each time, and moving that was a tenth of all work.
                missing = 2 + ((tail[0] << 8) | tail[1]) - start if start >= 2 else 0
                rest = view[start : start + missing + _BATCH_BYTES]
                count = pipe.receive_nowait(rest)
                if count is None:
                    if self._more:
                        self._more = False
                        continue
                    count = await pipe.receive_into(rest)
                self._more = count == len(rest)
                if count == 0:
                    if start:
                        raise StreamReset("connection lost inside a record")
                    return []
                records, used = self._open_all(view[: start + count])
                self._tail = bytes(view[used : start + count])
            finally:
                view.release()
                pool.give(buffer)
            if records:
                return records
            if self.heard is not None:
                self.heard()

    def _open_all(self, view: memoryview) -> tuple[list[bytes | memoryview], int]:
        records: list[bytes | memoryview] = []
        position, end = 0, len(view)
        count, cipher, rekey_every = self._opened_count, self._open, self._rekey_every
        plain: memoryview | None = None
        run = filled = 0  # from where to where in `plain` is what is not among `records` yet
        while end - position >= 2:
            length = (view[position] << 8) | view[position + 1]
            after = position + 2 + length
            if after > end:
                break
            nonce, sealed = cipher.pack_nonce(0, count), view[position + 2 : after]
            try:
                if length < _APART_BELOW:
                    record = cipher.decrypt(nonce, sealed, None)
                    if filled > run and plain is not None:
                        records.append(plain[run:filled])
                        run = filled
                    if record:
                        records.append(record)
                else:
                    if plain is None:
                        self._plain = self._pool.take()
                        plain = memoryview(self._plain)
                    start, filled = filled, filled + length - TAG_BYTES
                    cipher.decrypt_into(nonce, sealed, None, plain[start:filled])
            except (InvalidTag, ValueError) as exc:
                raise StreamReset("a record was damaged on the way") from exc
            count += 1
            if rekey_every and not count % rekey_every:
                cipher.renew()
            position = after
        if filled > run and plain is not None:
            records.append(plain[run:filled])
        self._opened_count = count
        return records, position

    # ---- sending ----------------------------------------------------------------------------------------------

    def put(self, pieces: Sequence[Piece]) -> None:
        """See `Channel.put`."""
        small: list[Piece] = []
        size = 0
        for piece in pieces:
            length = len(piece)
            if size + length > MAX_PLAINTEXT or (small and length > _JOIN_BELOW):
                self._put_record(small)
                small, size = [], 0
            if length <= MAX_PLAINTEXT:
                small.append(piece)
                size += length
                continue
            view = memoryview(piece)
            for start in range(0, length, MAX_PLAINTEXT):
                self._put_record([view[start : start + MAX_PLAINTEXT]])
        if size:
            self._put_record(small)

    def _put_record(self, pieces: list[Piece]) -> None:
        if not pieces:
            return
        plain = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        length = len(plain) + TAG_BYTES
        out = self._reserve(2 + length)
        start = self._out_end
        _LENGTH.pack_into(out, start, length)
        view = memoryview(out)
        cipher, count = self._seal, self._sealed_count
        cipher.encrypt_into(cipher.pack_nonce(0, count), plain, None, view[start + 2 : start + 2 + length])
        view.release()
        self._sealed_count = count = count + 1
        if self._rekey_every and not count % self._rekey_every:
            cipher.renew()
        self._out_end = start + 2 + length

    def _reserve(self, size: int) -> bytearray:
        out = self._out
        if out is None:
            out = self._out = self._pool.take()
        if self._out_end + size > len(out):
            # More than a batch; rare (a burst of control frames behind a full batch). A larger buffer, not kept.
            waiting = memoryview(out)[self._out_start : self._out_end]
            grown = bytearray(max(2 * len(out), len(waiting) + size))
            grown[: len(waiting)] = waiting
            self._out_start, self._out_end = 0, len(waiting)
            waiting.release()
            self._pool.give(out)
            out = self._out = grown
        return out

    def flush_nowait(self) -> bool:
        """See `Channel.flush_nowait`."""
        out = self._out
        if out is None:
            return True
        with memoryview(out) as view:
            while self._out_start < self._out_end:
                sent = self._pipe.send_nowait(view[self._out_start : self._out_end])
                if not sent:
                    break
                self._out_start += sent
        if self._out_start == self._out_end:
            self._release()
            return True
        if self._out_end - self._out_start < len(out) // _KEEP_SHARE:
            # It may wait for long. A buffer of the pool is for what moves.
            rest = out[self._out_start : self._out_end]
            self._release()
            self._out, self._out_end = rest, len(rest)
        return False

    async def flush(self) -> bool:
        """See `Channel.flush`."""
        out = self._out
        if out is None:
            await trio.lowlevel.checkpoint()
            return False
        pipe = self._pipe
        if isinstance(pipe, SocketPipe):
            await pipe.wait_writable()
            self.flush_nowait()  # from where others may have got to in the meantime
            return True
        # Only this call sends meanwhile: whoever has found the pipe full calls `flush_nowait` again after this only.
        # `put` may replace the buffer, but then what waits is first in the new one, so the count stays right.
        with memoryview(out) as whole, whole[self._out_start : self._out_end] as view:
            sent = await pipe.send_some(view)
        self._out_start += sent
        if self._out_start == self._out_end:
            self._release()
        return False

    def _release(self) -> None:
        if self._out is not None:
            self._pool.give(self._out)
        self._out = None
        self._out_start = self._out_end = 0

    def shorten(self) -> None:
        """See `Channel.shorten`."""
        self._pipe.shorten()

    async def aclose(self) -> None:
        """See `Channel.aclose`."""
        await self._pipe.aclose()


class PlainChannel(Channel):
    """Any py-libp2p secure connection as a channel: stock TLS, for peers that have no Noise. Owns the connection.

    Its `read` is asked for whatever there is: with a number, a stock session waits for all of that many bytes.
    """

    def __init__(self, conn: ISecureConn) -> None:
        self._conn = conn
        self._waiting = bytearray()

    async def receive(self) -> list[bytes]:
        """See `Channel.receive`."""
        try:
            data = await guarded(self._conn.read())
        except StreamReset as exc:
            if isinstance(exc.__cause__, ConnectionClosedError):
                return []  # how a stock session says that it has ended
            raise
        return [data] if data else []

    def put(self, pieces: Sequence[Piece]) -> None:
        """See `Channel.put`."""
        for piece in pieces:
            self._waiting += piece

    def flush_nowait(self) -> bool:
        """See `Channel.flush_nowait`."""
        return not self._waiting

    async def flush(self) -> bool:
        """See `Channel.flush`. Cannot be interrupted: a cancelled call leaves the connection unusable."""
        if not self._waiting:
            await trio.lowlevel.checkpoint()
            return False
        batch = bytes(self._waiting)
        self._waiting.clear()
        await guarded(self._conn.write(batch))
        return False

    async def aclose(self) -> None:
        """See `Channel.aclose`."""
        await guarded(self._conn.close())

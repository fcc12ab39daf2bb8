"""What one end of a tunnel remembers, so that the tunnel can go on over another connection with no byte lost or doubled.

Each end counts what it has sent and received, and keeps what it has sent until the other end said that it has it. After
the loss of a connection both tell what they have received, and each sends on from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque

import trio

from libmesh.net.base import Stream

KEPT_BYTES = 4 * 1024 * 1024
"""Most bytes that are kept of one tunnel; then its sender waits. Limits it to some 3 MiB a round trip: 30 MiB/s at
100 ms, which is more than a path that long is likely to carry."""

PIECE_BYTES = 16 * 1024
"""Smaller pieces are kept together up to this, so that what is kept is not mostly objects, and is found quickly."""

TELL_EVERY = 1024 * 1024
"""Received bytes after which the other end is told, so that it can forget them."""


class Journal:
    """The books of one end of one tunnel.

    Attributes:
        kept: whether anything is kept at all; not if the other end cannot resume.
        sent: bytes handed to the stream, ever.
        sent_end: the end of file was, too.
        has: how many of them the other end is known to have.
        has_end: it has the end of file, too.
        received: bytes taken from the stream, ever.
        received_end: the end of file was, too.
    """

    def __init__(self) -> None:
        self.kept = True
        self.sent, self.sent_end = 0, False
        self.has, self.has_end = 0, False
        self.received, self.received_end = 0, False
        self._pieces: deque[bytearray] = deque()
        self._start = 0  # of the first piece
        self._changed = trio.Event()

    @property
    def full(self) -> bool:
        """Whether nothing may be sent now."""
        return self.kept and self.sent - self._start >= KEPT_BYTES

    def append(self, data: memoryview) -> None:
        """`data` is about to be sent."""
        self.sent += len(data)
        if not self.kept:
            return
        if self._pieces and len(self._pieces[-1]) + len(data) <= PIECE_BYTES:
            self._pieces[-1] += data
        else:
            self._pieces.append(bytearray(data))

    def acknowledge(self, received: int, ended: bool) -> None:
        """The other end has that much. What it said before and less is nothing new. Raises `ValueError` for a lie."""
        if received > self.sent or (ended and not self.sent_end):
            raise ValueError(f"the other end claims to have {received} bytes of {self.sent}")
        self.has = max(self.has, received)
        self.has_end = self.has_end or ended
        while self._pieces and self._start + len(self._pieces[0]) <= self.has:
            self._start += len(self._pieces.popleft())
        self._notify()

    def piece_at(self, offset: int) -> bytes | None:
        """Some bytes that were sent, from `offset` on; `None` at the end. Raises `LookupError` if they are not kept."""
        if offset >= self.sent:
            return None
        start = self._start
        for piece in self._pieces:
            if start <= offset < start + len(piece):
                return bytes(piece[offset - start :])
            start += len(piece)
        raise LookupError(f"what was sent at {offset} is not kept any more")

    def give_up(self) -> None:
        """The tunnel cannot be resumed: forget everything, and wait for nobody."""
        self.kept = False
        self._pieces.clear()
        self._notify()

    @property
    def complete(self) -> bool:
        """Whether nothing is left that the other end might ask for."""
        return not self.kept or (self.has_end and self.has == self.sent)

    async def wait_changed(self) -> None:
        """Wait until `full` or `complete` may be others."""
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class Lifeline(ABC):
    """How a tunnel that lost its connection gets on.

    Attributes:
        journal: the books.
    """

    def __init__(self) -> None:
        self.journal = Journal()
        self._told = 0

    @abstractmethod
    def begin(self) -> None:
        """From now on the other end may go on over another connection."""

    @abstractmethod
    def end(self) -> None:
        """It is over. Harmless to repeat."""

    def took(self, count: int) -> None:
        """`count` more bytes were received."""
        journal = self.journal
        journal.received += count
        if journal.received - self._told >= TELL_EVERY:
            self.tell_progress()

    def took_end(self) -> None:
        """The end of file was received."""
        self.journal.received_end = True
        self.tell_progress()

    def tell_progress(self) -> None:
        """Have the other end be told how far we are, sooner or later."""
        self._told = self.journal.received
        if self.journal.kept:
            self.tell()

    @abstractmethod
    def tell(self) -> None:
        """Send the journal's progress to the other end. Never blocks, never raises."""

    def is_lost(self, stream: Stream) -> bool:
        """Whether `stream` ended because its connection did, and the tunnel may go on over another."""
        return self.journal.kept and stream.connection_lost

    @abstractmethod
    async def again(self) -> Stream:
        """Another stream for the tunnel, on which the other end goes on behind what we have received.

        The journal knows what it has received. Raises `MeshError` if there is none.
        """

    @abstractmethod
    async def finished(self, stream: Stream) -> bool:
        """Wait until the other end has everything. False if `stream` was lost before, and the tunnel must go on."""

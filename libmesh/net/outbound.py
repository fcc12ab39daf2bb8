"""What leaves a yamux connection, and in which order.

Whoever has data calls `send_nowait` or `queue`; if the socket takes it, it goes out in that very call, without
a lock and without another task. If the socket is full, small messages wait in the outbox (bounded) and bulk senders
stand in a queue; the sending task takes from them in turn, control frames first, then the outbox, then a frame of each
bulk sender, and seals straight from the sender's memory. A small message that follows another stream's within
`CORK_TIME` waits one turn of the scheduler, so that many of them leave in one record and one system call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf

import trio

from libmesh.core.yamux import Yamux
from libmesh.net.base import StreamReset
from libmesh.net.muxed_stream import YamuxStream
from libmesh.net.parking import Wakeup
from libmesh.net.pipes import RECORDS_AT_ONCE
from libmesh.net.records import MAX_PLAINTEXT, Channel

BATCH_RECORDS = RECORDS_AT_ONCE
"""Most full records sealed before they are given to the socket: within the second level cache.

What is sealed cannot be overtaken. So where the path takes long, batches are halved, down to a record."""

LONG_WAIT, SHORT_WAIT = 0.005, 0.0005
"""Seconds that bulk waits for the path, above which batches are halved, and below which they are doubled again.

The kernel asks for more when it has half of `pipes.NOT_SENT_BYTES` left: 1 ms at a Gbit/s, 10 ms at 100 Mbit/s."""

SMALL_BYTES = 16 * 1024
"""A message below this is copied and may go ahead of bulk."""

POSTED_BYTES = 1024
"""What is posted one after the other for a stream becomes one frame up to this."""

OUTBOX_BYTES = 128 * 1024
"""Small messages that wait for the socket. When full, their senders queue like bulk."""

OVERFULL_BYTES = 1024 * 1024
"""What may wait for the socket besides, none of which can be refused: the lines and ends of streams. More ends the
connection. Of our own streams, a few hundred KiB at most come together (`Options.max_unacknowledged` lines of 1 KiB);
so it is a peer that opens streams without end and does not read the answers."""

FULL_TIME = 0.1
"""Seconds that a channel which is no socket took for a write, from which on it was full, and the peer made room.

Less is no sign of the peer's life: what stands between us, a relay, takes a ping for a dead peer at once."""

CORK_TIME = 0.0003
"""Seconds after another stream's small message within which one waits for company."""

COMPANY_TIME = 0.02
"""Seconds that what nobody waits for may wait for something to leave with.

A timer that goes off, or is only moved, costs as much as a tenth of a short stream. With 0.002 there was one for each."""

SYN_TIME = 0.002
"""The same for the SYN of a stream that its opener may expect to be accepted before it sends anything."""


class Outbound:
    """The sending half of a connection.

    Nothing here waits but `run`, in a task of the connection's own; so cancelling whoever sends cannot leave a record
    half sent.

    Args:
        machine: says what may be sent, and adds control frames.
        channel: takes it.
        fail: told once when the channel is lost.

    Attributes:
        batches: how often anything has left.
    """

    def __init__(self, machine: Yamux, channel: Channel, fail: Callable[[str], None]) -> None:
        self._machine = machine
        self._channel = channel
        self._fail = fail
        self.batches = 0
        self._outbox: list[bytes] = []
        self._outbox_size = 0
        self._ready: deque[YamuxStream] = deque()
        self._batch_bytes = BATCH_RECORDS // 4 * MAX_PLAINTEXT
        self._blocked = False  # the socket is full; only `run` may find out that it is no more
        self._stopped = False
        self._flusher = Wakeup()
        self._late_at: float | None = None  # when what may wait for company has waited long enough
        self._late_sleep = trio.CancelScope()  # of `run_late`; ends then, or earlier
        self._drained = trio.lowlevel.ParkingLot()
        self._posted: YamuxStream | None = None  # whose message was queued last
        self._posted_end = 0  # where in the outbox it ends
        self._last_small: YamuxStream | None = None
        self._last_small_at = 0.0

    # ---- what streams ask -------------------------------------------------------------------------------------

    def send_nowait(self, stream: YamuxStream, view: memoryview) -> int:
        """Send from `view` what can be sent at once; return how much that was."""
        if len(view) < SMALL_BYTES:
            return self._send_small(stream, view)
        if self._blocked or self._ready or self._stopped:
            return 0
        stream.view, stream.sent = view, 0
        self._ready.append(stream)
        self.pump()
        if stream.view is None:
            return len(view)
        stream.view = None
        self.unqueue(stream)
        return stream.sent

    def _send_small(self, stream: YamuxStream, view: memoryview) -> int:
        if self._outbox_size >= OUTBOX_BYTES or self._stopped:
            return 0
        header, count = self._machine.data(stream.stream_id, len(view))
        if not count:
            return 0
        if self._blocked:
            self.append(header, bytes(view[:count]))
            return count
        # The end of a peer that has asked all is followed by ours at once. The clock is read when the frame has left.
        company = stream.peer_has_finished or (
            self._last_small is not stream and trio.current_time() - self._last_small_at < CORK_TIME
        )
        if not (company or self._outbox or self._ready or self._machine.has_control):
            self._send_alone((header, view[:count]))
        else:
            self.append(header, bytes(view[:count]))
            if company:
                self.flush_soon()
            else:
                self.pump()
        self._last_small, self._last_small_at = stream, trio.current_time()
        return count

    def _send_alone(self, pieces: tuple[bytes, memoryview]) -> None:
        """What `pump` does, for a frame when nothing else waits: a message that is answered is mostly alone."""
        self.batches += 1
        try:
            self._channel.put(pieces)
            if not self._channel.flush_nowait():
                self._blocked = True
                self.flush_soon()
        except StreamReset as exc:
            self._fail(str(exc))

    def post(self, stream: YamuxStream, data: bytes, *, hurry: bool) -> bool:
        """Send a few bytes of a new stream, soon. False, and nothing is sent, if the window has no room for them.

        Without `hurry` they leave with the next thing that does, `COMPANY_TIME` later at most.
        """
        known = self._machine.table.states.get(stream.stream_id)
        if known is not None and known.send_window < len(data):
            return False
        outbox, before = self._outbox, b""
        if self._posted is stream and 0 < self._posted_end == len(outbox):
            before = outbox[-1]  # what was posted just now: one frame with this costs the peer less than two
            if len(before) + len(data) > POSTED_BYTES:
                before = b""
        header, count = self._machine.data(stream.stream_id, len(data), before=len(before))
        if not count:
            return True
        if before:
            self._outbox_size -= len(outbox.pop()) + len(outbox.pop())
        self.append(header, before + data[:count])
        self._posted, self._posted_end = stream, len(outbox)
        if hurry:
            self.flush_soon()
        else:
            self.flush_later()
        return True

    @property
    def is_free(self) -> bool:
        """Whether little waits to be sent, and the socket takes it, so that what is posted leaves soon."""
        return not self._blocked and self._outbox_size < SMALL_BYTES

    def end(self, stream: YamuxStream) -> None:
        """The end of a stream was queued. It is what a message that was just posted has waited for."""
        if self._posted is stream:
            self.pump()
        else:
            self.flush_soon()

    def append(self, *pieces: bytes) -> None:
        """Queue frames behind what is queued already. They leave with the next batch.

        Ends the connection when more than `OVERFULL_BYTES` wait.
        """
        if self._stopped:
            return
        for piece in pieces:
            if piece:
                self._outbox.append(piece)
                self._outbox_size += len(piece)
        if self._outbox_size > OVERFULL_BYTES:
            self._fail("the peer does not read the answers that it causes")

    def queue(self, stream: YamuxStream) -> None:
        """Send the rest of `stream.view` as the socket and the window allow; then tell the stream."""
        if self._machine.writable(stream.stream_id):
            self._ready.append(stream)
            self.flush_soon()

    def unqueue(self, stream: YamuxStream) -> None:
        """Forget what `queue` was asked."""
        if stream in self._ready:
            self._ready.remove(stream)

    def window_opened(self, stream: YamuxStream) -> None:
        """A stream that could not send may."""
        if stream.view is not None:
            self._ready.append(stream)
            self.flush_soon()
        else:
            stream.sending_possible()

    def might_send(self, stream: YamuxStream) -> bool:
        """Whether the window is open. If not, the stream is told when it is."""
        return self._machine.writable(stream.stream_id)

    def flush_soon(self) -> None:
        """Send what is queued when the tasks that are running now have had their turn."""
        self._flusher.wake()

    def flush_later(self, within: float = COMPANY_TIME) -> None:
        """Send what is queued when something else leaves, but within so many seconds."""
        now = trio.current_time()
        late_at = now + within
        if self._late_at is None or late_at < self._late_at:
            self._late_at = late_at
            # Mostly it leaves before that, so the timer is moved before it goes off in vain; but not each time.
            if not now + within / 2 < self._late_sleep.deadline <= late_at:
                self._late_sleep.deadline = late_at

    async def run_late(self) -> None:
        """Keep the promise of `flush_later`, until cancelled."""
        while True:
            with self._late_sleep:
                await trio.sleep_forever()
            if self._late_at is not None and self._late_at <= trio.current_time():
                self._late_at = None
                self.flush_soon()
            self._late_sleep = trio.CancelScope(deadline=inf if self._late_at is None else self._late_at)

    def pump(self) -> bool:
        """Send what the socket takes, a batch at most: others want their turn. True when nothing is left to send."""
        if self._blocked or self._stopped:
            return False
        channel, sent = self._channel, 0
        try:
            while channel.flush_nowait():
                if sent >= self._batch_bytes:
                    self._take_more()
                    self.flush_soon()
                    return False
                self._late_at = None
                if not (self._outbox or self._ready or self._machine.has_control):
                    if self._drained:
                        self._drained.unpark_all()
                    return True
                sent += self._put_batch()
        except StreamReset as exc:
            self._fail(str(exc))
            return False
        self._blocked = True
        self.flush_soon()
        return False

    def _put_batch(self) -> int:
        machine, ready = self._machine, self._ready
        batch: list[bytes | memoryview] = []
        size = 0
        if machine.has_control:
            control = machine.take_control()
            batch.append(control)
            size = len(control)
        self._posted = None
        if self._outbox:
            batch += self._outbox
            size += self._outbox_size
            self._outbox.clear()
            self._outbox_size = 0
        while ready and size < self._batch_bytes:
            stream = ready.popleft()
            view = stream.view
            if view is None:
                continue
            header, count = machine.data(stream.stream_id, min(len(view) - stream.sent, self._batch_bytes))
            if not count:
                continue  # the window is shut; `Writable` puts the stream back
            batch += (header, view[stream.sent : stream.sent + count])
            size += count
            stream.sent += count
            if stream.sent == len(view):
                stream.view = None
                stream.sending_possible()
            else:
                ready.append(stream)
        if batch:
            self.batches += 1
            self._channel.put(batch)
        return size

    def _take_more(self) -> None:
        self._batch_bytes = min(2 * self._batch_bytes, BATCH_RECORDS * MAX_PLAINTEXT)

    async def run(self) -> None:
        """Send what could not be sent at once, until cancelled or the channel is lost."""
        try:
            while True:
                if self.pump():
                    await self._flusher.wait()
                elif self._blocked:
                    began = trio.current_time()
                    lives = await self._channel.flush()
                    self._blocked = False
                    now = trio.current_time()
                    if now - began > LONG_WAIT:
                        self._batch_bytes = max(self._batch_bytes // 2, MAX_PLAINTEXT)
                    elif now - began < SHORT_WAIT:
                        self._take_more()
                    if lives or now - began >= FULL_TIME:
                        self._machine.alive(now)
                else:
                    await trio.lowlevel.checkpoint()
        except StreamReset as exc:
            self._fail(str(exc))

    async def drain(self) -> None:
        """Wait until all that is queued has left, or nothing can leave any more."""
        while not self._stopped and not self.pump():
            await self._drained.park()

    def stop(self) -> None:
        """Forget what is queued, and take no more."""
        self._stopped = True
        self._ready.clear()
        self._outbox.clear()
        self._outbox_size = 0
        self._drained.unpark_all()

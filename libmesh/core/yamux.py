"""The yamux multiplexer as a machine: frames, windows and stream states, no I/O and no clock.

Source: the yamux specification (hashicorp/yamux `spec.md`, and libp2p/specs `yamux`). A frame is a header of twelve
bytes, big endian, and for DATA a body:

    version u8 = 0 | type u8 | flags u16 | stream id u32 | length u32

    DATA 0           length: bytes of body          WINDOW_UPDATE 1   length: bytes added to the peer's send window
    PING 2           length: opaque, echoed         GO_AWAY 3         length: 0 normal, 1 protocol error, 2 internal

Theory of operation
===================
The driver feeds received bytes to `receive`, in pieces of any size, and acts on the events. It asks `data` for the
header of each DATA frame that it is about to send, `take_control` for everything that the machine itself has to say,
and puts control ahead of data. Payload never passes through the machine on its way out, and arrives as soon as any
part of a frame has. What has to keep its place behind a stream's data (FIN) is returned by the call that causes it.

A stream is known to the machine from SYN until both sides have finished, or one has reset:

    state              FIN arrives      RST arrives    finish()        abandon()                      reset()
    OPEN               REMOTE_FINISHED  forgotten      LOCAL_FINISHED  LINGERING; RST if unread       forgotten
    LOCAL_FINISHED     forgotten        forgotten      -               LINGERING; RST if unread       forgotten
    REMOTE_FINISHED    reset            forgotten      forgotten       forgotten                      forgotten
    LINGERING          forgotten        forgotten      -               -                              forgotten

LINGERING: the local side is done in both directions, and yamux has no frame to say so. DATA that arrives is answered
with RST; so is silence, after `Options.linger`. Frames for streams that are forgotten are skipped: they were under way.

What a peer may not do ends the connection (`Broken`): a wrong version or type, an id of the wrong parity or used
twice, more data than its window, streams opened without end. `receive` never raises because of what it was given.

Windows
=======
Each stream may have 256 KiB under way from the start (specification). Beyond that we grant: `initial_window` when the
stream is opened, then doubling up to `max_window` whenever the reader has consumed half a window within 0.25 s or two
round trips of the last grant, which is the sign that the window and not the reader is the limit. All grants beyond
256 KiB a stream come out of `window_budget`; when it is spent, windows stop growing. Unread bytes are bounded by
`max_unread` for the connection; the stream whose data would pass it is reset.
"""

from __future__ import annotations

from enum import Enum

from libmesh.core.yamux_frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    NORMAL,
    PING,
    PROTOCOL_ERROR,
    RST,
    SPEC_WINDOW,
    SYN,
    WINDOW_UPDATE,
    Broken,
    Data,
    Event,
    Finished,
    GoneAway,
    OpenAllowed,
    Opened,
    Options,
    Reset,
    Writable,
)

_MAX_SEND_WINDOW = 2**32 - 1
_MAX_STREAM_ID = 2**32 - 1
_MAX_PONGS = (
    16  # unanswered pings kept; more at once is a flood, and a lost answer costs the peer one measurement
)
_MAX_REFUSALS = 1024  # streams refused in a row before the peer is cut off; go-yamux refuses for ever
_MAX_CONTROL = 65536  # frames waiting for a peer that makes us answer and does not read the answers


class _State(Enum):
    OPEN = 0
    LOCAL_FINISHED = 1
    REMOTE_FINISHED = 2
    LINGERING = 3


class _Stream:
    __slots__ = (
        "consumed",
        "extra",
        "granted_at",
        "inbound",
        "receive_window",
        "send_window",
        "starved",
        "state",
        "target",
        "unanswered",
    )

    def __init__(self, inbound: bool, now: float) -> None:
        self.state = _State.OPEN
        self.inbound = inbound
        self.unanswered = True  # no ACK yet, in either direction
        self.send_window = SPEC_WINDOW
        self.starved = False
        self.receive_window = SPEC_WINDOW  # what the peer may still send
        self.target = SPEC_WINDOW  # the size of the window when all has been read
        self.extra = 0  # what of it came out of the budget
        self.consumed = 0  # read, and not yet granted again
        self.granted_at = now


class Yamux:
    """One side of a yamux connection. Not thread safe; calls never block.

    Times are seconds of any one monotonic clock. After `Broken` every call is harmless and does nothing.

    Attributes:
        rtt: smoothed round-trip time in seconds (RFC 6298, gain 1/8), `None` until the first answer to a ping.
        unread: bytes delivered as `Data` and not yet reported to `consumed`.
        broken: why the connection is over, or `None`.
    """

    def __init__(self, *, initiator: bool, now: float, options: Options | None = None) -> None:
        self._options = options or Options()
        self._streams: dict[int, _Stream] = {}
        self._next_id = 1 if initiator else 2
        self._peer_parity = 0 if initiator else 1
        self._last_peer_id = 0
        self._inbound = 0
        self._unaccepted = 0
        self._unacknowledged = 0
        self._open_refused = False
        self._refusals = 0
        self._budget = self._options.window_budget
        self._gone = False
        self.broken: str | None = None
        self.unread = 0
        self.rtt: float | None = None
        # what waits to be sent
        self._control: list[bytes] = []
        self._grants: dict[int, int] = {}
        self._pongs: list[int] = []
        # where the parser stands
        self._partial = b""
        self._body_left = 0
        self._body_stream = 0
        self._body_known = False  # the body belongs to a live stream; otherwise it is skipped
        self._body_finishes = False
        # time
        self._heard = now
        self._ping = 0
        self._ping_sent: float | None = None
        self._next_ping = now
        self._lingering: dict[int, float] = {}

    # ---- streams, from this side ------------------------------------------------------------------------------

    @property
    def closing(self) -> bool:
        """True once no stream can be opened any more."""
        return self._gone or self.broken is not None or self._next_id > _MAX_STREAM_ID

    @property
    def streams(self) -> int:
        """How many streams are known, lingering ones included."""
        return len(self._streams)

    def open(self, now: float) -> int | None:
        """Open a stream and return its id; `None` while too many are unacknowledged (wait for `OpenAllowed`).

        SYN is among the control frames at once, so it precedes any data. Must not be called when `closing`.
        """
        if self._unacknowledged >= self._options.max_unacknowledged:
            self._open_refused = True
            return None
        stream_id = self._next_id
        self._next_id += 2
        stream = self._streams[stream_id] = _Stream(False, now)
        self._unacknowledged += 1
        self._control.append(HEADER.pack(0, WINDOW_UPDATE, SYN, stream_id, self._first_grant(stream)))
        return stream_id

    def accept(self, stream_id: int) -> None:
        """Acknowledge an inbound stream. Nothing happens if it is gone already."""
        stream = self._streams.get(stream_id)
        if stream is None or not stream.inbound or not stream.unanswered:
            return
        stream.unanswered = False
        self._unaccepted -= 1
        self._control.append(HEADER.pack(0, WINDOW_UPDATE, ACK, stream_id, self._first_grant(stream)))

    def data(self, stream_id: int, size: int) -> tuple[bytes, int]:
        """The header of a DATA frame for the next bytes of a stream, and how many (1 to `size`) it covers.

        `(b"", 0)` when the window is shut, and then `Writable` follows; also when the stream cannot send at all.
        The frame must be sent: the window has been charged.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.state not in (_State.OPEN, _State.REMOTE_FINISHED):
            return b"", 0
        count = min(size, stream.send_window, self._options.max_frame)
        if count <= 0:
            stream.starved = True
            return b"", 0
        stream.send_window -= count
        return HEADER.pack(0, DATA, 0, stream_id, count), count

    def writable(self, stream_id: int) -> bool:
        """Whether `data` would give anything; if not, and the stream lives, `Writable` follows."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return False
        if stream.send_window > 0:
            return True
        stream.starved = True
        return False

    def knows(self, stream_id: int) -> bool:
        """Whether the stream is not yet forgotten."""
        return stream_id in self._streams

    def finish(self, stream_id: int, *, linger_from: float | None = None) -> bytes:
        """End the sending direction; return the FIN frame, to be sent after the stream's data, or nothing.

        With `linger_from`, a time, the stream is reset if the peer has not finished `Options.linger` later.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return b""
        if linger_from is not None and stream.state in (_State.OPEN, _State.LOCAL_FINISHED):
            self._lingering.setdefault(stream_id, linger_from + self._options.linger)
        if stream.state not in (_State.OPEN, _State.REMOTE_FINISHED):
            return b""
        if stream.state is _State.OPEN:
            stream.state = _State.LOCAL_FINISHED
        else:
            self._forget(stream_id)
        return HEADER.pack(0, WINDOW_UPDATE, FIN, stream_id, 0)

    def abandon(self, stream_id: int, *, unread: bool, now: float) -> bytes:
        """This side is done with a stream in both directions. Return the frames to send after its data, if any.

        With `unread` data left the peer is told by RST behind the FIN, as TCP does: it may be waiting for a window
        that would never open.
        """
        frames = self.finish(stream_id)
        stream = self._streams.get(stream_id)
        if stream is None or stream.state is _State.LINGERING:
            return frames
        if unread:
            self._forget(stream_id)
            return frames + HEADER.pack(0, WINDOW_UPDATE, RST, stream_id, 0)
        if stream.inbound:
            self._answer(stream)  # an outbound one still counts until the peer has seen it
        stream.state = _State.LINGERING
        self._lingering.setdefault(stream_id, now + self._options.linger)
        return frames

    def reset(self, stream_id: int) -> None:
        """End a stream abruptly. Harmless when it is gone."""
        if stream_id in self._streams:
            self._forget(stream_id)
            self._control.append(HEADER.pack(0, WINDOW_UPDATE, RST, stream_id, 0))

    def consumed(self, stream_id: int, count: int, now: float) -> None:
        """`count` bytes of `Data` were read or dropped. May open the peer's window, also of a larger size."""
        self.unread -= count
        stream = self._streams.get(stream_id)
        if stream is None or stream.state is _State.REMOTE_FINISHED:
            return
        stream.consumed += count
        if stream.consumed * 2 < stream.target:
            return
        grant = stream.consumed
        if now - stream.granted_at < max(0.25, 2 * (self.rtt or 0.0)):
            grant += self._extend(stream, min(stream.target, self._options.max_window - stream.target))
        stream.consumed = 0
        stream.granted_at = now
        stream.receive_window += grant
        self._grants[stream_id] = self._grants.get(stream_id, 0) + grant

    # ---- the connection ---------------------------------------------------------------------------------------

    @property
    def has_control(self) -> bool:
        """Whether `take_control` has anything."""
        return bool(self._control or self._grants or self._pongs)

    def take_control(self) -> bytes:
        """All frames that the machine has to send by itself, and forget them. To be sent ahead of waiting data."""
        frames = self._control
        for opaque in self._pongs:
            frames.append(HEADER.pack(0, PING, ACK, 0, opaque))
        for stream_id, grant in self._grants.items():
            frames.append(HEADER.pack(0, WINDOW_UPDATE, 0, stream_id, grant))
        self._control, self._pongs = [], []
        self._grants.clear()
        return b"".join(frames)

    def shutdown(self, code: int = NORMAL) -> None:
        """Say that this side goes away. Streams that are open go on; none can be opened."""
        if not self._gone and self.broken is None:
            self._gone = True
            self._control.append(HEADER.pack(0, GO_AWAY, 0, 0, code))

    def alive(self, now: float) -> None:
        """The peer gave a sign of life other than bytes: its TCP took more, after it had been full."""
        self._heard = now

    def deadline(self) -> float:
        """When `tick` is due. Infinite after `Broken`."""
        if self.broken is not None:
            return float("inf")
        due = self._next_ping
        if self._ping_sent is not None:
            due = min(due, self._ping_sent + self._options.ping_timeout)
        if self._lingering:
            due = min(due, next(iter(self._lingering.values())))  # in order: all linger equally long
        return due

    def tick(self, now: float) -> list[Event]:
        """Do what is due at `now`: ping, find the peer dead, end lingering streams. Moves `deadline` on."""
        events: list[Event] = []
        if self.broken is not None:
            return events
        timeout = self._options.ping_timeout
        if self._ping_sent is not None and now >= self._ping_sent + timeout:
            if self._heard < self._ping_sent:
                self._break(events, f"no sign of life for {now - self._heard:.1f} s")
                return events
            self._ping_sent = None  # it is slow, not dead: bytes came; the next ping asks again
        while self._lingering:
            stream_id, due = next(iter(self._lingering.items()))
            if due > now:
                break
            if self._streams[stream_id].state is not _State.LINGERING:
                events.append(Reset(stream_id, "the peer did not finish in time"))
            self.reset(stream_id)
        if now >= self._next_ping:
            self._next_ping = now + self._options.ping_interval
            if self._ping_sent is None:
                self._ping = (self._ping + 1) & 0xFFFFFFFF
                self._ping_sent = now
                self._control.append(HEADER.pack(0, PING, SYN, 0, self._ping))
        return events

    # ---- what the peer sends ----------------------------------------------------------------------------------

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Take the next bytes of the connection, of any size; return what they mean, in order."""
        events: list[Event] = []
        if not data:
            return events
        self._heard = now
        position, end = 0, len(data)
        while position < end and self.broken is None:
            if self._body_left:
                take = min(self._body_left, end - position)
                if self._body_known:
                    piece = data if take == end else data[position : position + take]
                    self._deliver(events, piece)
                position += take
                self._body_left -= take
                if not self._body_left and self._body_finishes:
                    self._finished(events, self._body_stream)
                continue
            if self._partial or end - position < HEADER.size:
                take = min(HEADER.size - len(self._partial), end - position)
                self._partial += data[position : position + take]
                position += take
                if len(self._partial) == HEADER.size:
                    header, self._partial = HEADER.unpack(self._partial), b""
                    self._header(events, now, *header)
                continue
            header = HEADER.unpack_from(data, position)
            position += HEADER.size
            self._header(events, now, *header)
        if len(self._control) > _MAX_CONTROL and self.broken is None:
            self._break(events, "the peer does not read the answers that it causes")
        return events

    def _header(
        self,
        events: list[Event],
        now: float,
        version: int,
        kind: int,
        flags: int,
        stream_id: int,
        length: int,
    ) -> None:
        if version != 0:
            self._break(events, f"yamux version {version}")
        elif kind in (DATA, WINDOW_UPDATE):
            self._stream_header(events, now, kind, flags, stream_id, length)
        elif kind == PING:
            self._pinged(now, flags, length)
        elif kind == GO_AWAY:
            self._gone = True
            events.append(GoneAway(length))
        else:
            self._break(events, f"yamux frame type {kind}")

    def _stream_header(
        self, events: list[Event], now: float, kind: int, flags: int, stream_id: int, length: int
    ) -> None:
        if flags & SYN and not self._peer_opens(events, now, stream_id):
            if kind == DATA and self.broken is None:
                self._expect_body(stream_id, length, known=False, finishes=False)
            return
        stream = self._streams.get(stream_id)
        if stream is not None and flags & ACK:
            self._answer(stream)
            self._allow_open(events)
        if kind == DATA:
            if stream is not None and not self._charge(events, stream_id, stream, length):
                stream = None
                if self.broken is not None:
                    return
            finishes = bool(flags & FIN) and not flags & RST
            self._expect_body(stream_id, length, known=stream is not None, finishes=finishes and length > 0)
            if flags & RST:
                self._body_known = False
            elif finishes and not length:
                self._finished(events, stream_id)
        elif stream is not None:
            if length:
                self._granted(events, stream_id, stream, length)
            if flags & FIN and not flags & RST:
                self._finished(events, stream_id)
        if flags & RST and stream is not None and stream_id in self._streams:
            lingered = stream.state is _State.LINGERING
            self._forget(stream_id)
            self._allow_open(events)
            if not lingered:
                events.append(Reset(stream_id, "reset by the peer"))

    def _expect_body(self, stream_id: int, length: int, *, known: bool, finishes: bool) -> None:
        self._body_left, self._body_stream = length, stream_id
        self._body_known, self._body_finishes = known, finishes

    def _peer_opens(self, events: list[Event], now: float, stream_id: int) -> bool:
        if stream_id == 0 or stream_id % 2 != self._peer_parity or stream_id <= self._last_peer_id:
            # ids grow; one that was used before, or is ours, cannot be told apart from a stream that is gone
            self._break(events, f"stream id {stream_id} cannot be opened by the peer")
            return False
        self._last_peer_id = stream_id
        options = self._options
        if self._gone or self._inbound >= options.max_inbound or self._unaccepted >= options.backlog:
            self._refusals += 1
            if self._refusals > _MAX_REFUSALS:
                self._break(events, "streams opened without end")
            else:
                self._control.append(HEADER.pack(0, WINDOW_UPDATE, RST, stream_id, 0))
            return False
        self._refusals = 0
        self._streams[stream_id] = _Stream(True, now)
        self._inbound += 1
        self._unaccepted += 1
        events.append(Opened(stream_id))
        return True

    def _charge(self, events: list[Event], stream_id: int, stream: _Stream, length: int) -> bool:
        """Whether a body of `length` may come: within the window, wanted, and within the memory bound."""
        if length > stream.receive_window:
            self._break(
                events, f"stream {stream_id}: {length} bytes into a window of {stream.receive_window}"
            )
            return False
        stream.receive_window -= length
        if not length:
            return True
        if stream.state is _State.LINGERING:
            self.reset(stream_id)
            return False
        if stream.state is _State.REMOTE_FINISHED:
            self.reset(stream_id)
            events.append(Reset(stream_id, "data after the end"))
            return False
        if self.unread + length > self._options.max_unread:
            self.reset(stream_id)
            events.append(Reset(stream_id, "too much unread data on this connection"))
            return False
        return True

    def _deliver(self, events: list[Event], piece: bytes) -> None:
        stream = self._streams.get(self._body_stream)
        if stream is None:
            return  # it was reset since its header came
        if stream.state is _State.LINGERING:
            self.reset(self._body_stream)
        else:
            self.unread += len(piece)
            events.append(Data(self._body_stream, piece))

    def _granted(self, events: list[Event], stream_id: int, stream: _Stream, length: int) -> None:
        stream.send_window = min(stream.send_window + length, _MAX_SEND_WINDOW)
        if stream.starved and stream.state is not _State.LINGERING:
            stream.starved = False
            events.append(Writable(stream_id))

    def _finished(self, events: list[Event], stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is None or stream.state is _State.REMOTE_FINISHED:
            return
        if stream.state is _State.OPEN:
            stream.state = _State.REMOTE_FINISHED
            events.append(Finished(stream_id))
            return
        lingered = stream.state is _State.LINGERING
        self._forget(stream_id)
        self._allow_open(events)
        if not lingered:
            events.append(Finished(stream_id))

    def _pinged(self, now: float, flags: int, opaque: int) -> None:
        if flags & SYN:
            if len(self._pongs) < _MAX_PONGS:
                self._pongs.append(opaque)
        elif flags & ACK and opaque == self._ping and self._ping_sent is not None:
            sample = now - self._ping_sent
            self.rtt = sample if self.rtt is None else self.rtt + (sample - self.rtt) / 8
            self._ping_sent = None

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def _first_grant(self, stream: _Stream) -> int:
        # half of the budget is kept for windows that have shown that they need it
        wanted = self._options.initial_window - SPEC_WINDOW
        if self._budget - wanted < self._options.window_budget // 2:
            return 0
        grant = self._extend(stream, wanted)
        stream.receive_window += grant
        return grant

    def _extend(self, stream: _Stream, wanted: int) -> int:
        grant = max(0, min(wanted, self._budget))
        self._budget -= grant
        stream.extra += grant
        stream.target += grant
        return grant

    def _answer(self, stream: _Stream) -> None:
        if stream.unanswered:
            stream.unanswered = False
            if stream.inbound:
                self._unaccepted -= 1
            else:
                self._unacknowledged -= 1

    def _forget(self, stream_id: int) -> None:
        stream = self._streams.pop(stream_id)
        self._answer(stream)
        self._inbound -= stream.inbound
        self._budget += stream.extra
        self._grants.pop(stream_id, None)
        self._lingering.pop(stream_id, None)

    def _allow_open(self, events: list[Event]) -> None:
        if self._open_refused and self._unacknowledged < self._options.max_unacknowledged:
            self._open_refused = False
            events.append(OpenAllowed())

    def _break(self, events: list[Event], reason: str) -> None:
        self._gone = True
        self._control.append(HEADER.pack(0, GO_AWAY, 0, 0, PROTOCOL_ERROR))
        self.broken = reason
        events.append(Broken(reason))

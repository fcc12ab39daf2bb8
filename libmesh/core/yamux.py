"""The yamux multiplexer as a machine: frames, windows and stream states, no I/O and no clock.

Theory of operation
===================
The driver feeds received bytes to `receive` and acts on the events. It asks `data` for the header of each DATA frame
that it is about to send and `take_control` for all that the machine itself has to say, and puts control ahead of data.
Payload never passes through on its way out. What must stay behind a stream's data (FIN) the call returns that causes it.

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

Windows are in `yamux_streams.py`, pings in `keepalive.py`, frames, options and events in `yamux_frames.py`.
"""

from __future__ import annotations

from libmesh.core.keepalive import Keepalive
from libmesh.core.yamux_control import ControlQueue
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
from libmesh.core.yamux_parser import FrameParser, Header
from libmesh.core.yamux_streams import MAY_SEND, State, StreamState, StreamTable, widen

_MAX_STREAM_ID = 2**32 - 1
_MAX_REFUSALS = 1024  # streams refused in a row before the peer is cut off; go-yamux refuses for ever


class Yamux:
    """One side of a yamux connection. Times are seconds of any one monotonic clock.

    Attributes:
        broken: why the connection is over, or `None`. Afterwards every call is harmless and does nothing.
        table: the streams that are known, lingering ones included; to look at only.
        keepalive: pings, and when the peer was heard last.
    """

    def __init__(self, *, initiator: bool, now: float, options: Options | None = None) -> None:
        self._options = options or Options()
        self.table = StreamTable(self._options)
        self._streams = self.table.states
        self._windows = self.table.windows
        self._next_id = 1 if initiator else 2
        self._peer_parity = 0 if initiator else 1
        self._open_refused = self._gone = self._peer_gone = False
        self._refusals = 0
        self.broken: str | None = None
        self._control = ControlQueue()
        self._parser = FrameParser()
        self._body_left = self._body_stream = 0
        self._body_known = self._body_finishes = False  # known: of a live stream; otherwise it is skipped
        self.keepalive = Keepalive(
            interval=self._options.ping_interval, timeout=self._options.ping_timeout, now=now
        )

    # ---- streams, from this side ------------------------------------------------------------------------------

    @property
    def closing(self) -> bool:
        """True once no stream can be opened any more."""
        return self._gone or self._peer_gone or self.broken is not None or self._next_id > _MAX_STREAM_ID

    def open(self, now: float) -> int | None:
        """Open a stream and return its id; `None` while too many are unacknowledged (wait for `OpenAllowed`).

        SYN is among the control frames at once, so it precedes any data. Must not be called when `closing`.
        """
        if self.table.unacknowledged >= self._options.max_unacknowledged:
            self._open_refused = True
            return None
        stream_id = self._next_id
        self._next_id += 2
        stream = self.table.add(stream_id, now, inbound=False)
        self._control.stream(SYN, stream_id, self._windows.first_grant(stream))
        return stream_id

    def accept(self, stream_id: int) -> None:
        """Acknowledge an inbound stream. Nothing happens if it is gone already."""
        stream = self._streams.get(stream_id)
        if stream is None or not stream.inbound or not stream.unanswered:
            return
        self.table.answer(stream)
        self._control.stream(ACK, stream_id, self._windows.first_grant(stream))

    def data(self, stream_id: int, size: int, *, before: int = 0) -> tuple[bytes, int]:
        """The header of a DATA frame for the next bytes of a stream, and how many (1 to `size`) it covers.

        It also covers `before` bytes of a frame that has not left, whose place it takes. `(b"", 0)` when the window is
        shut, and then `Writable` follows; also when the stream cannot send at all. What is given must be sent.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.state not in MAY_SEND:
            return b"", 0
        count = min(size, stream.send_window, self._options.max_frame)
        if count <= 0:
            stream.starved = True
            return b"", 0
        stream.send_window -= count
        return HEADER.pack(0, DATA, 0, stream_id, before + count), count

    def writable(self, stream_id: int) -> bool:
        """Whether `data` would give anything; if not, and the stream lives, `Writable` follows."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return False
        if stream.send_window > 0:
            return True
        stream.starved = True
        return False

    def finish(self, stream_id: int, *, linger_from: float | None = None) -> bytes:
        """End the sending direction; return the FIN frame, to be sent after the stream's data, or nothing.

        With `linger_from`, a time, the stream is reset if the peer has not finished `Options.linger` later.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return b""
        if linger_from is not None and stream.state in (State.OPEN, State.LOCAL_FINISHED):
            self.table.linger(stream_id, linger_from)
        if stream.state is State.OPEN:
            stream.state = State.LOCAL_FINISHED
        elif stream.state is State.REMOTE_FINISHED:
            self._forget(stream_id)
        else:
            return b""
        return HEADER.pack(0, WINDOW_UPDATE, FIN, stream_id, 0)

    def abandon(self, stream_id: int, *, unread: bool, now: float) -> bytes:
        """This side is done with a stream in both directions. Return the frames to send after its data, if any.

        With `unread` data left the peer is told by RST behind the FIN, as TCP does: it may be waiting for a window
        that would never open.
        """
        frames = self.finish(stream_id)
        stream = self._streams.get(stream_id)
        if stream is None or stream.state is State.LINGERING:
            return frames
        if unread:
            self._forget(stream_id)
            return frames + HEADER.pack(0, WINDOW_UPDATE, RST, stream_id, 0)
        if stream.inbound:
            self.table.answer(stream)  # an outbound one still counts until the peer has seen it
        stream.state = State.LINGERING
        self.table.linger(stream_id, now)
        return frames

    def reset(self, stream_id: int) -> None:
        """End a stream abruptly. Harmless when it is gone."""
        if stream_id in self._streams:
            self._forget(stream_id)
            self._control.stream(RST, stream_id)

    def consumed(self, stream_id: int, count: int, now: float) -> bool:
        """`count` bytes of `Data` were read or dropped. May open the peer's window, also of a larger size; true if so."""
        self._windows.unread -= count
        stream = self._streams.get(stream_id)
        if stream is None or stream.state is State.REMOTE_FINISHED:
            return False
        if grant := self._windows.consumed(stream, count, now, self.keepalive.least_rtt):
            self._control.grant(stream_id, grant)
        return grant > 0

    # ---- the connection ---------------------------------------------------------------------------------------

    @property
    def rtt(self) -> float | None:
        """Smoothed round-trip time in seconds, `None` until the first answer to a ping."""
        return self.keepalive.rtt

    @property
    def least_rtt(self) -> float | None:
        """The shortest one seen: the path itself, without what waits in buffers."""
        return self.keepalive.least_rtt

    @property
    def has_control(self) -> bool:
        """Whether `take_control` has anything."""
        return bool(self._control)

    def take_control(self) -> bytes:
        """All frames that the machine has to send by itself, and forget them. To be sent ahead of waiting data."""
        return self._control.take()

    def shutdown(self, code: int = NORMAL) -> None:
        """Say that this side goes away. Streams that are open go on; none can be opened."""
        if not self._gone and self.broken is None:
            self._gone = True
            self._control.go_away(code)

    def alive(self, now: float) -> None:
        """A sign of life other than frames: part of a record, or that the peer's TCP, which was full, took more."""
        self.keepalive.heard(now)

    def deadline(self) -> float:
        """When `tick` is due. Infinite after `Broken`."""
        if self.broken is not None:
            return float("inf")
        return min(self.keepalive.deadline(), self.table.next_expiry())

    def tick(self, now: float) -> list[Event]:
        """Do what is due at `now`: ping, find the peer dead, end lingering streams. Moves `deadline` on."""
        events: list[Event] = []
        if self.broken is not None:
            return events
        if (silence := self.keepalive.silence(now)) is not None:
            self._break(events, f"no sign of life for {silence:.1f} s")
            return events
        for stream_id in self.table.expired(now):
            if self._streams[stream_id].state is not State.LINGERING:
                events.append(Reset(stream_id, "the peer did not finish in time"))
            self.reset(stream_id)
        self._allow_open(events)
        if (opaque := self.keepalive.tick(now)) is not None:
            self._control.ping(opaque)
        return events

    # ---- what the peer sends ----------------------------------------------------------------------------------

    def receive(self, data: bytes | memoryview, now: float) -> list[Event]:
        """Take the next bytes of the connection, of any size; return what they mean, in order. Keeps no view."""
        events: list[Event] = []
        if not data or self.broken is not None:
            return events
        self.keepalive.heard(now)
        if (whole := self._parser.whole(data)) is not None and self.table.takes(whole):
            return [Data(whole[3], data[HEADER.size :])]  # a message in a record of its own, as most are
        for item in self._parser.feed(data):
            if isinstance(item, tuple):
                self._header(events, now, item)
            else:
                self._body(events, item)
            if self.broken is not None:
                return events
        if self._control.overfull:
            self._break(events, "the peer does not read the answers that it causes")
        return events

    def _header(self, events: list[Event], now: float, header: Header) -> None:
        version, kind, flags, stream_id, length = header
        if version != 0:
            self._break(events, f"yamux version {version}")
        elif kind in (DATA, WINDOW_UPDATE):
            self._stream_header(events, now, kind, flags, stream_id, length)
        elif kind == PING and flags & SYN:
            self._control.pong(length)
        elif kind == PING:
            self.keepalive.answered(length, now)
        elif kind == GO_AWAY:
            self._peer_gone = True  # it takes no streams; those that it opens are welcome
            events.append(GoneAway(length))
        else:
            self._break(events, f"yamux frame type {kind}")

    def _stream_header(
        self, events: list[Event], now: float, kind: int, flags: int, stream_id: int, length: int
    ) -> None:
        if flags & SYN and not self._peer_opens(events, now, stream_id):
            if kind == DATA and self.broken is None:
                self._body_left, self._body_known, self._body_finishes = length, False, False
            return
        stream = self._streams.get(stream_id)
        if stream is not None and flags & ACK:
            self.table.answer(stream)
            self._allow_open(events)
        if kind == DATA:
            if stream is not None and not self._charge(events, stream_id, stream, length):
                stream = None
                if self.broken is not None:
                    return
                self._allow_open(events)
            finishes = bool(flags & FIN) and not flags & RST
            self._body_left, self._body_stream = length, stream_id
            self._body_known = stream is not None and not flags & RST
            self._body_finishes = finishes and length > 0
            if finishes and not length:
                self._finished(events, stream_id)
        elif stream is not None:
            if length and widen(stream, length) and stream.state is not State.LINGERING:
                events.append(Writable(stream_id))
            if flags & FIN and not flags & RST:
                self._finished(events, stream_id)
        if flags & RST and stream is not None and stream_id in self._streams:
            self._forget(stream_id)
            self._allow_open(events)
            if stream.state is not State.LINGERING:
                events.append(Reset(stream_id, "reset by the peer"))

    def _peer_opens(self, events: list[Event], now: float, stream_id: int) -> bool:
        # Smaller than the last one is fine: go-yamux numbers its streams before it queues for the socket.
        if stream_id == 0 or stream_id % 2 != self._peer_parity or stream_id in self._streams:
            self._break(events, f"stream id {stream_id} cannot be opened by the peer")
            return False
        options, table = self._options, self.table
        if self._gone or table.inbound >= options.max_inbound or table.unaccepted >= options.backlog:
            self._refusals += 1
            if self._refusals > _MAX_REFUSALS:
                self._break(events, "streams opened without end")
            else:
                self._control.stream(RST, stream_id)
            return False
        self._refusals = 0
        table.add(stream_id, now, inbound=True)
        events.append(Opened(stream_id))
        return True

    def _charge(self, events: list[Event], stream_id: int, stream: StreamState, length: int) -> bool:
        """Whether a body of `length` may come: within the window, wanted, and within the memory bound."""
        if length > stream.receive_window:
            self._break(events, f"stream {stream_id}: {length} bytes, window {stream.receive_window}")
            return False
        stream.receive_window -= length
        if not length:
            return True
        if stream.state is State.LINGERING:
            self.reset(stream_id)
            return False
        if stream.state is State.REMOTE_FINISHED:
            self.reset(stream_id)
            events.append(Reset(stream_id, "data after the end"))
            return False
        if not self._windows.fits(length):
            self.reset(stream_id)
            events.append(Reset(stream_id, "too much unread data on this connection"))
            return False
        return True

    def _body(self, events: list[Event], piece: bytes | memoryview) -> None:
        stream_id = self._body_stream
        self._body_left -= len(piece)
        stream = self._streams.get(stream_id) if self._body_known else None
        if stream is not None and stream.state is State.LINGERING:
            self.reset(stream_id)  # closed here since the header came
            self._allow_open(events)
        elif stream is not None:
            self._windows.unread += len(piece)
            events.append(Data(stream_id, piece))
        if not self._body_left and self._body_finishes:
            self._finished(events, stream_id)

    def _finished(self, events: list[Event], stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is None or stream.state is State.REMOTE_FINISHED:
            return
        if stream.state is State.OPEN:
            stream.state = State.REMOTE_FINISHED
            events.append(Finished(stream_id))
            return
        self._forget(stream_id)
        self._allow_open(events)
        if stream.state is not State.LINGERING:
            events.append(Finished(stream_id))

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def _forget(self, stream_id: int) -> None:
        self.table.forget(stream_id)
        self._control.drop_grants(stream_id)

    def _allow_open(self, events: list[Event]) -> None:
        if self._open_refused and self.table.unacknowledged < self._options.max_unacknowledged:
            self._open_refused = False
            events.append(OpenAllowed())

    def _break(self, events: list[Event], reason: str) -> None:
        self._gone = True
        self._control.go_away(PROTOCOL_ERROR)
        self.broken = reason
        events.append(Broken(reason))

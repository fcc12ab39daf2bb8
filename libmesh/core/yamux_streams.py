"""What the yamux machine knows of its streams, and how large their windows are allowed to be.

Each stream may have 256 KiB under way from the start (specification); `initial_window` may add to that when the stream is
opened. A window that holds back its sender is doubled, up to `max_window`: the sign is that the reader consumed half of
it within four of the path's round trips of the last grant (the rule of go-yamux), or within 10 ms where the path is
shorter than what busy schedulers add to it. A larger window would add nothing to the throughput, and only let a slow
reader's data pile up here instead of where it comes from. All grants beyond 256 KiB a stream come out of `window_budget`;
when it is spent, windows stop growing.
"""

from __future__ import annotations

from enum import Enum

from libmesh.core.yamux_frames import SPEC_WINDOW, Options
from libmesh.core.yamux_parser import Header

MAX_SEND_WINDOW = 2**32 - 1
"""What a peer's grants may add up to; more is not believed."""

_SHORTEST = 0.01  # seconds; what the schedulers of two busy machines can add to a round trip


class State(Enum):
    """See the table in `yamux.py`. A stream that is forgotten has none."""

    OPEN = 0
    LOCAL_FINISHED = 1
    REMOTE_FINISHED = 2
    LINGERING = 3


MAY_SEND = (State.OPEN, State.REMOTE_FINISHED)
MAY_RECEIVE = (State.OPEN, State.LOCAL_FINISHED)


class StreamState:
    """One stream.

    Attributes:
        inbound: the peer opened it.
        unanswered: there was no ACK yet, from whichever side owes it.
        send_window: bytes that we may still send.
        starved: somebody wanted to send and could not.
        receive_window: bytes that the peer may still send.
        target: the peer's window when all has been read.
        extra: what of `target` came out of the budget.
        consumed: bytes read and not granted again.
        granted_at: when we last granted.
    """

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
        self.state = State.OPEN
        self.inbound = inbound
        self.unanswered = True
        self.send_window = SPEC_WINDOW
        self.starved = False
        self.receive_window = SPEC_WINDOW
        self.target = SPEC_WINDOW
        self.extra = 0
        self.consumed = 0
        self.granted_at = now


class Windows:
    """The peer's windows over all streams of a connection.

    Attributes:
        unread: bytes delivered and not yet consumed.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._budget = options.window_budget
        self.unread = 0

    def first_grant(self, stream: StreamState) -> int:
        """What to add to the window of a new stream."""
        wanted = self._options.initial_window - SPEC_WINDOW
        if not wanted or self._budget - wanted < self._options.window_budget // 2:
            return 0  # half of the budget is kept for windows that have shown that they need it
        grant = self._extend(stream, wanted)
        stream.receive_window += grant
        return grant

    def consumed(self, stream: StreamState, count: int, now: float, least_rtt: float | None) -> int:
        """`count` bytes of a stream were read; what to add to its window now, usually 0."""
        stream.consumed += count
        if stream.consumed * 2 < stream.target:
            return 0
        grant = stream.consumed
        if now - stream.granted_at < max(_SHORTEST, 4 * (least_rtt or 0.0)):
            grant += self._extend(stream, min(stream.target, self._options.max_window - stream.target))
        stream.consumed = 0
        stream.granted_at = now
        stream.receive_window += grant
        return grant

    def fits(self, length: int) -> bool:
        """Whether so many more unread bytes are within the bound."""
        return self.unread + length <= self._options.max_unread

    def release(self, stream: StreamState) -> None:
        """A stream is forgotten."""
        self._budget += stream.extra

    def _extend(self, stream: StreamState, wanted: int) -> int:
        grant = max(0, min(wanted, self._budget))
        self._budget -= grant
        stream.extra += grant
        stream.target += grant
        return grant


def widen(stream: StreamState, length: int) -> bool:
    """The peer granted `length`; whether somebody waits for that."""
    stream.send_window = min(stream.send_window + length, MAX_SEND_WINDOW)
    waited, stream.starved = stream.starved, False
    return waited


class StreamTable:
    """The streams of a connection that are not forgotten, and the counts that bounds are put on.

    Attributes:
        states: by stream id.
        windows: how much the peer may send.
        inbound: how many of the streams the peer opened.
        unaccepted: how many of these we have not acknowledged.
        unacknowledged: how many of ours the peer has not.
    """

    def __init__(self, options: Options) -> None:
        self._linger = options.linger
        self._lingering: dict[int, float] = {}  # in the order of time: all linger equally long
        self.states: dict[int, StreamState] = {}
        self.windows = Windows(options)
        self.inbound = 0
        self.unaccepted = 0
        self.unacknowledged = 0

    def add(self, stream_id: int, now: float, *, inbound: bool) -> StreamState:
        """A new stream."""
        stream = self.states[stream_id] = StreamState(inbound, now)
        if inbound:
            self.inbound += 1
            self.unaccepted += 1
        else:
            self.unacknowledged += 1
        return stream

    def takes(self, header: Header) -> bool:
        """Charge a whole DATA frame, if nothing about it or its stream is out of the ordinary; if not, do nothing."""
        version, _, flags, stream_id, length = header
        stream = self.states.get(stream_id)
        if version or flags or stream is None or length > stream.receive_window:
            return False
        if stream.state not in MAY_RECEIVE or not self.windows.fits(length):
            return False
        stream.receive_window -= length
        self.windows.unread += length
        return True

    def answer(self, stream: StreamState) -> None:
        """The ACK of a stream came or was sent. Harmless to repeat."""
        if stream.unanswered:
            stream.unanswered = False
            if stream.inbound:
                self.unaccepted -= 1
            else:
                self.unacknowledged -= 1

    def forget(self, stream_id: int) -> None:
        """A stream is over."""
        stream = self.states.pop(stream_id)
        self.answer(stream)
        self.inbound -= stream.inbound
        self.windows.release(stream)
        self._lingering.pop(stream_id, None)

    def linger(self, stream_id: int, now: float) -> None:
        """Give the peer until `Options.linger` from now to finish a stream."""
        self._lingering.setdefault(stream_id, now + self._linger)

    def next_expiry(self) -> float:
        """When the next stream has lingered long enough; infinite if none lingers."""
        return next(iter(self._lingering.values()), float("inf"))

    def expired(self, now: float) -> list[int]:
        """The streams that have lingered long enough. They must be forgotten."""
        ids = []
        for stream_id, due in self._lingering.items():
            if due > now:
                break
            ids.append(stream_id)
        return ids

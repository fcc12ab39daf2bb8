"""Two yamux machines joined by a link that delivers in any pieces."""

from __future__ import annotations

from collections import defaultdict

from libmesh.core.yamux import Yamux
from libmesh.core.yamux_frames import Data, Event, Finished, Opened, Options, Reset

Pieces = list[int]


class Side:
    """A machine and what an application over it has seen."""

    def __init__(self, initiator: bool, options: Options | None = None) -> None:
        self.machine = Yamux(initiator=initiator, now=0.0, options=options)
        self.outgoing = bytearray()
        self.events: list[Event] = []
        self.got: dict[int, bytearray] = defaultdict(bytearray)
        self.ended: set[int] = set()
        self.reset: set[int] = set()
        self.opened: list[int] = []

    def flush(self) -> None:
        """Move control frames into the link."""
        self.outgoing += self.machine.take_control()

    def send(self, stream_id: int, data: bytes) -> int:
        """Put as much of `data` into the link as the window allows."""
        self.flush()
        sent = 0
        while sent < len(data):
            header, count = self.machine.data(stream_id, len(data) - sent)
            if not count:
                break
            self.outgoing += header + data[sent : sent + count]
            sent += count
        return sent

    def finish(self, stream_id: int) -> None:
        self.flush()
        self.outgoing += self.machine.finish(stream_id)

    def abandon(self, stream_id: int, *, unread: bool = False, now: float = 0.0) -> None:
        self.flush()
        self.outgoing += self.machine.abandon(stream_id, unread=unread, now=now)

    def take(self, data: bytes, now: float = 0.0) -> list[Event]:
        """Receive, and keep what an application would."""
        events = self.machine.receive(data, now)
        self.events += events
        for event in events:
            match event:
                case Data(stream_id, piece):
                    self.got[stream_id] += piece
                case Finished(stream_id):
                    self.ended.add(stream_id)
                case Reset(stream_id, _):
                    self.reset.add(stream_id)
                case Opened(stream_id):
                    self.opened.append(stream_id)
                case _:
                    pass
        return events


class Pair:
    """Two sides. `pump` carries everything across."""

    def __init__(self, options: Options | None = None, far_options: Options | None = None) -> None:
        self.a = Side(True, options)
        self.b = Side(False, far_options or options)

    def carry(
        self, sender: Side, receiver: Side, now: float = 0.0, pieces: Pieces | None = None
    ) -> list[Event]:
        """Deliver all that `sender` has, cut as `pieces` says (repeated), or whole."""
        sender.flush()
        data, sender.outgoing = bytes(sender.outgoing), bytearray()
        events: list[Event] = []
        position, turn = 0, 0
        while position < len(data):
            size = pieces[turn % len(pieces)] if pieces else len(data)
            events += receiver.take(data[position : position + size], now)
            position += size
            turn += 1
        return events

    def pump(self, now: float = 0.0, pieces: Pieces | None = None) -> None:
        """Carry in both directions until neither has anything."""
        while True:
            self.a.flush()
            self.b.flush()
            if not self.a.outgoing and not self.b.outgoing:
                return
            self.carry(self.a, self.b, now, pieces)
            self.carry(self.b, self.a, now, pieces)

    def open(self, now: float = 0.0) -> int:
        """A stream from a to b, accepted."""
        stream_id = self.a.machine.open(now)
        assert stream_id is not None
        self.pump(now)
        self.b.machine.accept(stream_id)
        self.pump(now)
        return stream_id

"""The vocabulary of the yamux machine: frame layout, options, events. The rules are in `yamux.py`.

Source: the yamux specification (hashicorp/yamux `spec.md`, and libp2p/specs `yamux`). A frame is a header of twelve
bytes, big endian, and for DATA a body:

    version u8 = 0 | type u8 | flags u16 | stream id u32 | length u32

    DATA 0           length: bytes of body          WINDOW_UPDATE 1   length: bytes added to the peer's send window
    PING 2           length: opaque, echoed         GO_AWAY 3         length: 0 normal, 1 protocol error, 2 internal
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

KIB = 1024
MIB = 1024 * KIB

SPEC_WINDOW = 256 * KIB
"""Bytes that either side may send on a new stream before any grant. Fixed by the specification."""

HEADER = Struct("!BBHII")
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8

NORMAL, PROTOCOL_ERROR, INTERNAL_ERROR = range(3)
"""Codes of GO_AWAY."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Bounds and times. The defaults suit a laptop with a few hundred connections.

    Attributes:
        initial_window: bytes a peer may have under way on a new stream; at least 256 KiB, which is in the
            specification, and is what TCP itself takes four round trips to reach.
        max_window: largest window of one stream; 16 MiB fills 1.3 Gbit/s at 100 ms. go-yamux has the same.
        window_budget: sum of all grants beyond 256 KiB a stream. When spent, windows stay as they are.
        max_unread: received bytes that nobody has read yet, over all streams. The stream that would pass it is reset.
        max_inbound: streams that the peer may have open. More are refused with RST.
        backlog: inbound streams not yet accepted. More are refused with RST. The specification names 256.
        max_unacknowledged: own streams that the peer has not yet acknowledged. `open` waits for the next. (idem)
        max_frame: largest DATA body that we send. Larger costs other streams delay, smaller costs headers.
        ping_interval: seconds between pings. They measure the round trip and find dead peers.
        ping_timeout: seconds without any sign of life after a ping until the connection is given up.
        linger: seconds that a peer has to finish a stream that this side is done with, before it is reset.
    """

    initial_window: int = SPEC_WINDOW
    max_window: int = 16 * MIB
    window_budget: int = 128 * MIB
    max_unread: int = 256 * MIB
    max_inbound: int = 16384
    backlog: int = 256
    max_unacknowledged: int = 256
    max_frame: int = 4 * 65519
    ping_interval: float = 10.0
    ping_timeout: float = 5.0
    linger: float = 30.0

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the field, when a value cannot work."""
        if not SPEC_WINDOW <= self.initial_window <= self.max_window < 2**31:
            raise ValueError(f"initial_window={self.initial_window}: between 256 KiB and max_window")
        for name in ("max_inbound", "backlog", "max_unacknowledged", "max_frame", "max_unread"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        for name in ("ping_interval", "ping_timeout", "linger"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: greater than 0")


# NamedTuples, not frozen dataclasses: one is made for each piece of data received, at a third of the cost.


class Opened(NamedTuple):
    """The peer opened a stream. Answer with `accept` or `reset`."""

    stream: int


class Data(NamedTuple):
    """Bytes of a stream, in order, never empty. Report them with `consumed` once read or dropped."""

    stream: int
    data: bytes | memoryview


class Finished(NamedTuple):
    """The peer will send no more on a stream."""

    stream: int


class Reset(NamedTuple):
    """A stream ended abruptly; the machine has forgotten it."""

    stream: int
    reason: str


class Writable(NamedTuple):
    """A stream for which `data` had nothing to give may send again."""

    stream: int


class OpenAllowed(NamedTuple):
    """`open` had answered `None`; it may be asked again."""


class GoneAway(NamedTuple):
    """The peer will accept no more streams. Those that are open go on."""

    code: int


class Broken(NamedTuple):
    """The connection is over. Send what `take_control` has, if that is possible at once, and close."""

    reason: str


Event = Opened | Data | Finished | Reset | Writable | OpenAllowed | GoneAway | Broken

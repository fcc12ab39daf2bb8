"""A yamux machine to be tried frame by frame."""

from __future__ import annotations

from libmesh.core.yamux_frames import (
    ACK,
    DATA,
    HEADER,
    PING,
    SPEC_WINDOW,
    Options,
)
from tests.core.yamux_pair import Side

PLAIN = Options(initial_window=SPEC_WINDOW, ping_interval=1e9, ping_timeout=1e9)


def frame(kind: int, flags: int, stream_id: int, length: int, body: bytes = b"") -> bytes:
    return HEADER.pack(0, kind, flags, stream_id, length) + body


def settle(side: Side) -> None:
    """Answer the pings of the first seconds."""
    for start in (0.0, 1.0, 2.0):
        side.machine.tick(start)
        opaque = frames_of(side.machine.take_control())[-1][3]
        side.take(frame(PING, ACK, 0, opaque), now=start + 0.1)


def frames_of(data: bytes) -> list[tuple[int, int, int, int]]:
    """Type, flags, stream and length of each frame."""
    found, position = [], 0
    while position < len(data):
        _, kind, flags, stream_id, length = HEADER.unpack_from(data, position)
        found.append((kind, flags, stream_id, length))
        position += HEADER.size + (length if kind == DATA else 0)
    return found


# ---- opening ----------------------------------------------------------------------------------------------------

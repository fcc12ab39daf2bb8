"""llama.cpp's RPC protocol, version 7, as bytes; and what the two ends of the tunnel say to each other besides.

A request is `u8 command | u64 size | payload`, an answer `u64 size | payload`, all little-endian. Answers come in the
order of the requests, and only some commands have one. Sizes are those of ggml-rpc.cpp's packed structures.

Between the ends everything is `u8 kind | u64 size | payload`, in both directions. From the host's end a kind is a command
of the protocol or one of `Link`; from the worker's end it is one of `Reply`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum

MAJOR = 7
"""The protocol that these ends understand. Numbers of commands moved between earlier versions."""

TENSOR = 296
"""Bytes of an `rpc_tensor`."""

SET_HEADER = TENSOR + 9
"""Bytes of a SET_TENSOR before its data: the tensor, `u8 cache_flag`, `u64 offset`."""

WHOLE = 64 * 1024
"""Frames up to this size are handed on whole; from larger ones only those whose kind demands it."""

MAX_GRAPH = 64 << 20
"""A larger GRAPH_COMPUTE is refused. One layer takes about 13 KB."""

MAX_UPLOAD = 1 << 40

HELLO_ANSWER = struct.Struct("<BBBx24s")
_HEAD = struct.Struct("<BQ")
_SIZE = struct.Struct("<Q")


class Command(IntEnum):
    """`rpc_cmd` of ggml-rpc.cpp, protocol 7."""

    ALLOC_BUFFER = 0
    GET_ALIGNMENT = 1
    GET_MAX_SIZE = 2
    BUFFER_GET_BASE = 3
    FREE_BUFFER = 4
    BUFFER_CLEAR = 5
    SET_TENSOR = 6
    SET_TENSOR_HASH = 7
    GET_TENSOR = 8
    COPY_TENSOR = 9
    GRAPH_COMPUTE = 10
    GET_DEVICE_MEMORY = 11
    INIT_TENSOR = 12
    GET_ALLOC_SIZE = 13
    HELLO = 14
    DEVICE_COUNT = 15
    GRAPH_RECOMPUTE = 16
    MEMSET_TENSOR = 17


class Link(IntEnum):
    """What the host's end says besides the protocol's commands."""

    OPEN = 0x80  # protobuf SessionRequest; the first frame, and never again
    REFERENCE = 0x81  # a SET_TENSOR whose data the worker has: header, u32 part, u64 offset, u64 size
    PASS = 0x82  # a GET_TENSOR whose answer also goes to the next worker: u32 ticket there, the payload
    AHEAD = (
        0x83  # requests to be carried out once their hole is filled: `AHEAD`, then frames; a GET_TENSOR last
    )
    FILL = 0x84  # what belongs into that hole, if it has not come yet: u32 ticket, the data
    DROP = 0x85  # forget what was sent ahead, if it has not been carried out: u32 ticket
    PUSH_OPEN = 0x86  # from another worker: the first frame of a stream that fills holes; the session's token
    PUSH = 0x87  # on such a stream: u32 ticket, the data
    REACH = 0x88  # from another worker, of the fork: a further connection to this session's server; its token
    PACKED = 0x89  # a GRAPH_COMPUTE: its payload, compressed (`packing.py`)


class Reply(IntEnum):
    """What the worker's end says."""

    OPENED = 0  # protobuf SessionAnswer; the first frame
    ANSWER = (
        1  # rpc-server's answer to the next command that has one; to ALLOC_BUFFER with `u64 base` appended
    )
    LOST = 2  # UTF-8: why the session is over; the last frame
    FORESEEN = 3  # the answer to what was sent ahead: u32 ticket, rpc-server's answer


REQUEST_SIZES: Mapping[int, int] = {
    Command.ALLOC_BUFFER: 12,
    Command.GET_ALIGNMENT: 4,
    Command.GET_MAX_SIZE: 4,
    Command.BUFFER_GET_BASE: 8,
    Command.FREE_BUFFER: 8,
    Command.BUFFER_CLEAR: 9,
    Command.SET_TENSOR_HASH: TENSOR + 16,
    Command.GET_TENSOR: TENSOR + 16,
    Command.COPY_TENSOR: 2 * TENSOR,
    Command.GET_DEVICE_MEMORY: 4,
    Command.INIT_TENSOR: TENSOR,
    Command.GET_ALLOC_SIZE: 4 + 11 * TENSOR,
    Command.HELLO: 24,
    Command.DEVICE_COUNT: 0,
    Command.GRAPH_RECOMPUTE: 4,
    Command.MEMSET_TENSOR: TENSOR + 17,
}
"""Payloads whose size is fixed. SET_TENSOR and GRAPH_COMPUTE are the others."""

ANSWER_SIZES: Mapping[int, int] = {
    Command.ALLOC_BUFFER: 16,
    Command.GET_ALIGNMENT: 8,
    Command.GET_MAX_SIZE: 8,
    Command.BUFFER_GET_BASE: 8,
    Command.SET_TENSOR_HASH: 1,
    Command.COPY_TENSOR: 1,
    Command.GET_DEVICE_MEMORY: 16,
    Command.GET_ALLOC_SIZE: 8,
    Command.HELLO: HELLO_ANSWER.size,
    Command.DEVICE_COUNT: 4,
}
"""Answers whose size is fixed. GET_TENSOR's is what the request asks for; commands that are not here have none."""

AHEAD = struct.Struct("<IIII")
"""Ticket; ticket at the next worker, to which the answer is passed on, or 0; where the hole begins; its size."""

TICKET = struct.Struct("<I")

MAX_AHEAD = 1 << 20
"""Bytes that may be sent ahead at once. Each worker gets some 10 KB a token."""

TOKEN = 16
"""Bytes of a token that lets a worker fill another one's holes."""

REFERENCE = struct.Struct(f"<{SET_HEADER}sIQQ")


class ProtocolError(Exception):
    """The other side broke the protocol. The text says how, without a full stop."""


def frame(kind: int, payload: bytes = b"") -> bytes:
    """`payload` as one frame."""
    return _HEAD.pack(kind, len(payload)) + payload


def frame_head(kind: int, size: int) -> bytes:
    """The first nine bytes of a frame whose payload, `size` bytes, follows."""
    return _HEAD.pack(kind, size)


def answer(payload: bytes) -> bytes:
    """`payload` as rpc-server answers it."""
    return _SIZE.pack(len(payload)) + payload


def answer_head(size: int) -> bytes:
    """The first eight bytes of an answer whose payload, `size` bytes, follows."""
    return _SIZE.pack(size)


def answer_size(command: int, payload: bytes) -> int | None:
    """Bytes of the answer to a request; `None` if it has none."""
    if command == Command.GET_TENSOR:
        return int.from_bytes(payload[TENSOR + 8 : TENSOR + 16], "little")
    return ANSWER_SIZES.get(command)


def check_request(command: int, size: int) -> None:
    """Raise `ProtocolError` unless `size` bytes of payload belong to a request of protocol 7."""
    if command == Command.SET_TENSOR:
        sane = SET_HEADER <= size <= SET_HEADER + MAX_UPLOAD
    elif command == Command.GRAPH_COMPUTE:
        sane = 12 <= size <= MAX_GRAPH
    else:
        sane = REQUEST_SIZES.get(command) == size
    if not sane:
        raise ProtocolError(f"a command {command} of {size} bytes")


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole frame."""

    kind: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class FrameStart:
    """The beginning of a large frame: its `head`, as many bytes as were asked for, and `size` bytes still to come."""

    kind: int
    head: bytes
    size: int


@dataclass(frozen=True, slots=True)
class FramePiece:
    """The next bytes of a large frame. `last` if they are its last."""

    data: bytes
    last: bool


Event = Frame | FrameStart | FramePiece


class FrameParser:
    """Cuts a stream of bytes into frames, in whatever pieces it comes.

    Buffers at most one frame that is to be handed on whole; memory is taken only for what has arrived.

    Args:
        check: called with kind and size of each frame before anything of it is buffered; raises `ProtocolError`.
        streamed: kinds whose frames above `WHOLE` come in pieces, with the length of the head that they start with.
        kinds: whether frames begin with a kind; if not, it is 0.
    """

    def __init__(
        self, check: Callable[[int, int], None], streamed: Mapping[int, int], *, kinds: bool = True
    ) -> None:
        self._check, self._streamed, self._kinds = check, streamed, kinds
        self._buffer = bytearray()
        self._needed = 0  # bytes in the buffer before it is worth another look
        self._left = 0  # bytes to come of a frame that is being handed on in pieces

    @property
    def midway(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._left or self._buffer)

    def feed(self, data: bytes) -> list[Event]:
        """The events that `data` completes. Raises `ProtocolError`; the parser is of no use afterwards."""
        events: list[Event] = []
        position = 0
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return events
            data = bytes(self._buffer)
            self._buffer.clear()
        while position < len(data):
            if self._left:
                piece = data[position : position + self._left]
                self._left -= len(piece)
                position += len(piece)
                events.append(FramePiece(piece, not self._left))
                continue
            taken = self._begin(data, position, events)
            if not taken:
                self._buffer += data[position:] if position else data
                break
            position += taken
        return events

    def _begin(self, data: bytes, position: int, events: list[Event]) -> int:
        """Take a frame, or the start of one, at `position`. Returns the bytes taken; 0 if more are needed."""
        head = _HEAD.size if self._kinds else _SIZE.size
        self._needed = head
        if len(data) - position < head:
            return 0
        kind, size = (
            _HEAD.unpack_from(data, position) if self._kinds else (0, *_SIZE.unpack_from(data, position))
        )
        self._check(kind, size)
        streamed = self._streamed.get(kind) if size > WHOLE else None
        needed = head + (size if streamed is None else streamed)
        self._needed = needed
        if len(data) - position < needed:
            return 0
        payload = data[position + head : position + needed]
        if streamed is None:
            events.append(Frame(kind, payload))
        else:
            self._left = size - streamed
            events.append(FrameStart(kind, payload, self._left))
        return needed

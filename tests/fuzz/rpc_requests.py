"""What a host may send to a worker's end: mostly sound, and then something is not."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

from libmesh_node.llama.rpc.frames import (
    AHEAD,
    REFERENCE,
    REQUEST_SIZES,
    SET_HEADER,
    TENSOR,
    TICKET,
    WHOLE,
    Command,
    Link,
    frame,
)
from libmesh_node.llama.rpc.weights import Place

from tests.fuzz.target import Lots
from tests.llama.rpc import messages
from tests.llama.rpc.messages import BASE, BUFFER, SIZE, tensor

FILE = bytes(range(256)) * 4
FILE_NAME = b"w"
DEVICES = 2
GRANTED = 4 * SIZE
_EDGES = (0, 1, 4, 63, 64, 100, 1 << 16, SIZE - 1, SIZE, SIZE + 1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1)

# ── requests, honest or not ──────────────────────────────────────────────────────────────────────────────────────


def _tensor(lots: Lots) -> bytes:
    """One that is well inside its buffer, except where a decision says otherwise."""
    kind, length, height = lots.one_of((24, 24, 0, 1, 2, 12, 63, 99)), 1 + lots.number(), 1
    data, buffer, op = BASE + 64 * lots.number(), BUFFER, lots.number() % 128
    strides: tuple[int, int, int, int] | None = None
    for _ in range(lots.number() % 4):
        match lots.number() % 4:
            case 0:
                data = (BASE + lots.one_of(_EDGES)) % (1 << 64)
            case 1:
                length, height = _u32(lots), _u32(lots)
            case 2:
                strides = _u32(lots), _u32(lots), _u32(lots), _u32(lots)
            case 3:
                buffer, data = lots.one_of((0, 1, BUFFER)), lots.one_of((0, data))
    name, shape = lots.one_of((FILE_NAME, b"x", b"\xff" * 63)), (length, height, 1, 1)
    return tensor(name, kind=kind, shape=shape, strides=strides, buffer=buffer, op=op, data=data)


def _u32(lots: Lots) -> int:
    return lots.one_of(_EDGES) & 0xFFFFFFFF


def _sized(lots: Lots) -> int:
    return lots.one_of((1, 4, 64, lots.number(2), lots.one_of(_EDGES)))


def _data(lots: Lots) -> bytes:
    """Bytes of an upload: those of the file, small and large ones."""
    return lots.one_of((FILE, FILE[:300], lots.piece(), bytes(WHOLE), bytes(4)))


def _upload(lots: Lots) -> bytes:
    offset = 0 if lots.number() % 4 else lots.one_of(_EDGES)
    return messages.set_tensor(_data(lots), _tensor(lots), offset=offset, cache=not lots.number() % 8)


def _asked(lots: Lots) -> bytes:
    return messages.get_tensor(_sized(lots), _tensor(lots), offset=0 if lots.number() % 4 else _sized(lots))


def _graph(lots: Lots) -> bytes:
    tensors = [_tensor(lots) for _ in range(lots.number() % 4)]
    wrong = lots.one_of((None, None, None, 0, 1 << 31))
    return messages.graph(
        *tensors, device=lots.number() % 3, count=wrong, nodes=None if wrong is None else lots.number()
    )


def _fixed(lots: Lots) -> bytes:
    kind = lots.one_of(sorted(REQUEST_SIZES))
    if kind == Command.ALLOC_BUFFER:
        return messages.allocate(_sized(lots), lots.number() % 3)
    if kind in (Command.FREE_BUFFER, Command.BUFFER_CLEAR, Command.BUFFER_GET_BASE):
        return frame(kind, struct.pack("<Q", lots.one_of((BUFFER, 0))) + bytes(REQUEST_SIZES[kind] - 8))
    if kind == Command.GRAPH_RECOMPUTE:
        return frame(kind, struct.pack("<I", lots.number() % 3))
    body = b"".join(_tensor(lots) for _ in range(REQUEST_SIZES[kind] // TENSOR))
    body = bytes(4 if kind == Command.GET_ALLOC_SIZE else 0) + body
    return frame(kind, body[: REQUEST_SIZES[kind]] + bytes(REQUEST_SIZES[kind] - len(body)))


def _raw(lots: Lots) -> bytes:
    return lots.piece()


def _absurd(lots: Lots) -> bytes:
    return struct.pack("<BQ", lots.number(), lots.one_of(_EDGES)) + lots.piece()


REQUESTS: tuple[Callable[[Lots], bytes], ...] = (_upload, _asked, _graph, _fixed, _fixed, _raw, _absurd)


def _reference(lots: Lots) -> bytes:
    place = Place(lots.number() % 2, *(lots.one_of((0, 100, 1024, *_EDGES)) for _ in range(2)))
    return frame(
        Link.REFERENCE, REFERENCE.pack(_tensor(lots) + bytes(9), place.part, place.offset, place.size)
    )


def _ticket(lots: Lots) -> bytes:
    return TICKET.pack(lots.number() % 8)


def _ahead(lots: Lots) -> bytes:
    body = b"".join(lots.one_of((_upload, _fixed, _raw))(lots) for _ in range(lots.number() % 3)) + _asked(
        lots
    )
    where = lots.one_of((9 + SET_HEADER, 0, lots.number(2), (1 << 32) - 1))
    return frame(
        Link.AHEAD, AHEAD.pack(lots.number() % 8, lots.number() % 8, where, lots.one_of((4, 64, 300))) + body
    )


LINKS: tuple[Callable[[Lots], bytes], ...] = (
    _reference,
    _ahead,
    lambda lots: frame(Link.PASS, _ticket(lots) + _asked(lots)[9:]),
    lambda lots: frame(Link.FILL, _ticket(lots) + bytes(lots.one_of((4, 64, 300, 0)))),
    lambda lots: frame(Link.DROP, _ticket(lots)),
    lambda lots: frame(Link.PACKED, zlib.compress(_graph(lots)[9:], 1)),
    lambda lots: frame(Link.PACKED, zlib.compress(bytes(1 << lots.number() % 20), 9)[: 1 + lots.number()]),
)

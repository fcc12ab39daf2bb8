"""Requests as llama-server makes them, by hand."""

from __future__ import annotations

import struct

from libmesh_node.llama.rpc.frames import Command, frame

BUFFER, BASE, SIZE = 0x7000_0000_1000, 0x7F00_0000_0000, 1 << 20


def tensor(
    name: bytes = b"x",
    *,
    kind: int = 0,
    buffer: int = BUFFER,
    shape: tuple[int, int, int, int] = (16, 1, 1, 1),
    strides: tuple[int, int, int, int] | None = None,
    op: int = 0,
    data: int = BASE,
    number: int = 1,
) -> bytes:
    """An `rpc_tensor`, packed."""
    width = {0: 4, 1: 2}.get(kind, 1)
    steps = strides or (
        width,
        width * shape[0],
        width * shape[0] * shape[1],
        width * shape[0] * shape[1] * shape[2],
    )
    out = struct.pack("<QIQ4I4II64xi", number, kind, buffer, *shape, *(s & 0xFFFFFFFF for s in steps), op, 0)
    out += bytes(80) + struct.pack("<QQQ", 0, 0, data) + name.ljust(64, b"\0") + struct.pack("<i", 0)
    assert len(out) == 296
    return out


def set_tensor(data: bytes, about: bytes | None = None, *, offset: int = 0, cache: int = 0) -> bytes:
    return frame(
        Command.SET_TENSOR,
        (about or tensor(shape=(len(data), 1, 1, 1), kind=24)) + struct.pack("<BQ", cache, offset) + data,
    )


def set_hash(about: bytes, value: int, *, offset: int = 0) -> bytes:
    return frame(Command.SET_TENSOR_HASH, about + struct.pack("<QQ", offset, value))


def get_tensor(size: int, about: bytes | None = None, *, offset: int = 0) -> bytes:
    return frame(Command.GET_TENSOR, (about or tensor()) + struct.pack("<QQ", offset, size))


def allocate(size: int, device: int = 0) -> bytes:
    return frame(Command.ALLOC_BUFFER, struct.pack("<IQ", device, size))


def graph(*tensors: bytes, device: int = 0, nodes: int | None = None, count: int | None = None) -> bytes:
    head = struct.pack("<II", device, len(tensors) if nodes is None else nodes)
    ids = b"".join(one[:8] for one in tensors)
    body = head + ids + struct.pack("<I", len(tensors) if count is None else count) + b"".join(tensors)
    return frame(Command.GRAPH_COMPUTE, body)

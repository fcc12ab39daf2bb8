"""Graphs on their way between the ends, compressed.

A graph takes 13 KB a layer and crosses before the first token of each answer, and whenever the cache grows. Most of it are
zeros and repetition: the zlib format (RFC 1950) at its fastest makes it about ten times shorter, in less time than the
rest would take on a path of a gigabit.
"""

from __future__ import annotations

import zlib

from libmesh_node.llama.rpc.frames import ProtocolError

LEAST = 1024
"""Bytes of a graph that is worth it."""

MOST = 8 << 20
"""Bytes of the largest that crosses so: 600 layers. While one is packed, or unpacked and checked, for 20 ms, the loop stands
still."""

MAX_RATIO = 200
"""How many times longer than it came a graph may be. Real ones are about 10 times; a bomb of zeros would be 1,000."""

_FASTEST = 1


def pack(graph: bytes) -> bytes | None:
    """`graph`, the payload of a GRAPH_COMPUTE, as it crosses; `None` if it had better cross as it is."""
    if not LEAST <= len(graph) <= MOST:
        return None
    packed = zlib.compress(graph, _FASTEST)
    return packed if len(packed) < len(graph) <= len(packed) * MAX_RATIO else None


def unpack(packed: bytes) -> bytes:
    """The inverse of `pack`. Raises `ProtocolError` for what is damaged, longer than it may be, or not all of it."""
    most = min(len(packed) * MAX_RATIO, MOST)
    stream = zlib.decompressobj()
    try:
        graph = stream.decompress(packed, most + 1)
    except zlib.error as exc:
        raise ProtocolError("a graph that cannot be unpacked") from exc
    if len(graph) > most or not stream.eof or stream.unused_data:
        raise ProtocolError("a graph that cannot be unpacked")
    return graph

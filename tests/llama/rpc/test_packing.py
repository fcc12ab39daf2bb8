"""Graphs that cross compressed: what comes out is what went in, and nobody gets more of us than what was sent is worth."""

from __future__ import annotations

import random
import zlib

import pytest
from libmesh_node.llama.rpc.frames import ProtocolError
from libmesh_node.llama.rpc.packing import LEAST, MAX_RATIO, MOST, pack, unpack

from tests.llama.rpc import messages
from tests.llama.rpc.messages import tensor

GRAPH = messages.graph(*[tensor(b"blk.%d" % number) for number in range(40)])[9:]


def test_a_graph_comes_out_as_it_went_in() -> None:
    packed = pack(GRAPH)
    assert packed is not None
    assert len(packed) < len(GRAPH) // 5
    assert unpack(packed) == GRAPH


@pytest.mark.parametrize(
    "graph",
    [
        GRAPH[: LEAST - 1],
        GRAPH * (MOST // len(GRAPH) + 1),
        bytes(MAX_RATIO * 1000),
        random.Random(1).randbytes(LEAST),
    ],
)
def test_what_is_short_huge_nothing_or_noise_crosses_as_it_is(graph: bytes) -> None:
    assert pack(graph) is None


@pytest.mark.parametrize(
    "packed",
    [
        zlib.compress(bytes(1 << 20)),  # a bomb
        zlib.compress(
            random.Random(1).randbytes(1 << 16) * (MOST >> 16) + b"x", 0
        ),  # longer than may be packed
        zlib.compress(GRAPH)[:-1],
        zlib.compress(GRAPH) + b"x",
        GRAPH,
        b"",
    ],
)
def test_what_is_no_graph_is_refused(packed: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(packed)

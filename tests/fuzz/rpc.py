"""Targets for the tunnel between llama-server and rpc-server: both ends, their first frames, the fork's rewriter."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace

from libmesh_node.llama.rpc.frames import (
    MAX_GRAPH,
    WHOLE,
    Frame,
    FrameParser,
    FramePiece,
    FrameStart,
    ProtocolError,
    answer,
    frame,
)
from libmesh_node.llama.rpc.opening import (
    MAX_MESSAGE,
    SessionRequest,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    protocol_mismatch,
)
from libmesh_node.llama.rpc.register_peer import RegisterPeerRewriter

from tests.fuzz.rpc_ends import FACTS, host_end, worker_end
from tests.fuzz.target import Lots, Target

# ── first frames, the parser, the fork's rewriter ────────────────────────────────────────────────────────────────


def _opening(data: bytes) -> None:
    try:
        request = decode_request(data)
    except ProtocolError:
        pass
    else:
        assert decode_request(encode_request(request)) == request
        assert protocol_mismatch(request.protocol, request.protocol) is None or request.protocol[0] != 7
    try:
        outcome = decode_answer(data)
    except ProtocolError:
        return
    assert decode_answer(encode_answer(outcome)) == outcome


def _opening_seeds() -> Iterator[bytes]:
    request = SessionRequest(
        digest="ab" * 32, memory_bytes=1 << 33, protocol=(7, 0, 3), model="x", token=bytes(16)
    )
    yield encode_request(request)
    yield encode_request(replace(request, next="12D3", next_token=bytes(range(16)), previous="12D4"))
    yield encode_answer(FACTS)


def _frames(data: bytes) -> None:
    lots = Lots(data)
    step, kinds = 1 + lots.number(), bool(lots.number() % 2)
    rest = lots.rest()

    def check(kind: int, size: int) -> None:
        if size > MAX_GRAPH:
            raise ProtocolError("too large")

    joined: list[list[tuple[int, bytes]]] = []
    for size in (step, max(1, len(rest))):
        parser, found = FrameParser(check, {6: 5, 0: 0}, kinds=kinds), list[tuple[int, bytes]]()
        try:
            for at in range(0, len(rest), size):
                for event in parser.feed(rest[at : at + size]):
                    match event:
                        case Frame(kind, payload):
                            found.append((kind, payload))
                        case FrameStart(kind, head, _):
                            found.append((kind, head))
                        case FramePiece(piece, _):
                            found[-1] = found[-1][0], found[-1][1] + piece
        except ProtocolError:
            found.append((-1, b""))
        joined.append(found)
    if joined[1][-1:] == [(-1, b"")]:  # what came before the refusal in the same piece is lost with it
        assert joined[0][-1] == (-1, b"")
    else:
        assert joined[0] == joined[1]


def _register(data: bytes) -> None:
    lots = Lots(data)
    step, hello, rest = 1 + lots.number(), lots.take(lots.number() % 20), lots.rest()
    ports = {("host", port): port + 1000 for port in range(5000, 5010)}
    said: list[bytes | None] = []
    for size in (step, max(1, len(rest))):
        rewriter = RegisterPeerRewriter("host", ports)
        for at in range(0, len(hello), size):
            assert rewriter.from_server(hello[at : at + size]) == hello[at : at + size]
        try:
            out = b"".join(rewriter.from_host(rest[at : at + size]) for at in range(0, len(rest), size))
            said.append(out + rewriter.close())
        except ProtocolError:
            said.append(None)
        if not rewriter.is_fork:
            assert said[-1] in (None, rest)
        assert len(rewriter.unknown) <= 16
    assert said[0] == said[1]
    assert said[0] is None or len(said[0]) == len(rest)


def _register_seeds() -> Iterator[bytes]:
    peer = struct.pack("<I", 7) + b"127.0.0.1:5001".ljust(128, b"\0")
    for version in (b"\4\1\0", b"\7\0\0"):
        yield b"\x20" + bytes([11]) + answer(version) + frame(14) + frame(18, peer) + frame(6, bytes(20))


def _worker_seeds() -> Iterator[bytes]:
    yield bytes([7, 1]) + bytes(range(3, 200))
    yield bytes([255, 1]) + bytes(range(200, 0, -1)) * 2
    yield bytes([16, 0]) + bytes([8, 3, 0, 64]) * 20


RPC = (
    Target("rpc_worker", "no host makes the worker's end pass what would harm rpc-server, however it is cut", worker_end,
           _worker_seeds, 1024),
    Target("rpc_host", "whatever llama-server and a worker say is passed on, answered or refused", host_end,
           lambda: [bytes([9, 0, 0, 1, 0, 5, 1] * 30), bytes(range(256))], 1024),
    Target("rpc_opening", "a first frame is refused in words or survives a round trip", _opening, _opening_seeds,
           MAX_MESSAGE // 4),
    Target("rpc_frames", "frames are the same however the stream is cut", _frames,
           lambda: [b"\2\1" + frame(6, bytes(9)) + frame(0), b"\1\0" + answer(b"abc") * 3,
                    b"\xff\1" + frame(6, bytes(WHOLE + 1))[:800]], 1024),
    Target("rpc_register", "only the fork's REGISTER_PEER changes, and no length ever", _register, _register_seeds, 1024),
)  # fmt: skip

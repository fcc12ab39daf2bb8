"""REGISTER_PEER of the first mesh's fork: recorded frames, and a small server that speaks 4.1."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.llama.rpc.frames import ProtocolError, answer, frame
from libmesh_node.llama.rpc.register_peer import REGISTER_PEER, RegisterPeerRewriter

PORTS = {("host", 5001): 6001, ("other", 5001): 7001, ("host", 5002): 6002}
HELLO = frame(14)
SET_TENSOR = frame(6, bytes(range(256)) * 3)


def register(port: int, peer: int = 7, name: str = "127.0.0.1") -> bytes:
    return frame(REGISTER_PEER, struct.pack("<I", peer) + f"{name}:{port}".encode().ljust(128, b"\0"))


def greeted(version: tuple[int, int, int] = (4, 1, 0)) -> RegisterPeerRewriter:
    rewriter = RegisterPeerRewriter("host", PORTS)
    assert rewriter.from_host(HELLO) == HELLO
    assert rewriter.from_server(answer(bytes(version))) == answer(bytes(version))
    return rewriter


STREAM = SET_TENSOR + register(5001) + SET_TENSOR + register(5002, 9) + register(5999) + frame(16, bytes(4))
REWRITTEN = (
    SET_TENSOR + register(6001) + SET_TENSOR + register(6002, 9) + register(5999) + frame(16, bytes(4))
)


class ForkServer:
    """Reads requests as the fork does, and keeps whom it was told of."""

    def __init__(self) -> None:
        self.peers: dict[int, str] = {}
        self._data = b""

    def hears(self, data: bytes) -> bytes:
        self._data += data
        said = b""
        while len(self._data) >= 9:
            command, size = struct.unpack_from("<BQ", self._data)
            if len(self._data) < 9 + size:
                break
            payload, self._data = self._data[9 : 9 + size], self._data[9 + size :]
            if command == 14:
                said += answer(bytes([4, 1, 0]))
            if command == REGISTER_PEER:
                self.peers[int.from_bytes(payload[:4], "little")] = payload[4:].split(b"\0")[0].decode()
                said += answer(b"\x01")
        return said


def test_a_worker_is_told_its_own_ports() -> None:
    server, rewriter = ForkServer(), RegisterPeerRewriter("host", PORTS)
    heard = b""
    for byte in HELLO + STREAM:
        heard += rewriter.from_server(server.hears(rewriter.from_host(bytes([byte]))))
    assert server.peers == {7: "127.0.0.1:5999", 9: "127.0.0.1:6002"}
    assert heard == answer(bytes([4, 1, 0])) + 3 * answer(b"\x01")
    assert rewriter.unknown == [5999]


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_any_chunking_gives_the_same_output(cuts: list[int]) -> None:
    rewriter = greeted()
    edges = [0, *sorted(cuts), len(STREAM)]
    out = b"".join(rewriter.from_host(STREAM[a:b]) for a, b in pairwise(edges))
    assert out + rewriter.close() == REWRITTEN


def test_two_hosts_with_the_same_port_do_not_collide() -> None:
    rewriter = RegisterPeerRewriter("other", PORTS)
    rewriter.from_server(answer(bytes([4, 1, 0])))
    assert rewriter.from_host(register(5001)) == register(7001)


@pytest.mark.parametrize("version", [(4, 0, 0), (7, 0, 0), (3, 9, 9), (5, 1, 0)])
def test_other_versions_have_other_commands_with_that_number(version: tuple[int, int, int]) -> None:
    assert greeted(version).from_host(STREAM) == STREAM


def test_nothing_is_rewritten_before_the_server_has_spoken() -> None:
    assert RegisterPeerRewriter("host", PORTS).from_host(STREAM) == STREAM


def test_answers_pass_untouched_in_any_pieces() -> None:
    rewriter = RegisterPeerRewriter("host", PORTS)
    said = answer(bytes([4, 1, 0])) + answer(bytes(1000))
    assert b"".join(rewriter.from_server(bytes([byte])) for byte in said) == said
    assert rewriter.is_fork


def test_only_a_register_peer_is_held_back() -> None:
    rewriter = greeted()
    assert rewriter.from_host(SET_TENSOR[:50]) == SET_TENSOR[:50]
    assert rewriter.from_host(SET_TENSOR[50:] + register(5001)[:40]) == SET_TENSOR[50:]
    assert rewriter.close() == register(5001)[:40]


@pytest.mark.parametrize(
    "message",
    [
        frame(REGISTER_PEER, bytes(131)),
        frame(REGISTER_PEER, bytes(132)),
        frame(REGISTER_PEER, bytes(4) + b"nowhere".ljust(128, b"\0")),
        struct.pack("<BQ", 6, 1 << 63),
    ],
)
def test_what_is_no_message_of_the_forks_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        greeted().from_host(message)

"""What is kept of a tunnel: little more than its bytes, whatever the other end says."""

from __future__ import annotations

from typing import Any

import trio

from libmesh.net.journal import PIECE_BYTES, Journal
from libmesh.net.splice import _Pumps
from tests.net.pairs import socket_pair

SIZE = 100_000


def kept_of(pieces: int, size: int) -> Journal:
    journal = Journal()
    for number in range(pieces):
        journal.append(memoryview(bytes([number % 256]) * size))
    return journal


def test_crumbs_are_kept_together() -> None:
    journal = kept_of(SIZE, 1)
    assert len(journal._pieces) <= SIZE // PIECE_BYTES + 1
    journal.acknowledge(50_000, ended=False)
    rest = bytearray()
    while piece := journal.piece_at(50_000 + len(rest)):
        rest += piece
    assert rest == bytes(number % 256 for number in range(50_000, SIZE))
    journal.acknowledge(SIZE, ended=False)
    assert not journal._pieces
    journal.append(memoryview(b"more"))
    assert journal.piece_at(SIZE) == b"more"


async def test_a_peer_that_claims_what_is_being_sent_again_gets_no_more_of_it() -> None:
    journal = kept_of(4, PIECE_BYTES)
    sent = []

    class Liar:
        async def send_all(self, piece: bytes) -> None:
            await trio.lowlevel.checkpoint()
            sent.append(piece)
            journal.acknowledge(4 * PIECE_BYTES, ended=False)

    near, far = await socket_pair()
    async with near, far:
        liar: Any = Liar()
        assert not await _Pumps(liar, near, None)._send_again(journal)
    assert sent == [bytes(PIECE_BYTES)]

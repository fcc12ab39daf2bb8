"""Where an HTTP exchange ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.http_framing import HttpExchange

REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
LENGTH = b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nok"


def ends(request: bytes, answer: bytes) -> list[int]:
    """After which bytes of the answer the exchange was over."""
    exchange = HttpExchange()
    exchange.asked(request)
    return [at for at in range(len(answer)) if exchange.answered(answer[at : at + 1])]


@pytest.mark.parametrize(
    "answer",
    [
        CHUNKED,
        LENGTH,
        b"HTTP/1.1 204 None\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH,
        b"HTTP/1.1 103 Early\r\nLink: a\r\n\r\n" + CHUNKED,
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=100\r\n\r\n2\r\n\r\n\r\n0\r\n\r\n",
    ],
)
@pytest.mark.parametrize(
    "request_",
    [REQUEST, b"GET /props HTTP/1.1\r\nHost: x\r\n\r\n", REQUEST.replace(b"4\r\n\r\nbody", b"0\r\n\r\n")],
)
def test_exchange_is_over_with_the_last_byte_of_the_answer(request_: bytes, answer: bytes) -> None:
    assert ends(request_, answer) == [len(answer) - 1]


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (REQUEST[:-1], LENGTH),  # refused before it was whole
        (REQUEST + REQUEST, LENGTH),
        (REQUEST.replace(b"POST", b"HEAD"), LENGTH),
        (REQUEST.replace(b"Host: x", b"Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket"), LENGTH),
        (b"\x00\x01 no HTTP", LENGTH),
        (REQUEST, b"220 no HTTP\r\n\r\n"),
        (REQUEST, b"HTTP/1.1 200 OK\r\n\r\nuntil the connection ends"),
        (REQUEST, b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"),
        (REQUEST, b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok"),
        (REQUEST, b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n\x00\x01"),
        (REQUEST, CHUNKED[:-1]),
    ],
)
def test_all_else_is_lost_track_of(request_: bytes, answer: bytes) -> None:
    assert ends(request_, answer) == []


def test_answer_that_is_followed_by_another_is_not_the_end() -> None:
    exchange = HttpExchange()
    exchange.asked(REQUEST)
    assert not exchange.answered(LENGTH + LENGTH[:-1])


@given(st.data(), st.sampled_from([CHUNKED, LENGTH]))
def test_pieces_make_no_difference(data: st.DataObject, answer: bytes) -> None:
    exchange = HttpExchange()
    at = data.draw(st.integers(0, len(REQUEST)))
    exchange.asked(REQUEST[:at])
    exchange.asked(REQUEST[at:])
    at = data.draw(st.integers(1, len(answer) - 1))
    assert not exchange.answered(answer[:at])
    assert exchange.answered(answer[at:])


@given(st.lists(st.binary()), st.lists(st.binary()))
def test_garbage_is_no_error(request_: list[bytes], answer: list[bytes]) -> None:
    exchange = HttpExchange()
    for piece in request_:
        exchange.asked(piece)
    for piece in answer:
        assert not exchange.answered(piece)

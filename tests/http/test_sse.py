"""Events are the same however their bytes arrive."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.http.sse import EventReader, event_data

BYTES = st.lists(st.sampled_from([b"\n", b"\n\n", b"\r", b"\r\n", b"data: ", b"x", b": "]), max_size=20).map(
    b"".join
)


def cut(stream: bytes) -> list[bytes]:
    """As the specification has it, of a stream that came as a whole."""
    ends = [found.end() for found in re.finditer(rb"\r\n\r\n|\n\n|\r\r", stream)]
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@given(BYTES)
def test_whole_stream_is_cut_at_its_blank_lines(stream: bytes) -> None:
    assert EventReader().feed(stream) == cut(stream)


@given(st.lists(BYTES.map(lambda piece: piece.replace(b"\r", b"")), max_size=6))
def test_pieces_are_cut_as_the_whole_is(pieces: list[bytes]) -> None:
    reader = EventReader()
    assert [event for piece in pieces for event in reader.feed(piece)] == cut(b"".join(pieces))


@given(BYTES)
def test_data_of_an_event_are_those_of_its_lines(event: bytes) -> None:
    lines = [line.removeprefix(b"data:") for line in event.splitlines() if line.startswith(b"data:")]
    assert event_data(event) == b"\n".join(line.removeprefix(b" ") for line in lines)

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.llama.rpc.frames import (
    MAX_GRAPH,
    SET_HEADER,
    WHOLE,
    Command,
    Frame,
    FrameParser,
    FramePiece,
    FrameStart,
    ProtocolError,
    answer,
    check_request,
    frame,
)

from tests.llama.rpc import messages


def parser() -> FrameParser:
    return FrameParser(check_request, {Command.SET_TENSOR: SET_HEADER})


def joined(parser: FrameParser, chunks: list[bytes]) -> list[tuple[int, bytes]]:
    """Kind and whole payload of each frame."""
    frames: list[tuple[int, bytes]] = []
    for chunk in chunks:
        for event in parser.feed(chunk):
            match event:
                case Frame(kind, payload):
                    frames.append((kind, payload))
                case FrameStart(kind, head, _):
                    frames.append((kind, head))
                case FramePiece(data, _):
                    frames[-1] = (frames[-1][0], frames[-1][1] + data)
    assert not parser.midway
    return frames


STREAM = b"".join(
    [
        frame(Command.HELLO, bytes(24)),
        frame(Command.DEVICE_COUNT),
        messages.set_tensor(b"ab" * 500),
        messages.set_tensor(bytes(range(256)) * 300),
        messages.get_tensor(64),
        messages.graph(messages.tensor(), messages.tensor()),
    ]
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_any_chunking_gives_the_same_frames(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    chunks = [STREAM[a:b] for a, b in pairwise(edges)]
    assert joined(parser(), chunks) == joined(parser(), [STREAM])


def test_one_byte_at_a_time_is_a_chunking_too() -> None:
    start = STREAM[: 9 + 24 + 9 + 9 + SET_HEADER + 1000]
    assert joined(parser(), [bytes([byte]) for byte in start]) == joined(parser(), [start])


def test_a_large_upload_is_never_held_back() -> None:
    upload = messages.set_tensor(bytes(WHOLE + 1))
    events = parser().feed(upload[:1000])
    assert events[0] == FrameStart(Command.SET_TENSOR, upload[9 : 9 + SET_HEADER], WHOLE + 1)
    assert events[1] == FramePiece(bytes(1000 - 9 - SET_HEADER), False)


def test_answers_have_no_kind() -> None:
    assert joined(FrameParser(lambda kind, size: None, {}, kinds=False), [answer(b"abc"), answer(b"")]) == [
        (0, b"abc"),
        (0, b""),
    ]


@pytest.mark.parametrize(
    ("command", "size"),
    [
        (18, 0),
        (255, 0),
        (Command.HELLO, 23),
        (Command.SET_TENSOR, SET_HEADER - 1),
        (Command.SET_TENSOR, 1 << 63),
        (Command.GRAPH_COMPUTE, MAX_GRAPH + 1),
        (Command.ALLOC_BUFFER, 1 << 40),
    ],
)
def test_a_size_that_cannot_be_is_refused_by_its_head_alone(command: int, size: int) -> None:
    head = command.to_bytes(1, "little") + size.to_bytes(8, "little")
    with pytest.raises(ProtocolError):
        parser().feed(head)


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_garbage_is_refused_or_waited_for(chunks: list[bytes]) -> None:
    subject = parser()
    try:
        for chunk in chunks:
            subject.feed(chunk)
    except ProtocolError:
        pass

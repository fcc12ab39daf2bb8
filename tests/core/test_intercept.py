from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libmesh.core.intercept import FrameRewriter, PassThrough


def shouting() -> FrameRewriter:
    """Frames of a kind, a length and text; those of kind 1 are shouted."""
    return FrameRewriter(
        2,
        size=lambda head: head[1],
        wanted=lambda head, size: head[0] == 1,
        rewrite=lambda head, payload: head + payload.upper(),
        limit=100,
    )


def frame(kind: int, text: bytes) -> bytes:
    return bytes([kind, len(text)]) + text


STREAM = frame(0, b"calm") + frame(1, b"loud") + frame(1, b"") + frame(2, b"x" * 200) + frame(1, b"end")
SAID = frame(0, b"calm") + frame(1, b"LOUD") + frame(1, b"") + frame(2, b"x" * 200) + frame(1, b"END")


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_any_chunking_gives_the_same_output(cuts: list[int]) -> None:
    filtering = shouting()
    edges = [0, *sorted(cuts), len(STREAM)]
    out = b"".join(filtering.feed(STREAM[a:b]) for a, b in pairwise(edges))
    assert out + filtering.close() == SAID


def test_only_what_is_rewritten_is_held_back() -> None:
    filtering = shouting()
    assert filtering.feed(frame(2, b"abc")[:4]) == frame(2, b"abc")[:4]
    assert filtering.feed(b"c" + frame(1, b"ab")[:3]) == b"c"
    assert filtering.close() == frame(1, b"ab")[:3]


def test_more_than_may_be_held_is_refused() -> None:
    with pytest.raises(ValueError, match="101 bytes"):
        shouting().feed(bytes([1, 101]))


def test_passing_through_changes_nothing() -> None:
    assert PassThrough().feed(b"abc") == b"abc"
    assert PassThrough().close() == b""

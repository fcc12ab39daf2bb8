"""The yamux machine: every row of its table, every bound, any bytes in any pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libmesh.core.yamux_frames import (
    ACK,
    DATA,
    FIN,
    MIB,
    PING,
    RST,
    SPEC_WINDOW,
    SYN,
    WINDOW_UPDATE,
    Data,
    Finished,
    OpenAllowed,
    Opened,
    Options,
    Reset,
)
from tests.core.yamux_by_hand import PLAIN, frame, frames_of, settle
from tests.core.yamux_pair import Pair, Side


def test_initiator_numbers_its_streams_odd_and_the_other_even() -> None:
    pair = Pair(PLAIN)
    assert [pair.a.machine.open(0), pair.a.machine.open(0)] == [1, 3]
    assert [pair.b.machine.open(0), pair.b.machine.open(0)] == [2, 4]


def test_syn_precedes_data_and_carries_the_first_grant() -> None:
    side = Side(True, Options(initial_window=MIB))
    stream_id = side.machine.open(0)
    assert stream_id == 1
    side.send(stream_id, b"first")
    assert frames_of(bytes(side.outgoing)) == [(WINDOW_UPDATE, SYN, 1, MIB - SPEC_WINDOW), (DATA, 0, 1, 5)]


def test_a_stream_is_acknowledged_when_it_is_accepted() -> None:
    pair = Pair(PLAIN)
    pair.a.machine.open(0)
    assert pair.carry(pair.a, pair.b) == [Opened(1)]
    assert not pair.b.machine.has_control
    pair.b.machine.accept(1)
    pair.b.machine.accept(1)
    assert frames_of(pair.b.machine.take_control()) == [(WINDOW_UPDATE, ACK, 1, 0)]


def test_accepting_a_stream_that_is_gone_does_nothing() -> None:
    side = Side(False, PLAIN)
    side.take(frame(WINDOW_UPDATE, SYN, 1, 0) + frame(WINDOW_UPDATE, RST, 1, 0))
    side.machine.accept(1)
    assert not side.machine.has_control


def test_opening_waits_while_too_many_are_unacknowledged() -> None:
    pair = Pair(Options(max_unacknowledged=2, ping_interval=1e9, ping_timeout=1e9))
    assert pair.a.machine.open(0) == 1
    assert pair.a.machine.open(0) == 3
    assert pair.a.machine.open(0) is None
    pair.carry(pair.a, pair.b)
    pair.b.machine.accept(1)
    assert OpenAllowed() in pair.carry(pair.b, pair.a)
    assert pair.a.machine.open(0) == 5


@pytest.mark.parametrize("answer", [RST, FIN])
def test_an_end_in_place_of_an_acknowledgement_lets_the_next_open(answer: int) -> None:
    side = Side(True, Options(max_unacknowledged=1))
    assert side.machine.open(0) == 1
    assert side.machine.open(0) is None
    side.finish(1)
    assert OpenAllowed() in side.take(frame(WINDOW_UPDATE, answer, 1, 0))


def test_a_stream_that_is_given_up_unacknowledged_lets_the_next_open() -> None:
    side = Side(True, Options(max_unacknowledged=1, linger=30.0))
    side.machine.open(0)
    side.abandon(1)
    assert side.machine.open(0) is None
    assert OpenAllowed() in side.machine.tick(30.0)
    assert side.machine.open(30.0) == 3


@pytest.mark.parametrize("arrived", [0, 12, 14])
def test_data_without_an_acknowledgement_for_a_stream_that_was_left_lets_the_next_open(arrived: int) -> None:
    side = Side(True, Options(max_unacknowledged=1))
    said = frame(DATA, 0, 1, 4, b"late")
    side.machine.open(0)
    side.take(said[:arrived])
    side.abandon(1)
    assert side.machine.open(0) is None
    assert OpenAllowed() in side.take(said[arrived:])


def test_streams_beyond_the_backlog_are_refused() -> None:
    side = Side(False, Options(backlog=2, ping_interval=1e9, ping_timeout=1e9))
    for stream_id in (1, 3, 5):
        side.take(frame(WINDOW_UPDATE, SYN, stream_id, 0))
    assert side.opened == [1, 3]
    assert frames_of(side.machine.take_control()) == [(WINDOW_UPDATE, RST, 5, 0)]


def test_streams_beyond_the_bound_are_refused_until_one_ends() -> None:
    side = Side(False, Options(max_inbound=1, ping_interval=1e9, ping_timeout=1e9))
    side.take(frame(WINDOW_UPDATE, SYN, 1, 0) + frame(WINDOW_UPDATE, SYN, 3, 0))
    assert side.opened == [1]
    side.machine.reset(1)
    side.take(frame(WINDOW_UPDATE, SYN, 5, 0))
    assert side.opened == [1, 5]


def test_the_body_of_a_refused_stream_is_skipped() -> None:
    side = Side(False, Options(backlog=1))
    side.take(
        frame(WINDOW_UPDATE, SYN, 1, 0) + frame(DATA, SYN, 3, 4, b"lost") + frame(DATA, 0, 1, 4, b"kept")
    )
    assert side.got == {1: b"kept"}


def test_a_peer_that_opens_without_end_is_cut_off() -> None:
    side = Side(False, Options(backlog=1))
    for index in range(2000):
        side.take(frame(WINDOW_UPDATE, SYN, 2 * index + 1, 0))
    assert side.machine.broken == "streams opened without end"


def test_a_peer_that_does_not_read_the_answers_it_causes_is_cut_off() -> None:
    side = Side(False)
    for index in range(70_000):
        side.take(frame(WINDOW_UPDATE, SYN, 2 * index + 1, 0) + frame(DATA, 0, 2 * index + 1, 1, b"x"))
        side.machine.accept(2 * index + 1)
        side.machine.consumed(2 * index + 1, 1, 0.0)
        side.take(frame(WINDOW_UPDATE, RST, 2 * index + 1, 0))
        if side.machine.broken:
            break
    assert side.machine.broken == "the peer does not read the answers that it causes"


def test_streams_may_arrive_out_of_order() -> None:
    side = Side(False)
    side.take(frame(WINDOW_UPDATE, SYN, 5, 0) + frame(WINDOW_UPDATE, SYN, 3, 0))
    assert side.opened == [5, 3]


# ---- the table of states ----------------------------------------------------------------------------------------


def open_state(side: Side) -> None:
    pass


def local_finished(side: Side) -> None:
    side.finish(1)


def remote_finished(side: Side) -> None:
    side.take(frame(WINDOW_UPDATE, FIN, 1, 0))


def lingering(side: Side) -> None:
    side.abandon(1)


States = [open_state, local_finished, remote_finished, lingering]


@pytest.mark.parametrize(
    ("state", "events", "forgotten"),
    [
        (open_state, [Finished(1)], False),
        (local_finished, [Finished(1)], True),
        (remote_finished, [], False),
        (lingering, [], True),
    ],
)
@pytest.mark.parametrize("as_data", [0, 1, 3])
def test_fin_arrives(
    state: Callable[[Side], None], events: list[object], forgotten: bool, as_data: int
) -> None:
    side = Side(True, PLAIN)
    side.machine.open(0)
    state(side)
    if as_data == 0:
        got = side.take(frame(WINDOW_UPDATE, FIN, 1, 0))
    elif as_data == 1 or state in (lingering, remote_finished):
        got = side.take(frame(DATA, FIN, 1, 0))
    else:
        got = side.take(frame(DATA, FIN, 1, 3, b"end"))
        assert got.pop(0) == Data(1, b"end")
    assert got == events
    assert (len(side.machine.table.states) == 0) is forgotten


@pytest.mark.parametrize(
    ("state", "events"),
    [
        (open_state, [Reset(1, "reset by the peer")]),
        (local_finished, [Reset(1, "reset by the peer")]),
        (remote_finished, [Reset(1, "reset by the peer")]),
        (lingering, []),
    ],
)
def test_rst_arrives(state: Callable[[Side], None], events: list[object]) -> None:
    side = Side(True, PLAIN)
    side.machine.open(0)
    state(side)
    assert side.take(frame(WINDOW_UPDATE, RST, 1, 0)) == events
    assert len(side.machine.table.states) == 0


def test_rst_on_a_data_frame_drops_its_body() -> None:
    side = Side(True, PLAIN)
    side.machine.open(0)
    assert side.take(frame(DATA, RST, 1, 3, b"bad")) == [Reset(1, "reset by the peer")]


@pytest.mark.parametrize(
    ("state", "sent", "streams"),
    [(open_state, FIN, 1), (local_finished, 0, 1), (remote_finished, FIN, 0), (lingering, 0, 1)],
)
def test_finish(state: Callable[[Side], None], sent: int, streams: int) -> None:
    side = Side(True, PLAIN)
    side.machine.open(0)
    state(side)
    output = side.machine.finish(1)
    assert output == (frame(WINDOW_UPDATE, FIN, 1, 0) if sent else b"")
    assert len(side.machine.table.states) == streams


@pytest.mark.parametrize(
    ("state", "unread", "flags", "streams"),
    [
        (open_state, False, [FIN], 1),
        (open_state, True, [FIN, RST], 0),
        (local_finished, False, [], 1),
        (local_finished, True, [RST], 0),
        (remote_finished, False, [FIN], 0),
        (remote_finished, True, [FIN], 0),
        (lingering, False, [], 1),
    ],
)
def test_abandon(state: Callable[[Side], None], unread: bool, flags: list[int], streams: int) -> None:
    side = Side(True, PLAIN)
    side.machine.open(0)
    state(side)
    output = side.machine.abandon(1, unread=unread, now=0.0)
    assert [each[1] for each in frames_of(output)] == flags
    assert len(side.machine.table.states) == streams


@pytest.mark.parametrize("state", States)
def test_reset(state: Callable[[Side], None]) -> None:
    side = Side(True, PLAIN)
    side.machine.open(0)
    state(side)
    side.flush()
    side.machine.reset(1)
    side.machine.reset(1)
    assert side.machine.take_control() == frame(WINDOW_UPDATE, RST, 1, 0)
    assert len(side.machine.table.states) == 0


def test_nothing_can_be_sent_on_a_finished_or_unknown_stream() -> None:
    side = Side(True, PLAIN)
    side.machine.open(0)
    side.finish(1)
    assert side.machine.data(1, 10) == (b"", 0)
    assert side.machine.data(77, 10) == (b"", 0)
    assert not side.machine.writable(77)
    assert side.machine.finish(77) == b""


def test_data_for_a_lingering_stream_is_answered_with_rst() -> None:
    side = Side(True, PLAIN)
    side.machine.open(0)
    side.abandon(1)
    assert side.take(frame(DATA, 0, 1, 5, b"still")) == []
    assert side.machine.take_control() == frame(WINDOW_UPDATE, RST, 1, 0)
    assert len(side.machine.table.states) == 0


def test_a_body_under_way_when_its_stream_is_closed_is_answered_with_rst() -> None:
    side = Side(True, PLAIN)
    side.machine.open(0)
    side.take(frame(DATA, 0, 1, 6, b"abc"))
    side.abandon(1)
    assert side.take(b"def" + frame(PING, ACK, 0, 9)) == []
    assert side.machine.take_control() == frame(WINDOW_UPDATE, RST, 1, 0)


def test_a_body_under_way_when_its_stream_is_reset_is_skipped() -> None:
    side = Side(True, PLAIN)
    side.machine.open(0)
    side.take(frame(DATA, FIN, 1, 6, b"abc"))
    side.machine.reset(1)
    assert side.take(b"def") == []


def test_data_after_the_end_resets_the_stream() -> None:
    side = Side(True, PLAIN)
    side.machine.open(0)
    side.take(frame(WINDOW_UPDATE, FIN, 1, 0))
    assert side.take(frame(DATA, 0, 1, 4, b"more")) == [Reset(1, "data after the end")]


def test_frames_for_forgotten_streams_are_skipped() -> None:
    side = Side(True, PLAIN)
    side.machine.open(0)
    side.machine.reset(1)
    late = (
        frame(DATA, FIN, 1, 4, b"late")
        + frame(WINDOW_UPDATE, FIN | ACK, 1, 9)
        + frame(WINDOW_UPDATE, RST, 1, 0)
    )
    assert side.take(late) == []
    assert side.machine.broken is None


def test_a_stream_that_the_peer_never_finishes_is_reset_after_lingering() -> None:
    side = Side(True, Options(linger=30.0, ping_interval=1e9, ping_timeout=1e9))
    side.machine.open(0)
    settle(side)
    side.abandon(1, now=5.0)
    assert side.machine.deadline() == 35.0
    side.machine.tick(34.9)
    assert len(side.machine.table.states) == 1
    side.flush()
    side.machine.tick(35.0)
    assert len(side.machine.table.states) == 0
    assert side.machine.take_control() == frame(WINDOW_UPDATE, RST, 1, 0)


def test_a_released_stream_delivers_until_it_is_reset_for_lingering() -> None:
    side = Side(True, Options(linger=30.0, ping_interval=1e9, ping_timeout=1e9))
    side.machine.open(0)
    settle(side)
    side.machine.finish(1, linger_from=0.0)
    assert side.take(frame(DATA, 0, 1, 5, b"reply")) == [Data(1, b"reply")]
    assert side.machine.tick(30.0) == [Reset(1, "the peer did not finish in time")]


# ---- windows ----------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from([DATA, DATA, DATA, WINDOW_UPDATE]),
            st.sampled_from([0, 0, 0, 0, SYN, ACK, FIN, RST, SYN | FIN]),
            st.sampled_from([1, 1, 3, 5]),
            st.sampled_from([0, 1, 64, 5000, SPEC_WINDOW // 2]),
        ),
        max_size=12,
    )
)
def test_frames_one_by_one_mean_what_they_mean_when_cut_anywhere(
    headers: list[tuple[int, int, int, int]],
) -> None:
    whole, cut = (Side(False, replace(PLAIN, max_unread=SPEC_WINDOW)) for _ in "ab")
    for side in (whole, cut):
        side.take(frame(WINDOW_UPDATE, SYN, 1, 0))
    for kind, flags, stream_id, length in headers:
        data = frame(kind, flags, stream_id, length, bytes(length) if kind == DATA else b"")
        whole.take(data)
        for start in (0, 5, 12, 13):
            end = {0: 5, 5: 12, 12: 13, 13: len(data)}[start]
            cut.take(data[start:end])
    events = [[event for event in side.events if not isinstance(event, Data)] for side in (whole, cut)]
    assert events[0] == events[1]
    assert whole.got == cut.got
    assert whole.machine.take_control() == cut.machine.take_control()
    states = [
        {number: (state.state, state.receive_window) for number, state in side.machine.table.states.items()}
        for side in (whole, cut)
    ]
    assert states[0] == states[1]
    assert whole.machine.table.windows.unread == cut.machine.table.windows.unread

"""When a silent connection is asked for a sign of life, and when it is doubted."""

from __future__ import annotations

from libmesh.core.pulse import LEAST_PATIENCE, ROUND_TRIPS, SILENT_FOR, Pulse, Seen


def look(
    pulse: Pulse,
    now: float,
    *,
    sent: int = 0,
    heard: float = 0.0,
    waiting: bool = False,
    rtt: float | None = None,
) -> Seen:
    return pulse.look(sent=sent, heard_at=heard, waiting=waiting, rtt=rtt, now=now)


def calm(sent: int = 0) -> Pulse:
    """One that was heard at 0."""
    pulse = Pulse()
    assert look(pulse, 0.1, sent=sent) is Seen.CALM
    return pulse


def test_who_says_nothing_expects_no_answer() -> None:
    pulse = calm()
    assert [look(pulse, now) for now in (1, 10, 100)] == [Seen.CALM] * 3


def test_who_sends_and_hears_nothing_asks_and_then_doubts() -> None:
    pulse = calm()
    assert look(pulse, 1, sent=1) is Seen.ASK
    assert look(pulse, 1 + LEAST_PATIENCE / 2, sent=2) is Seen.WAITING
    assert look(pulse, 1 + LEAST_PATIENCE, sent=2) is Seen.DOUBTED
    assert not pulse.gone(rtt=None, now=1 + SILENT_FOR - 0.01)
    assert pulse.gone(rtt=0.001, now=1 + SILENT_FOR)
    assert not pulse.gone(rtt=1.0, now=1 + SILENT_FOR)
    assert pulse.gone(rtt=1.0, now=1 + 2 * ROUND_TRIPS)


def test_a_stream_that_is_not_answered_is_asked_for_even_if_it_was_sent_before_the_last_sign_of_life() -> (
    None
):
    assert look(calm(sent=1), 1, sent=1, waiting=True) is Seen.ASK


def test_any_sign_of_life_ends_the_doubt() -> None:
    pulse = calm()
    look(pulse, 1, sent=1)
    assert look(pulse, 9, sent=1) is Seen.DOUBTED
    assert look(pulse, 10, sent=1, heard=9.5) is Seen.CALM
    assert not pulse.gone(rtt=None, now=1000)
    assert look(pulse, 11, sent=1, heard=9.5) is Seen.CALM, "what was sent before it counts as answered"


def test_what_came_before_the_question_is_no_answer_to_it() -> None:
    pulse = calm()
    pulse.asked(5)
    pulse.asked(6)
    assert look(pulse, 6, heard=4.9) is Seen.DOUBTED
    assert pulse.gone(rtt=None, now=5 + SILENT_FOR)


def test_on_a_long_path_the_answer_has_more_time() -> None:
    pulse = calm()
    pulse.asked(1)
    assert look(pulse, 1 + ROUND_TRIPS * 0.3 - 0.01, rtt=0.3) is Seen.WAITING
    assert look(pulse, 1 + ROUND_TRIPS * 0.3, rtt=0.3) is Seen.DOUBTED


def test_the_time_in_which_this_process_did_nothing_does_not_count() -> None:
    pulse = calm()
    pulse.postpone(9)
    pulse.asked(1)
    pulse.postpone(9)
    assert look(pulse, 10) is Seen.WAITING
    assert not pulse.gone(rtt=None, now=10 + SILENT_FOR - 0.01)
    assert pulse.gone(rtt=None, now=10 + SILENT_FOR)


def test_an_answer_that_came_before_this_process_did_nothing_is_one() -> None:
    pulse = calm()
    pulse.asked(1)
    pulse.postpone(9)
    assert look(pulse, 10, heard=1.1) is Seen.CALM
    assert not pulse.gone(rtt=None, now=100)

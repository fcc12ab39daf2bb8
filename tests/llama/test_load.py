"""What a server tells of its load, and how little of it is passed on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.llama.load import (
    IDLE,
    UNABLE,
    Abilities,
    FirstToken,
    ServerLoad,
    Smoothed,
    read_abilities,
    read_load,
)


def metrics(processing: float, deferred: float, speed: float) -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\n\r\n# HELP llamacpp:requests_processing Number of requests processing.\n"
        b"llamacpp:requests_processing %g\nllamacpp:requests_deferred %g\n"
        b"llamacpp:predicted_tokens_seconds %g\n" % (processing, deferred, speed)
    )


@pytest.mark.parametrize(
    ("processing", "deferred", "busy"), [(0, 0, 0), (1, 0, 1), (2, 0, 2), (2, 1, 4), (4, 5, 16)]
)
def test_busy_is_all_that_is_there_rounded_up_to_a_power_of_two(
    processing: int, deferred: int, busy: int
) -> None:
    assert read_load(metrics(processing, deferred, 10)).busy == busy


@pytest.mark.parametrize(
    ("measured", "told"), [(0.2, 1), (1.4, 1.5), (9.9, 8), (10.5, 12), (100, 96), (1000, 1024)]
)
def test_speed_is_told_in_steps(measured: float, told: float) -> None:
    assert read_load(metrics(0, 0, measured)).speed == told


@given(st.floats(1.0, 1e5))
def test_steps_are_never_a_third_off(speed: float) -> None:
    assert 0.74 <= read_load(metrics(0, 0, speed)).speed / speed <= 1.34


def test_speed_stays_while_nothing_is_generated() -> None:
    assert read_load(metrics(0, 0, 0), ServerLoad(busy=4, speed=8.0)) == ServerLoad(busy=0, speed=8.0)


def test_speed_is_smoothed_over_time() -> None:
    speeds, load = Smoothed(), IDLE
    for measured, told in ((10, 8), (40, 16), (0, 16), (10, 16), (10, 12)):
        load = read_load(metrics(1, 0, measured), load, speeds)
        assert load.speed == told
    for _ in range(30):
        load = read_load(metrics(1, 0, 40), load, speeds)
    assert load.speed == read_load(metrics(1, 0, 40)).speed


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 501 Not Implemented\r\n\r\n{}", b"llamacpp:requests_processing ...\n"]
)
def test_what_cannot_be_read_changes_nothing(answer: bytes) -> None:
    before = ServerLoad(busy=2, speed=3.0)
    assert read_load(answer, before) is before
    assert read_load(answer) is IDLE


def test_first_token_is_smoothed_over_requests_and_told_in_steps() -> None:
    first = FirstToken()
    assert first.told == 0.0
    for line in (
        "0.00.062.451 I cmn          init: llama threadpool init, n_threads = 2",
        "0.00.408.516 I slot print_timing: id  1 | task 0 |        eval time =      18.36 ms /     5 tokens",
        "prompt eval time = ..... ms",
    ):
        first.saw(line)
    assert first.told == 0.0
    line = (
        "0.00.408.499 I slot print_timing: id  1 | task 0 | prompt eval time = {:10.2f} ms /    23 tokens (…)"
    )
    first.saw(line.format(200.0))
    assert first.told == 0.192
    for _ in range(30):
        first.saw(line.format(2000.0))
    assert first.told == 2.048


@pytest.mark.parametrize(
    ("props", "able"),
    [
        (
            b'{"chat_template_caps": {"supports_tools": true}, "modalities": {"vision": true}}',
            Abilities(tools=True, vision=True),
        ),
        (b'{"chat_template_caps": {"supports_tools": false}, "modalities": {"vision": false}}', UNABLE),
        (b'{"chat_template_caps": null, "modalities": {"vision": 1}}', UNABLE),
        (b'{"chat_template_caps": []}', UNABLE),
        (b'{"chat_template_caps": [1]}', UNABLE),
        (b"[]", UNABLE),
        (b"", None),
        (b'{"chat_template_caps": {"supp', None),
        (b"[" * 100_000, None),
    ],
)
def test_server_can_do_what_it_says_and_nothing_else(props: bytes, able: Abilities | None) -> None:
    assert read_abilities(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + props) == able

"""Who gets a request: rules of prediction, warmth, rest and room, as tables and in a small simulation."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.http.affinity import LIFETIME, MAX_ENTRIES, Affinity
from libmesh_node.http.balance import (
    DOUBT,
    FAILURES,
    FIRST_BYTE,
    MAX_REST,
    MAX_TOLD_FIRST,
    MAX_TOLD_LINE,
    REST,
    SLOWEST,
    TYPICAL_TOKENS,
    UNPROVED,
    Balance,
)
from libmesh_node.http.body import read_object
from libmesh_node.http.wanted import BLOCK, MAX_PREFIXES, NOTHING, Wanted, read_wanted
from libmesh_node.snapshot import Server


def server(peer: str, **changes: object) -> Server:
    return Server(
        **({"peer": peer, "base_url": f"http://{peer}", "local": False, "slots": 4, "rtt": 0.01} | changes)
    )


def balance(seed: int = 1) -> Balance:
    return Balance(random.Random(seed))


A, B, C = server("a"), server("b"), server("c")


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_chosen_of_nothing_or_when_all_were_tried() -> None:
    assert balance().choose([], (), NOTHING, 0) is None
    assert balance().choose([A, B], {A.base_url, B.base_url}, NOTHING, 0) is None


def test_faster_server_is_chosen_until_its_load_makes_it_slower() -> None:
    known = balance()
    known.answered(A, speed=40)
    known.answered(B, speed=10)
    chosen = Counter()
    for _ in range(50):
        picked = known.choose([A, B], (), NOTHING, 0)
        assert picked is not None
        known.begins(picked)
        chosen[picked.peer] += 1
    assert 3 < chosen["a"] / chosen["b"] < 6


def test_server_that_takes_what_a_request_brings_goes_before_a_faster_one() -> None:
    able = server("d", speed=1.0, tools=True, vision=True)
    known = balance()
    known.answered(A, speed=1000)
    for wanted in (Wanted(tools=True), Wanted(vision=True), Wanted(tools=True, vision=True)):
        assert known.choose([A, able], (), wanted, 0) is able
        assert known.choose([A, able], {able.base_url}, wanted, 0) is A
    assert known.choose([A, able], (), NOTHING, 0) is A


def test_announced_time_to_first_token_counts_until_it_was_measured() -> None:
    slow, quick = server("a", first=2.0, speed=20.0), server("b", first=0.1, speed=20.0)
    known = balance()
    assert known.choose([slow, quick], (), NOTHING, 0) is quick
    limits = [known.first_byte_limit(one, Wanted(streams=True)) for one in (slow, quick)]
    assert limits[0] - limits[1] == pytest.approx(DOUBT * 1.9)
    known.answered(slow, first=0.01)
    known.answered(quick, first=3.0)
    assert known.choose([slow, quick], (), NOTHING, 0) is slow


def test_announced_time_to_first_token_does_not_keep_a_server_from_being_taken_to_hang() -> None:
    liar, believed = server("l", first=4_294_967.0), server("b", first=MAX_TOLD_FIRST)
    known = balance()
    for measured in (False, True):
        if measured:
            for one in (liar, believed):
                known.answered(one, first=0.2, speed=20.0)
        assert known.first_byte_limit(liar, NOTHING) == known.first_byte_limit(believed, NOTHING)
    quick = Wanted(streams=True)
    assert known.first_byte_limit(liar, quick) < FIRST_BYTE + DOUBT * (MAX_TOLD_FIRST + 1)
    known.answered(liar, first=1000.0)
    assert known.first_byte_limit(liar, quick) > DOUBT * MAX_TOLD_FIRST * 2


def test_no_announcement_makes_a_server_that_hangs_be_waited_for_without_end() -> None:
    known, liar = balance(), server("l", speed=1e-9, first=1e9, busy=65_536)
    for wanted in (NOTHING, Wanted(streams=True, prompt_tokens=10**6)):
        assert known.first_byte_limit(liar, wanted) == UNPROVED
    slowest = server("s", speed=SLOWEST, first=MAX_TOLD_FIRST, busy=MAX_TOLD_LINE * liar.slots)
    for one in (liar, slowest):
        known.answered(one, speed=1e-9)
    assert known.first_byte_limit(liar, NOTHING) == known.first_byte_limit(slowest, NOTHING) > UNPROVED


def test_equals_share_alike() -> None:
    known, chosen = balance(), Counter()
    for _ in range(64):
        picked = known.choose([A, B], (), NOTHING, 0)
        assert picked is not None
        known.begins(picked)
        chosen[picked.peer] += 1
    assert chosen["a"] == chosen["b"] == 32


def test_many_nodes_with_one_picture_do_not_all_choose_alike() -> None:
    servers = [server(f"s{i}") for i in range(8)]
    picked = [balance(seed).choose(servers, (), NOTHING, 0) for seed in range(200)]
    assert max(Counter(s.peer for s in picked if s).values()) < 60


def test_nearer_of_two_equals_is_chosen_and_a_local_one_is_nearest() -> None:
    near, far, here = server("n", rtt=0.001), server("f", rtt=0.3), server("h", local=True, rtt=None)
    assert balance().choose([near, far], (), NOTHING, 0) is near
    assert balance().choose([near, here], (), NOTHING, 0) is here
    assert balance().choose([server("u", rtt=None), here], (), NOTHING, 0) is here


def test_announced_load_and_speed_count_where_nothing_was_measured() -> None:
    busy = server("b", busy=8)
    assert balance().choose([A, busy], (), NOTHING, 0) is A
    slow, quick = server("s", speed=5.0), server("q", speed=50.0)
    assert balance().choose([slow, quick], (), NOTHING, 0) is quick


def test_request_goes_where_it_fits_and_somewhere_if_it_fits_nowhere() -> None:
    small, large = server("s", context_length=1000, rtt=0.0), server("l", context_length=9000, rtt=0.5)
    assert balance().choose([small, large], (), Wanted(prompt_tokens=2000), 0) is large
    assert balance().choose([small], (), Wanted(prompt_tokens=2000), 0) is small


def test_warm_server_is_kept_until_it_is_full_and_another_is_not() -> None:
    known = balance()
    known.answered(A, speed=1)
    known.answered(B, speed=100)
    assert known.choose([A, B], (), NOTHING, 0, warm="a") is A
    for _ in range(A.slots):
        known.begins(A)
    assert known.choose([A, B], (), NOTHING, 0, warm="a") is B
    for _ in range(B.slots):
        known.begins(B)
    assert known.choose([A, B], (), NOTHING, 0, warm="a") is A
    assert known.choose([A, B], {A.base_url}, NOTHING, 0, warm="a") is B


def test_first_byte_may_take_as_long_as_the_line_and_the_prompt_explain() -> None:
    known = balance()
    known.answered(A, speed=10)
    streams = Wanted(streams=True)
    at_once = known.first_byte_limit(A, streams)
    assert FIRST_BYTE < at_once < FIRST_BYTE + 1
    assert known.first_byte_limit(A, Wanted(streams=True, prompt_tokens=1000)) == at_once + DOUBT * 50
    assert known.first_byte_limit(A, Wanted(max_tokens=100)) == at_once + DOUBT * 10
    assert known.first_byte_limit(A, NOTHING) > at_once + DOUBT * 400
    crowded = server("a", busy=12)
    assert known.first_byte_limit(crowded, streams) == at_once + DOUBT * 8 / 4 * TYPICAL_TOKENS / 10
    for _ in range(12):
        known.begins(A)
    assert known.first_byte_limit(A, streams) == known.first_byte_limit(crowded, streams)


# ── failing and coming back ──────────────────────────────────────────────────────────────────────────────────────────


def test_server_that_keeps_failing_rests_twice_as_long_each_time_and_is_tried_by_one() -> None:
    known, now = balance(), 100.0
    for _ in range(FAILURES - 1):
        known.failed(A, now)
    assert known.choose([A, B], {B.base_url}, NOTHING, now) is A
    known.failed(A, now)
    assert {known.choose([A, B], (), NOTHING, now) for _ in range(20)} == {B}
    now += REST
    assert known.choose([A], (), NOTHING, now) is A
    known.begins(A)  # the one that tries
    assert known.choose([A, B], (), NOTHING, now) is B
    known.failed(A, now)
    known.ends(A)
    assert known.choose([A, B], (), NOTHING, now + REST) is B
    known.answered(A)
    assert known.choose([A], (), NOTHING, now) is A


def test_trial_that_its_client_left_does_not_stop_the_next() -> None:
    known = balance()
    for _ in range(FAILURES):
        known.failed(A, 0)
    with known.seat(A):
        assert known.choose([A, B], (), NOTHING, REST) is B
    assert {known.choose([A, B], (), NOTHING, REST) for _ in range(50)} == {A, B}


def test_request_is_counted_where_it_is_and_nowhere_else() -> None:
    known = balance()
    with known.seat(A) as seat:
        assert dict(known.in_flight) == {A.base_url: 1}
        seat.move(B)
        assert dict(known.in_flight) == {B.base_url: 1}
        seat.move(None)
        assert dict(known.in_flight) == {}
    assert dict(known.in_flight) == {}


def test_full_servers_are_passed_over_while_one_has_room_and_resting_ones_are_no_room() -> None:
    known = balance()
    for _ in range(A.slots + 2):
        known.begins(A)
    crowd = [A, B, server("d"), server("e")]
    for full in crowd[2:]:
        for _ in range(full.slots + 2):
            known.begins(full)
    assert {known.choose(crowd, (), NOTHING, 0, backlog=2) for _ in range(50)} == {B}
    assert known.has_room([A, B], 2, 0)
    for _ in range(FAILURES):
        known.failed(B, 0)
    assert not known.has_room([A, B], 2, 0)
    assert known.has_room([B], 2, 0)


def test_what_others_ask_of_a_server_makes_it_slower_and_not_full() -> None:
    """Its node shares it among those who ask: whoever held back would get nothing."""
    busy = server("b", busy=99)
    assert balance().has_room([busy], 2, 0)
    assert balance().choose([A, busy], (), NOTHING, 0, backlog=2) is A


def test_looking_at_servers_remembers_nothing_of_them() -> None:
    known = balance()
    known.choose([A, B, C], (), NOTHING, 0)
    known.has_room([A, B, C], 2, 0)
    with known.seat(A):
        pass
    assert known._known == {}


def test_rest_has_an_end_however_often_a_server_failed() -> None:
    known = balance()
    for _ in range(2000):
        known.failed(A, 0)
    assert known.choose([A, server("slow", rtt=9.0)], (), NOTHING, MAX_REST) in (A, server("slow", rtt=9.0))
    assert known._of(A).rests_until == MAX_REST


def test_only_server_is_asked_though_it_fails() -> None:
    known = balance()
    for _ in range(9):
        known.failed(A, 0)
    assert known.choose([A], (), NOTHING, 0) is A


def test_what_is_known_of_the_gone_is_forgotten_unless_something_is_under_way() -> None:
    known = balance()
    known.answered(A, speed=3)
    known.answered(B, speed=3)
    known.begins(B)
    known.forget({C.base_url})
    assert set(known._known) == {B.base_url}


# ── reading requests ─────────────────────────────────────────────────────────────────────────────────────────────────


def wanted(headers: dict[str, str] | None = None, **request: object) -> Wanted:
    return read_wanted(request, headers or {})


USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def test_next_turn_has_the_whole_conversation_so_far_as_a_prefix() -> None:
    first, second = wanted(messages=[USER]), wanted(messages=[USER, BOT, USER])
    assert first.prefixes[0] in second.prefixes
    assert second.prefixes[0] not in first.prefixes
    assert len(second.prefixes) == 3


def test_other_tools_other_words_or_another_order_are_another_prefix() -> None:
    names = [
        wanted(messages=[USER, BOT]).prefixes[0],
        wanted(messages=[BOT, USER]).prefixes[0],
        wanted(messages=[USER, BOT], tools=[{"type": "function"}]).prefixes[0],
        wanted(messages=[USER, BOT], system="Be brief").prefixes[0],
    ]
    assert len(set(names)) == 4


def test_long_prompts_share_whole_blocks_and_short_ones_nothing() -> None:
    text = "x" * BLOCK
    assert wanted(prompt="Hello").prefixes == ()
    assert wanted(prompt=text + "a").prefixes == wanted(prompt=text + "b").prefixes
    assert wanted(prompt=text * 2).prefixes[1] == wanted(prompt=text).prefixes[0]


def test_prefixes_are_bounded_to_the_newest() -> None:
    long = wanted(messages=[USER] * (MAX_PREFIXES + 50)).prefixes
    assert len(long) == MAX_PREFIXES
    assert long[0] == wanted(messages=[USER] * (MAX_PREFIXES + 50)).prefixes[0]


def test_what_a_request_says_of_itself_is_read() -> None:
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:..."}}]}
    read = wanted(messages=[picture], tools=[{}], max_tokens=7, user="u1", service_tier="flex")
    assert (read.vision, read.tools, read.max_tokens, read.session, read.batch) == (True, True, 7, "u1", True)
    assert wanted({"X-Priority": "batch"}).batch
    assert wanted(messages=[{"content": "x" * 3000}]).prompt_tokens == 1000
    assert wanted(session_id="s", user="u").session == "s"


KEYS = st.sampled_from(["messages", "content", "prompt", "tools", "text", "type", "user"])


@given(
    st.dictionaries(
        KEYS,
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda v: st.lists(v) | st.dictionaries(KEYS, v),
        ),
    )
)
def test_no_body_is_too_strange(value: dict[str, Any]) -> None:
    read = read_wanted(value, {}, marked=True)
    assert all(isinstance(name, bytes) for name in read.prefixes)


HALF = rb'"\ud83d"'
"""Half of an emoji: JSON can say it, UTF-8 cannot."""


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[{"role":"user","content":%s}]}' % HALF,
        b'{"user":%s,"prompt":%s}' % (HALF, HALF),
        rb'{"prompt":"%s"}' % (rb"\ud83d" * 2 * BLOCK),
    ],
)
def test_half_a_character_is_no_trouble(body: bytes) -> None:
    read = read_wanted(read_object(body) or {}, {})
    Affinity().learn("m", read.prefixes, read.session, "a", 0)
    assert read.prefixes or read.session


def test_request_that_says_nothing_wants_nothing() -> None:
    assert read_wanted({}, {}) == NOTHING
    assert NOTHING.prefixes == ()


# ── warmth ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_longest_known_prefix_decides_and_a_session_where_none_is_known() -> None:
    memory = Affinity()
    memory.learn("m", [b"1"], "", "a", 0)
    memory.learn("m", [b"12", b"1"], "s", "b", 0)
    assert memory.warm("m", [b"123", b"12", b"1"], "", 1) == "b"
    assert memory.warm("m", [b"1"], "", 1) == "a"
    assert memory.warm("m", [b"x"], "s", 1) == "b"
    assert memory.warm("m", [b"x"], "", 1) is None
    assert memory.warm("other", [b"1"], "s", 1) is None


def test_prefix_grows_cold() -> None:
    memory = Affinity()
    memory.learn("m", [b"1"], "", "a", 0)
    assert memory.warm("m", [b"1"], "", LIFETIME) == "a"
    assert memory.warm("m", [b"1"], "", LIFETIME + 1) is None


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    memory = Affinity()
    for index in range(MAX_ENTRIES + 1):
        memory.learn("m", [str(index).encode()], "", "a", 0)
    assert memory.warm("m", [b"0"], "", 0) is None
    assert memory.warm("m", [b"1"], "", 0) == "a"

"""What is believed of this node's own addresses: scripted peers in virtual time, and any order of anything."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from libmesh.core.reachability import (
    MAX_CANDIDATES,
    MAX_OBSERVERS,
    Answered,
    Ask,
    Changed,
    Effect,
    Event,
    Gone,
    HereIs,
    MappedAre,
    Moved,
    Nat,
    Reachability,
    ReachConfig,
    Seen,
    Source,
    Standing,
    Wake,
)
from libmesh.peers import PeerId

CONFIG = ReachConfig()
HOME = HereIs(4001, ("/ip4/192.168.1.10/tcp/4001", "/ip4/127.0.0.1/tcp/4001"))
PUBLIC = HereIs(4001, ("/ip4/11.0.1.2/tcp/4001", "/ip4/127.0.0.1/tcp/4001"))
WAN = "/ip4/11.0.2.2/tcp/4001"
ANN, BOB, CAT = PeerId("ann"), PeerId("bob"), PeerId("cat")


def machine(here: HereIs = HOME) -> Reachability:
    made = Reachability(CONFIG, rng=random.Random(1))
    made.handle(here, 0.0)
    return made


def seen(peer: PeerId, ip: str = "11.0.2.2", port: int = 50000, local: int | None = 50000) -> Seen:
    return Seen(peer, ip, port, local)


def asked(effects: list[Effect]) -> list[Ask]:
    return [effect for effect in effects if isinstance(effect, Ask)]


def answer(made: Reachability, effects: list[Effect], reached: bool | None, now: float) -> list[Effect]:
    """Answer every question, and those that follow at once; all that was not a question."""
    told: list[Effect] = []
    while effects:
        effect = effects.pop(0)
        if isinstance(effect, Ask):
            effects += made.handle(Answered(effect.peer, effect.address, reached), now)
        else:
            told.append(effect)
    return told


def test_an_address_that_one_of_two_peers_names_is_not_believed() -> None:
    made = machine()
    made.handle(seen(ANN, "11.0.2.2"), 1.0)
    effects = made.handle(seen(BOB, "11.9.9.9"), 1.0)
    assert made.verdicts() == ()
    assert asked(effects) == []


def test_a_seen_address_is_told_once_two_peers_have_reached_it() -> None:
    made = machine()
    first = made.handle(seen(ANN), 1.0)
    assert asked(first) == [Ask(ANN, WAN)]
    assert made.addresses() == ()
    second = made.handle(seen(BOB), 1.0)
    assert made.handle(Answered(ANN, WAN, True), 2.0) == [Ask(BOB, WAN)]
    assert second == []
    assert made.handle(Answered(BOB, WAN, True), 3.0) == [Changed()]
    assert made.addresses() == (WAN,)
    assert made.standing is Standing.PUBLIC


def test_one_peer_that_cannot_reach_us_is_not_enough_where_there_are_more() -> None:
    made = machine()
    answer(made, [*made.handle(seen(ANN), 1.0), *made.handle(seen(BOB), 1.0)], True, 2.0)
    later = made.deadline()
    assert later is not None
    (question,) = asked(made.handle(Wake(), later))
    (other,) = asked(made.handle(Answered(question.peer, WAN, False), later))
    assert made.standing is Standing.PUBLIC
    made.handle(Answered(other.peer, WAN, False), later)
    assert made.standing.value == "private"
    assert made.addresses() == ()


def test_a_refusal_to_help_is_no_verdict() -> None:
    made = machine()
    answer(made, made.handle(seen(ANN), 1.0), None, 1.0)
    assert made.standing is Standing.UNKNOWN
    wait = made.deadline()
    assert wait is not None
    assert 1.0 + 0.75 * CONFIG.retry_min <= wait <= 1.0 + 1.25 * CONFIG.retry_min


def test_pauses_double_while_nobody_helps_and_a_newcomer_is_asked_at_once() -> None:
    made = machine()
    now, waits = 1.0, []
    effects = made.handle(seen(ANN), now)
    for _ in range(12):
        answer(made, effects, None, now)
        wait = made.deadline()
        assert wait is not None
        waits.append(wait - now)
        now = wait
        effects = made.handle(Wake(), now)
    assert all(later > earlier for earlier, later in pairwise(waits[:6]))
    assert max(waits) <= CONFIG.retry_max * 1.25
    answer(made, effects, None, now)
    assert [ask.peer for ask in asked(made.handle(seen(BOB), now + 0.01))] == [BOB]


def test_a_peer_that_never_answers_is_given_up() -> None:
    made = machine()
    made.handle(seen(ANN), 1.0)
    assert made.deadline() == 1.0 + CONFIG.answer_limit
    made.handle(Wake(), 1.0 + CONFIG.answer_limit)
    wait = made.deadline()
    assert wait is not None
    assert wait > 1.0 + CONFIG.answer_limit


def test_a_peer_that_leaves_while_asked_is_replaced_by_another() -> None:
    made = machine()
    made.handle(seen(ANN), 1.0)
    made.handle(seen(BOB), 1.0)
    assert asked(made.handle(Gone(ANN), 2.0)) == [Ask(BOB, WAN)]


def test_an_answer_that_nobody_asked_for_counts_for_nothing() -> None:
    made = machine()
    made.handle(seen(ANN), 1.0)
    assert made.handle(Answered(BOB, WAN, True), 1.0) == []
    assert made.handle(Answered(ANN, "/ip4/11.1.1.1/tcp/1", True), 1.0) == []
    assert made.standing is Standing.UNKNOWN


def test_a_mapping_is_told_until_it_is_disproved() -> None:
    made = machine()
    mapped = "/ip4/11.0.2.2/tcp/4002"
    assert made.handle(MappedAre((mapped,)), 1.0) == [Changed()]
    assert made.addresses() == (mapped,)
    effects = made.handle(seen(ANN), 1.0)
    answer(made, effects, False, 2.0)
    assert made.addresses() == ()
    assert (mapped, Source.MAPPED, False) in made.verdicts()


def test_a_public_host_is_proved_public_too() -> None:
    made = machine(PUBLIC)
    effects = made.handle(Seen(ANN, "11.0.1.2", 4001, None), 1.0)
    assert asked(effects) == [Ask(ANN, "/ip4/11.0.1.2/tcp/4001")]
    answer(made, effects, True, 1.0)
    assert made.standing is Standing.PUBLIC


def test_peers_near_us_are_neither_believed_nor_asked() -> None:
    made = machine()
    assert made.handle(seen(ANN, "192.168.1.10"), 1.0) == []
    assert made.handle(seen(BOB, "not an address"), 1.0) == []
    assert made.observed == ()
    assert made.deadline() is None


def test_what_becomes_of_ports_tells_the_kind_of_router() -> None:
    made = machine()
    assert made.nat.name == "UNKNOWN"
    made.handle(Seen(ANN, "11.0.2.2", 4001, None), 1.0)
    assert made.nat.name == "UNKNOWN"
    made.handle(seen(BOB), 1.0)
    assert made.nat.name == "KEEPS"
    made.handle(seen(CAT, port=1234), 1.0)
    assert made.nat.name == "CHANGES"
    public = machine(PUBLIC)
    public.handle(seen(ANN, "11.0.1.2"), 1.0)
    assert public.nat is Nat.NONE


def test_after_a_move_all_is_asked_again() -> None:
    made = machine()
    answer(made, made.handle(seen(ANN), 1.0), True, 1.0)
    assert Changed() in made.handle(Moved(), 2.0)
    assert made.observed == ()
    assert made.standing is Standing.UNKNOWN
    assert asked(made.handle(seen(ANN), 2.0)) == [Ask(ANN, WAN)]


def test_a_punch_meets_us_at_our_port_wherever_we_were_seen() -> None:
    made = machine()
    made.handle(seen(ANN), 1.0)
    made.handle(seen(BOB, "11.9.9.9"), 1.0)
    assert made.guesses() == ("/ip4/11.9.9.9/tcp/4001", WAN)


def test_what_is_remembered_is_bounded() -> None:
    made = machine(HereIs(4001, (), tuple(f"/ip4/11.0.0.{n}/tcp/1" for n in range(100))))
    for number in range(100):
        made.handle(seen(PeerId(f"peer{number}")), float(number))
    assert len(made.verdicts()) == MAX_CANDIDATES
    made.handle(Gone(PeerId("peer0")), 200.0)
    assert made.observed == ("11.0.2.2",)
    assert len(made._seen) == MAX_OBSERVERS


peers = st.sampled_from([ANN, BOB, CAT])
wan = st.sampled_from(["11.0.2.2", "11.0.3.2", "10.0.0.1", "2001:db9::1"])
addresses = st.sampled_from([WAN, "/ip4/11.0.3.2/tcp/4001", "/ip4/11.0.1.2/tcp/4001"])
events: st.SearchStrategy[Event] = st.one_of(
    st.sampled_from([HOME, PUBLIC]),
    st.builds(MappedAre, st.lists(addresses, max_size=2).map(tuple)),
    st.builds(Seen, peers, wan, st.integers(1, 9), st.integers(1, 9) | st.none()),
    st.builds(Gone, peers),
    st.builds(Answered, peers, addresses, st.sampled_from([True, False, None])),
    st.just(Moved()),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(events, st.floats(0, 100)), max_size=30))
def test_waking_moves_the_deadline_on_and_nobody_is_asked_twice_at_a_time(
    steps: list[tuple[Event, float]],
) -> None:
    made, now = machine(), 0.0
    asking: set[PeerId] = set()
    for event, pause in steps:
        now += pause
        for effect in made.handle(event, now):
            if isinstance(effect, Ask):
                assert effect.address in {address for address, _, _ in made.verdicts()}
        asking = {c.asking for c in made._candidates.values() if c.asking is not None}
        assert len(asking) == sum(c.asking is not None for c in made._candidates.values())
        deadline = made.deadline()
        if deadline is not None and deadline <= now:
            made.handle(Wake(), now)
            after = made.deadline()
            assert after is None or after > now


def test_before_this_node_listens_there_is_nothing_to_ask() -> None:
    made = Reachability(CONFIG, rng=random.Random(1))
    assert made.handle(seen(ANN), 0.0) == []
    assert made.verdicts() == ()

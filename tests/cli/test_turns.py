"""Who is next at a server that several nodes ask: as tables, and with random requests."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.turns import LineFull, Turns


def asked(turns: Turns[str], peer: str, count: int) -> list[str]:
    """The tickets that had their turn at once, of `count` that `peer` asks for."""
    return [ticket for number in range(count) for ticket in turns.ask(peer, f"{peer}{number}")]


def test_with_room_nobody_waits_and_then_one_waits_in_line() -> None:
    turns = Turns[str](places=2, line=9)
    assert asked(turns, "a", 4) == ["a0", "a1"]
    assert (turns.held, turns.waiting) == (2, 2)
    assert turns.done("a", 1.0) == ["a2"]
    assert turns.done("a", 1.0) == ["a3"]


def test_newcomer_has_its_share_at_once_though_another_took_all() -> None:
    turns = Turns[str](places=6, line=9)
    asked(turns, "greedy", 15)
    assert asked(turns, "modest", 4) == ["modest0", "modest1", "modest2"]
    assert turns.held == 9


def test_free_places_go_to_whoever_has_the_fewest_until_shares_are_equal() -> None:
    turns = Turns[str](places=4, line=99)
    asked(turns, "greedy", 50)
    asked(turns, "modest", 50)
    held = Counter(greedy=4, modest=2)
    for _ in range(6):
        victim = "greedy" if held["greedy"] > 2 else "modest"
        held[victim] -= 1
        for ticket in turns.done(victim, 1.0):
            held[ticket.rstrip("0123456789")] += 1
    assert held == Counter(greedy=2, modest=2)


def test_equals_take_turns_where_there_are_more_of_them_than_places() -> None:
    turns = Turns[str](places=1, line=9)
    for peer in "abc":
        asked(turns, peer, 5)
    served = ["a", "b", "c"]  # one each, whoever else is there
    for _ in range(9):
        served += [ticket[0] for ticket in turns.done(served[len(served) - 3], 1.0)]
    assert Counter(served) == Counter(a=4, b=4, c=4)


def test_full_line_tells_the_time_by_the_measured_rate_and_holds_up_nobody_else() -> None:
    turns = Turns[str](places=2, line=3)
    for _ in range(60):
        turns.ask("a", "x")
        turns.done("a", 1.99)
    asked(turns, "a", 5)
    with pytest.raises(LineFull) as caught:
        turns.ask("a", "too many")
    assert caught.value.wait == 4  # 4 requests of hardly 2 s at 2 places
    assert asked(turns, "b", 1) == ["b0"]


def test_who_leaves_the_line_makes_room_in_it() -> None:
    turns = Turns[str](places=1, line=2)
    asked(turns, "a", 3)
    turns.leave("a", "a1")
    turns.ask("a", "late")
    assert turns.done("a") == ["a2"]
    assert turns.done("a") == ["late"]


def test_nothing_is_remembered_of_peers_that_are_gone() -> None:
    turns = Turns[str](places=1, line=2)
    for number in range(50):
        asked(turns, f"p{number}-", 2)
        turns.leave(f"p{number}-", f"p{number}-1")
        turns.done(f"p{number}-", 1.0)
    assert (dict(turns._held), turns._lines, turns._served) == ({}, {}, {})


@given(st.integers(1, 6), st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=120))
def test_no_place_stays_empty_while_somebody_waits_and_there_are_never_too_many(
    places: int, acts: list[tuple[str, bool]]
) -> None:
    turns = Turns[tuple[str, int]](places=places, line=20)
    held: Counter[str] = Counter()
    for number, (peer, asks) in enumerate(acts):
        if asks:
            try:
                turned = turns.ask(peer, (peer, number))
            except LineFull:
                continue
        elif held[peer]:
            held[peer] -= 1
            turned = turns.done(peer, 1.0)
        else:
            continue
        held.update(name for name, _ in turned)
        assert turns.held == held.total()
        assert not turns.waiting or turns.held >= places
        assert turns.held <= 2 * places + 4
        for waiting in turns._lines:
            assert held[waiting] >= 1

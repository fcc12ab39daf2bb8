"""Who takes which model: the rules one by one, and what must hold for any view."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.placement.demand import (
    MAX_MODELS,
    Asked,
    Demand,
    DemandConfig,
    Looked,
    Row,
    Settled,
    Take,
    Window,
    choose_moves,
)

CONFIG = DemandConfig()
GB = 1 << 30


def standby(peer: str, *models: str, spare: int = GB, **more: object) -> Row:
    return Row(**({"peer": peer, "has": dict.fromkeys(models, GB), "spare": spare} | more))


def server(peer: str, model: str, *others: str, **more: object) -> Row:
    return standby(peer, model, *others, **({"spare": 0, "serves": frozenset({model})} | more))


def client(**asked: float) -> Row:
    return Row(peer="client", asked=asked, standby=False)


# ── what is wanted ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_requests_weigh_less_with_time() -> None:
    window = Window(100.0)
    for _ in range(100):
        window.add("m", 0.0)
    assert window.told(0.0) == {"m": 96.0}
    assert window.told(100.0) == {"m": 32.0}  # 36.8
    assert window.told(1000.0) == {}


def test_counts_are_bounded_and_the_least_asked_for_is_forgotten() -> None:
    window = Window(100.0)
    for index in range(MAX_MODELS):
        window.add(f"m{index}", 0.0)
        window.add(f"m{index}", 0.0)
    window.add("one more", 0.0)
    window.add("and one", 0.0)
    told = window.told(0.0)
    assert len(told) == MAX_MODELS
    assert "and one" in told
    assert "one more" not in told


def test_what_only_the_gone_asked_for_is_not_wanted() -> None:
    assert choose_moves([client(m=50.0), standby("a", "m")], CONFIG) == {"a": Take("m", (), True)}
    assert choose_moves([standby("a", "m")], CONFIG) == {}


def test_named_model_is_wanted_without_any_request() -> None:
    wanting = Row(peer="w", wants=frozenset({"m"}), standby=False)
    assert choose_moves([wanting, standby("a", "m")], CONFIG) == {"a": Take("m", (), True)}


# ── who takes it ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_one_takes_a_model_and_models_spread() -> None:
    names = [f"m{index}" for index in range(5)]
    moves = choose_moves(
        [client(**dict.fromkeys(names, 2.0)), *(standby(f"p{i}", *names) for i in range(9))], CONFIG
    )
    assert sorted(move.model for move in moves.values()) == names
    assert len(moves) == 5


def test_node_with_one_choice_takes_it_and_leaves_the_other_to_the_other() -> None:
    moves = choose_moves([client(a=5.0, b=4.0), standby("p", "a", "b"), standby("q", "a")], CONFIG)
    assert {peer: move.model for peer, move in moves.items()} == {"p": "b", "q": "a"}


@pytest.mark.parametrize(
    "cannot",
    [
        standby("x", "other"),
        standby("x", "m", spare=GB - 1),
        standby("x", "m", standby=False),
        standby("x", "m", refused=frozenset({"m"})),
    ],
    ids=["not on disk", "does not fit", "no standby", "could not load it"],
)
def test_who_cannot_is_not_asked(cannot: Row) -> None:
    assert choose_moves([client(m=9.0), cannot], CONFIG) == {}


def test_served_model_gets_a_server_more_at_ten_requests_each_and_thrice_the_coldest() -> None:
    def moves(hot: float, cold: float) -> dict[str, Take]:
        rows = [client(hot=hot, cold=cold), server("h", "hot"), server("c", "cold"), standby("s", "hot")]
        return choose_moves(rows, CONFIG)

    assert moves(10.0, 3.0) == {"s": Take("hot")}
    assert moves(9.9, 3.0) == {}
    assert moves(10.0, 3.4) == {}


def test_model_that_nobody_asks_for_makes_no_other_hot() -> None:
    rows = [client(hot=12.0, warm=10.0), server("h", "hot"), server("w", "warm"), server("i", "idle")]
    assert choose_moves([*rows, standby("s", "hot")], CONFIG) == {}


def test_long_line_gets_a_server_more_whatever_the_others_have() -> None:
    waiting = Row(peer="client", asked={"m": 5.0, "n": 5.0}, queued={"m": 4}, standby=False)
    rows = [waiting, server("a", "m"), server("b", "n"), standby("s", "m")]
    assert choose_moves(rows, CONFIG) == {"s": Take("m")}


def test_idle_model_makes_room_and_one_in_use_keeps_its_last_server() -> None:
    held = server("a", "old", "m")
    assert choose_moves([client(m=1.0), held], CONFIG) == {"a": Take("m", ("old",), True)}
    assert choose_moves([client(m=99.0, old=1.0), held], CONFIG) == {}
    second = server("b", "old")
    assert choose_moves([client(m=1.0, old=9.0), held, second], CONFIG) == {"a": Take("m", ("old",), True)}


def test_what_its_operator_named_is_never_dropped() -> None:
    held = server("a", "old", "m", wants=frozenset({"old"}))
    assert choose_moves([client(m=99.0), held, server("b", "old")], CONFIG) == {}


def test_resting_node_takes_only_what_nobody_serves_and_drops_nothing() -> None:
    assert choose_moves([client(m=50.0), server("h", "m"), standby("s", "m", rests=True)], CONFIG) == {}
    assert choose_moves([client(m=1.0), standby("s", "m", rests=True)], CONFIG) == {"s": Take("m", (), True)}
    assert choose_moves([client(m=1.0), server("s", "old", "m", rests=True)], CONFIG) == {}


# ── when ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_unserved_model_is_taken_after_a_moment_and_once() -> None:
    demand, rows = Demand("a"), (client(m=1.0), standby("a", "m"))
    assert demand.handle(Looked(rows), 10.0) == []
    assert demand.deadline() == 10.0 + CONFIG.settle
    assert demand.handle(Looked(rows), 11.0) == [Take("m", (), True)]
    assert demand.handle(Looked(rows), 12.0) == []
    assert demand.deadline() is None


def test_busy_model_must_be_seen_busy_all_the_while() -> None:
    demand = Demand("s")
    busy = (client(m=50.0), server("h", "m"), standby("s", "m"))
    calm = (client(m=5.0), server("h", "m"), standby("s", "m"))
    assert demand.handle(Looked(busy), 0.0) == []
    assert demand.handle(Looked(calm), 10.0) == []
    assert demand.handle(Looked(busy), 14.0) == []
    assert demand.handle(Looked(busy), 14.0 + CONFIG.patience - 0.1) == []
    assert demand.handle(Looked(busy), 14.0 + CONFIG.patience) == [Take("m")]


def test_model_that_could_not_be_loaded_is_left_to_others_for_a_while() -> None:
    demand, rows = Demand("a"), (client(m=1.0), standby("a", "m"))
    demand.handle(Looked(rows), 0.0)
    demand.handle(Looked(rows), 1.0)
    demand.handle(Settled("m", failed=True), 2.0)
    assert demand.handle(Looked(rows), 3.0) == []
    assert demand.announced(rows[1], 3.0).refused == {"m"}
    later = 2.0 + CONFIG.rest
    assert demand.handle(Looked(rows), later) == []
    assert demand.handle(Looked(rows), later + CONFIG.settle) == [Take("m", (), True)]


def test_own_requests_are_announced() -> None:
    demand = Demand("a")
    for _ in range(3):
        demand.handle(Asked("m"), 5.0)
    assert demand.announced(standby("a"), 5.0).asked == {"m": 3.0}


# ── any view ─────────────────────────────────────────────────────────────────────────────────────────────────────────

models = st.sampled_from(["m", "n", "o"])
rows = st.lists(
    st.builds(
        Row,
        peer=st.sampled_from([f"p{index}" for index in range(9)]),
        asked=st.dictionaries(models, st.floats()),
        queued=st.dictionaries(models, st.integers(-5, 50)),
        wants=st.frozensets(models, max_size=1),
        serves=st.frozensets(models, max_size=2),
        has=st.dictionaries(models, st.integers(1, 5)),
        spare=st.integers(0, 5),
        standby=st.booleans(),
        rests=st.booleans(),
    ),
    unique_by=lambda row: row.peer,
)


@given(rows, st.randoms(use_true_random=False))
def test_every_node_decides_the_same_and_nobody_beyond_its_means(view: list[Row], rng: random.Random) -> None:
    moves = choose_moves(view, CONFIG)
    shuffled = view.copy()
    rng.shuffle(shuffled)
    assert choose_moves(shuffled, CONFIG) == moves
    by_peer = {row.peer: row for row in view}
    for peer, move in moves.items():
        row = by_peer[peer]
        assert row.standby
        assert move.model in row.has
        assert move.model not in row.serves
        assert not set(move.drops) & row.wants
        assert set(move.drops) <= row.serves
        assert row.has[move.model] <= row.spare + sum(row.has[dropped] for dropped in move.drops)


@given(st.lists(rows, max_size=5), st.lists(st.floats(0.0, 100.0), min_size=5, max_size=5))
def test_handling_a_wake_up_moves_the_deadline_on(views: list[list[Row]], gaps: list[float]) -> None:
    demand, now = Demand("p0"), 0.0
    for view, gap in zip(views, gaps, strict=False):
        now += gap
        for take in demand.handle(Looked(tuple(view)), now):
            demand.handle(Settled(take.model, failed=gap > 50), now)
        for _ in range(5):
            if (deadline := demand.deadline()) is None:
                break
            now = max(now, deadline)
            taken = demand.handle(Looked(tuple(view)), now)
            assert (after := demand.deadline()) is None or after > now
            for take in taken:
                demand.handle(Settled(take.model), now)


@pytest.mark.parametrize("wrong", [{"window": 0.0}, {"busy": -1.0}, {"rest": float("nan")}])
def test_wrong_configuration_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DemandConfig(**wrong)

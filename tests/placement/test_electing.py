from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.placement.electing import elect, predict
from libmesh_node.placement.machine import Machine
from libmesh_node.placement.splitting import (
    OVERHEAD,
    Placement,
    Shortage,
    SplitRules,
    cut_layers,
    needed,
)
from libmesh_node.planning import unheeded

from tests.placement.machines import GB, machine, shape


def placed(outcome: Placement | Shortage) -> Placement:
    assert isinstance(outcome, Placement), str(outcome)
    return outcome


def test_one_that_fits_serves_alone() -> None:
    best = placed(elect(shape(), [machine("a", 30), machine("b", 44), machine("c", 20)]))
    assert (best.host, best.workers) == ("b", ())
    assert best.home.layers == 41


def test_the_margin_is_a_tenth_and_the_cache() -> None:
    need = needed(shape(kv=1000))
    assert need == int(40 * GB * OVERHEAD) + 40 * 1000 * 4096
    assert placed(elect(shape(kv=1000), [machine("a", need / GB)])).workers == ()
    assert isinstance(elect(shape(kv=1000), [machine("a", (need - 1) / GB)]), Shortage)


def test_the_faster_of_two_that_fit_serves() -> None:
    machines = [machine("a", 44, bandwidth=50e9), machine("b", 44, bandwidth=100e9)]
    assert placed(elect(shape(), machines)).host == "b"


def test_the_nearest_are_taken_until_there_is_enough() -> None:
    machines = [machine("a", 24, None), machine("b", 24, None), machine("c", 24, None)]
    machines[0] = replace(machines[0], rtts={"b": 0.02, "c": 0.01}, bandwidth=1e12)
    best = placed(elect(shape(), machines))
    assert best.members == ("c", "a")
    told = {verdict.peer: (verdict.taken, verdict.why) for verdict in best.verdicts}
    assert told == {"b": (False, "not needed (20 ms)"), "c": (True, "10 ms, 24.0 GB")}


@pytest.mark.parametrize(
    ("worker", "why"),
    [
        (machine("b", 30, 0.14), "140 ms, over the limit of 80 ms"),
        (machine("b", 30, None), "its distance is not known yet"),
        (machine("b", 30, relayed=frozenset("a")), "reached over a relay only"),
        (machine("b", 30, excluded="another file"), "another file"),
        (machine("b", 30, lends=False), "it lends nothing"),
    ],
)
def test_who_cannot_be_taken_is_named_with_the_reason(worker: Machine, why: str) -> None:
    host = machine("a", 31, None, lends=False)
    short = elect(shape(), [host, worker])
    assert isinstance(short, Shortage)
    assert [(verdict.peer, verdict.taken, verdict.why) for verdict in short.verdicts] == [("b", False, why)]
    assert str(short) == f"need 44.0 GB, have 31.0 GB from 0 peers; peer b refused: {why}"


def test_a_crowd_that_cannot_be_taken_is_counted() -> None:
    crowd = [machine(f"b{number}", 1, excluded="another file") for number in range(100)]
    words = str(elect(shape(), [machine("a", 31), *crowd]))
    assert words.count("another file") == 8
    assert words.endswith("; and 92 more")


def test_only_eligible_memory_counts() -> None:
    """The first mesh counted peers beyond the limit, and then loaded alone with too little."""
    far = [machine(peer, 30, 0.2) for peer in "bcd"]
    assert isinstance(elect(shape(), [machine("a", 30, 0.2), *far]), Shortage)


def test_the_limit_can_be_moved() -> None:
    machines = [machine("a", 30, 0.2), machine("b", 30, 0.2)]
    assert placed(elect(shape(), machines, SplitRules(max_rtt=0.2))).members in (("a", "b"), ("b", "a"))


def test_a_split_can_be_forced_and_waited_for() -> None:
    machines = [machine("a", 50), machine("b", 50)]
    assert len(placed(elect(shape(), machines, SplitRules(force=True))).workers) == 1
    waiting = elect(shape(), machines, SplitRules(min_peers=2))
    assert isinstance(waiting, Shortage)
    assert str(waiting) == "waiting for 2 peers with the model, there are 1"


def test_ratios_are_honoured_in_the_order_of_members() -> None:
    """The first mesh took --tensor-split and ignored it."""
    machines = [machine("a", 40, bandwidth=1e12, accelerated=True), machine("b", 40)]
    best = placed(elect(shape(), machines, SplitRules(ratios=(1, 3))))
    assert best.members == ("b", "a")
    assert (best.workers[0].layers, best.home.layers) == (10, 31)


def test_ratios_that_do_not_fit_are_refused_with_what_is_too_much() -> None:
    """They were tried again and again."""
    outcome = elect(shape(), [machine("a", 30), machine("b", 30)], SplitRules(ratios=(9, 1)))
    assert isinstance(outcome, Shortage)
    assert str(outcome) == "--tensor-split gives peer b 36.0 GB of the model, and it has 30.0 GB"


def test_ratios_for_another_number_of_machines_leave_it_to_memory() -> None:
    machines = [machine("a", 28), machine("b", 14), machine("c", 14)]
    for ratios in ((3, 1), (1, 1, 1, 1)):
        best = placed(elect(shape(), machines, SplitRules(ratios=ratios)))
        assert {share.peer: share.layers for share in (*best.workers, best.home)}["a"] > 16
        assert all(share.granted < 14 * GB for share in (*best.workers, best.home) if share.peer != "a")
        assert unheeded(best, SplitRules(ratios=ratios))
    assert not unheeded(best, SplitRules(ratios=(1, 1, 1)))
    assert not unheeded(best, SplitRules())


def test_the_host_is_one_whose_llama_cpp_takes_its_workers() -> None:
    """A newer minor version takes an older one, and not the other way round."""
    older, newer = machine("a", 30, protocol="7.0.0"), machine("b", 30, protocol="7.1.0")
    best = placed(elect(shape(), [older, newer]))
    assert (best.host, [share.peer for share in best.workers]) == ("b", ["a"])
    alien = elect(shape(), [older, machine("b", 30, protocol="8.0.0")])
    assert "it speaks llama.cpp's RPC protocol 8.0.0, its host would speak 7.0.0" in str(alien)


def test_who_has_no_rpc_server_hosts_nobody_and_serves_alone_what_fits() -> None:
    """Its peers waited for it for ever."""
    lone = machine("a", 45, bandwidth=1e12, lends=False)
    others = [machine("b", 30, protocol="7.0.0"), machine("c", 30, protocol="7.0.0")]
    assert placed(elect(shape(), [lone, *others])).host == "a"
    best = placed(elect(shape(50), [lone, *others]))
    assert {best.host, *(share.peer for share in best.workers)} == {"b", "c"}


def test_shares_follow_memory() -> None:
    best = placed(elect(shape(), [machine("a", 36, accelerated=True, bandwidth=1e12), machine("b", 12)]))
    assert [(share.peer, share.layers) for share in best.workers] == [("b", 10)]
    assert best.home.layers == 31


def test_gpu_memory_beats_more_of_a_slow_one() -> None:
    """The first mesh's election went by total bytes."""
    gpu, box = machine("a", 24, accelerated=True, bandwidth=900e9), machine("b", 96, bandwidth=30e9)
    assert placed(elect(shape(20), [gpu, box])).host == "a"


PEERS = "abcde"
machines_of_any_kind = st.lists(
    st.builds(
        Machine,
        peer=st.sampled_from(PEERS),
        memory=st.integers(0, 60 * GB),
        bandwidth=st.sampled_from([0.0, 20e9, 400e9, 1e12]),
        accelerated=st.booleans(),
        lends=st.booleans(),
        rtts=st.dictionaries(st.sampled_from(PEERS), st.floats(0, 0.2)),
        relayed=st.frozensets(st.sampled_from(PEERS), max_size=1),
        excluded=st.sampled_from(["", "", "", "another file"]),
    ),
    max_size=5,
    unique_by=lambda machine: machine.peer,
)


@given(machines_of_any_kind, st.booleans(), st.randoms(use_true_random=False))
def test_every_node_finds_the_same(machines: list[Machine], force: bool, rng: random.Random) -> None:
    rules = SplitRules(force=force)
    shuffled = list(machines)
    rng.shuffle(shuffled)
    assert elect(shape(), machines, rules) == elect(shape(), shuffled, rules)


@given(machines_of_any_kind)
def test_a_placement_holds_the_whole_model_once(machines: list[Machine]) -> None:
    outcome = elect(shape(), machines)
    if isinstance(outcome, Shortage):
        return
    shares = (*outcome.workers, outcome.home)
    assert sum(share.layers for share in shares) == 41
    by_peer = {machine.peer: machine for machine in machines}
    assert sum(by_peer[share.peer].memory for share in shares) >= needed(shape())
    for share in outcome.workers:
        assert share.rtt <= 0.08
        assert by_peer[share.peer].lends
        assert not by_peer[share.peer].excluded


@given(
    st.lists(st.integers(0, 10**10), min_size=1, max_size=50),
    st.lists(st.floats(0, 1e12), min_size=1, max_size=5),
)
def test_every_piece_goes_to_one_machine(sizes: list[int], weights: list[float]) -> None:
    for limits in (None, [10**10] * len(weights)):
        counts = cut_layers(sizes, weights, limits)
        assert sum(counts) == len(sizes)
        assert min(counts) >= 0


def test_who_got_too_much_gives_to_a_neighbour() -> None:
    assert cut_layers([10, 10, 10, 50], [1, 1], None) == [3, 1]
    assert cut_layers([40, 10, 10, 10], [1, 1], [45, 45]) == [1, 3]
    assert cut_layers([30, 30, 30], [1, 1], [31, 70]) == [1, 2]


def test_a_running_placement_is_judged_by_who_is_there() -> None:
    machines = [machine("a", 24, bandwidth=1e12), machine("b", 24)]
    best = placed(elect(shape(), machines))
    assert predict(shape(), best, machines) == pytest.approx(best.tokens_per_second)
    slower = [machine("a", 24, 0.1, bandwidth=1e12), machine("b", 24, 0.1)]
    assert (predict(shape(), best, slower) or 0) < best.tokens_per_second
    assert predict(shape(), best, machines[:1]) is None

"""Whole meshes in virtual time: all come to know the truth, whatever is lost, late, stopped, cut or lied about."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from libmesh.core.liveness import LivenessConfig
from libmesh.core.membership_io import MembershipConfig
from libmesh.peers import PeerId, PeerState
from libmesh.testing.simulator import Lie, Link, Simulator

SEEDS = [1, 2, 3]
TEN_MINUTES = 600.0


def lan(seed: int, *, loss: float = 0.0) -> Simulator:
    return Simulator(seed=seed, link=Link.lan(loss=loss))


def wan(seed: int, *, loss: float = 0.0) -> Simulator:
    return Simulator(
        seed=seed,
        link=Link.wan(loss=loss),
        membership=MembershipConfig.wan(),
        liveness=LivenessConfig.wan(),
    )


def settled(world: Simulator, count: int) -> Simulator:
    world.settle(count)
    assert world.agreed(), world
    return world


# ── the simulator itself ─────────────────────────────────────────────────────────────────────────────────────────


def history(seed: int) -> list[object]:
    world = settled(lan(seed, loss=0.1), 12)
    world.kill(world.peer(0))
    world.run(5)
    world.restart(world.peer(0))
    world.run(20)
    return [
        world.now,
        world.deaths,
        world.suspicions,
        [(k, t.messages, t.size) for k, t in world.traffic.items()],
    ]


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    assert history(1) == history(1)
    assert history(1) != history(2)


def test_a_simulation_says_its_seed() -> None:
    assert "seed=42" in repr(Simulator(seed=42))


def test_only_what_runs_is_stopped_and_only_what_is_stopped_starts() -> None:
    world = settled(lan(1), 3)
    with pytest.raises(ValueError, match="is running"):
        world.restart(world.peer(0))
    world.kill(world.peer(0))
    with pytest.raises(ValueError, match="is not running"):
        world.kill(world.peer(0))


# ── coming, going, coming back ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [lan, wan])
def test_a_mesh_that_grows_peer_by_peer_knows_itself(make: Callable[..., Simulator]) -> None:
    world = make(seed=4)
    for _ in range(45):  # across the bound of the full mesh
        world.join()
        world.run(0.2)
    assert world.run_until(world.agreed, limit=10) is not None, world
    assert world.false_deaths == []


@pytest.mark.parametrize(("count", "make"), [(10, lan), (100, lan), (100, wan)])
def test_a_joiner_is_known_everywhere_within_five_seconds(count: int, make: Callable[..., Simulator]) -> None:
    world = settled(make(seed=5), count)
    joined = world.join()
    took = world.run_until(lambda: world.known(joined) and world.agreed(), limit=5)
    assert took is not None, world


@pytest.mark.parametrize("count", [5, 100])
def test_a_clean_leave_is_known_within_a_second(count: int) -> None:
    world = settled(lan(6), count)
    left = world.peer(1)
    world.leave(left)
    assert world.run_until(lambda: world.gone(left), limit=1) is not None, world
    world.run(20)
    assert world.opinions(left) == {PeerState.LEFT: count - 1}


@pytest.mark.parametrize(("make", "limit"), [(lan, 5.0), (wan, 15.0)])
@pytest.mark.parametrize("count", [2, 10, 33, 100])
def test_a_killed_peer_is_known_to_be_dead_in_time(
    count: int, make: Callable[..., Simulator], limit: float
) -> None:
    world = settled(make(seed=7), count)
    world.run(3)
    world.kill(world.peer(0))
    assert world.run_until(lambda: world.gone(world.peer(0)), limit=limit) is not None, world
    assert world.false_deaths == []


def test_who_has_just_begun_to_dial_a_machine_that_vanished_knows_in_time_too() -> None:
    """Where others die first, their neighbours look for new ones, among whom are some that have vanished meanwhile."""
    world = settled(wan(24), 100)
    running = [peer.peer for peer in world.running]
    killed, gone = running[:10], running[10:15]
    for peer in killed:
        world.kill(peer)
    assert world.run_until(lambda: all(map(world.gone, killed)), limit=15) is not None, world
    for peer in gone:
        world.vanish(peer)
    assert world.run_until(lambda: all(map(world.gone, gone)), limit=15) is not None, world
    assert world.false_deaths == []


def test_a_tenth_of_a_mesh_that_vanishes_at_once_is_known_to_be_gone() -> None:
    world = settled(lan(8), 100)
    gone = [world.peer(number) for number in range(10)]
    for peer in gone:
        world.vanish(peer)
    assert world.run_until(lambda: all(map(world.gone, gone)), limit=15) is not None, world
    assert world.false_deaths == []


@pytest.mark.parametrize("clock_error", [0.0, -3600.0])
@pytest.mark.parametrize("count", [3, 50])
def test_a_restarted_peer_is_never_taken_for_its_ghost(count: int, clock_error: float) -> None:
    world = settled(lan(9), count)
    peer = world.peer(0)
    for downtime in (0.5, 6.0):  # before and after it was taken for dead
        world.kill(peer)
        world.run(downtime)
        world.restart(peer, clock_error=clock_error)
        assert world.run_until(world.agreed, limit=8) is not None, world
        world.run(10)
        assert world.agreed(), world


def test_a_mesh_comes_back_when_everybody_restarts() -> None:
    world = settled(lan(10), 20)
    everybody = list(world.peers)
    for peer in everybody:
        world.kill(peer)
    world.run(60)
    for peer in everybody:
        world.restart(peer)
    assert world.run_until(world.agreed, limit=15) is not None, world


# ── loss, pauses, slowness ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [2, 10])
def test_nobody_dies_of_a_fifth_of_all_packets_lost_for_ten_minutes(count: int) -> None:
    world = settled(lan(11, loss=0.2), count)
    world.run(TEN_MINUTES)
    assert world.false_deaths == []
    assert world.agreed(), world


def test_in_a_mesh_of_two_nobody_dies_of_losses_and_pauses() -> None:
    for seed in SEEDS:
        world = settled(lan(seed, loss=0.2), 2)
        for number in range(100):
            world.pause(world.peer(number % 2), 2.0)
            world.run(TEN_MINUTES / 100)
        assert world.suspicions > 0
        assert world.false_deaths == []


@pytest.mark.parametrize("count", [2, 10, 60])
def test_nobody_dies_of_pauses_of_two_seconds(count: int) -> None:
    world = settled(lan(12), count)
    for number in range(60):
        world.pause(world.peer(number % count), 2.0)
        world.run(5)
    assert world.false_deaths == []
    assert world.agreed(), world


def test_a_slow_peer_stays_alive() -> None:
    world = settled(lan(13), 10)
    world.slow(world.peer(0), 0.4)
    world.run(120)
    assert world.false_deaths == []


def test_where_lost_probes_stay_lost_others_help_and_gossip_refutes() -> None:
    world = settled(Simulator(seed=14, link=Link(latency=(0.001, 0.01), loss=0.2, retransmit=None)), 20)
    world.run(120)
    assert world.suspicions > 0
    assert world.false_deaths == []


# ── partitions ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("count", "make"), [(2, lan), (10, lan), (10, wan), (50, lan)])
@pytest.mark.parametrize("lasting", [1.0, 8.0, 40.0])
def test_a_parted_mesh_heals_within_ten_seconds(
    count: int, make: Callable[..., Simulator], lasting: float
) -> None:
    world = settled(make(seed=15), count)
    half = list(world.peers)[: count // 2]
    world.part(half)
    world.run(lasting)
    world.heal()
    assert world.run_until(world.agreed, limit=10) is not None, world
    world.run(10)
    assert world.agreed(), world
    assert world.false_deaths == []


@pytest.mark.parametrize(("count", "limit"), [(2, 45.0), (8, 30.0)])
def test_a_mesh_that_was_parted_for_so_long_that_it_forgot_itself_is_one_again(
    count: int, limit: float
) -> None:
    world = settled(lan(21), count)
    world.part(list(world.peers)[: count // 2])
    world.run(700)
    assert world.opinions(world.peer(0)) == ({PeerState.ALIVE: count // 2 - 1} if count > 2 else {})
    world.heal()
    assert world.run_until(world.agreed, limit=limit) is not None, world
    assert world.false_deaths == []


@pytest.mark.parametrize(("make", "limit"), [(lan, 5.0), (wan, 15.0)])
@pytest.mark.parametrize("count", [2, 3, 10, 60])
def test_a_vanished_machine_is_known_to_be_gone_in_time(
    count: int, make: Callable[..., Simulator], limit: float
) -> None:
    world = settled(make(seed=22), count)
    for _ in range(4):
        world.run(5 + world.rng.random())
        gone = world.rng.choice(world.running).peer
        world.vanish(gone)
        assert world.run_until(lambda gone=gone: world.gone(gone), limit=limit) is not None, world  # type: ignore[misc]
        world.restart(gone)
        world.run(15)
    assert world.false_deaths == []


def test_what_a_peer_says_in_an_idle_mesh_does_not_grow_with_it() -> None:
    quiet: list[float] = []
    gossip: list[float] = []
    for count in (30, 120):
        world = settled(lan(23), count)
        world.run(120)
        sizes = {kind: sent.size / 120 / count for kind, sent in world.traffic.items()}
        gossip.append(sizes.pop("gossip"))
        quiet.append(sum(sizes.values()))
    assert quiet[1] < 1.1 * quiet[0]
    assert gossip[1] < 2 * gossip[0]  # a dozen announcements, at random times; four times as many would be 4


def test_in_a_long_partition_each_side_takes_the_other_for_dead() -> None:
    world = settled(lan(16), 10)
    half = list(world.peers)[:5]
    world.part(half)
    world.run(30)
    assert all(world.opinions(peer) == {PeerState.ALIVE: 4, PeerState.DEAD: 5} for peer in world.peers)


# ── liars ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lies", [Lie.FORGE, Lie.REPLAY, Lie.SUSPECT, Lie.DIGEST, Lie.ALL])
@pytest.mark.parametrize("count", [6, 50])
def test_a_liar_kills_nobody_and_changes_nothing(lies: Lie, count: int) -> None:
    world = settled(lan(17), count)
    world.corrupt(world.peer(0), lies, every=0.3)
    world.run(25)
    assert world.deaths == []
    assert world.suspicions == 0
    assert world.agreed(), world


def test_liars_hide_no_death_in_time() -> None:
    world = settled(lan(18), 50)
    for number in range(5):
        world.corrupt(world.peer(number), Lie.ALL)
    world.run(10)
    world.kill(world.peer(20))
    assert world.run_until(lambda: world.gone(world.peer(20)), limit=5) is not None, world
    world.run(20)
    assert world.gone(world.peer(20))
    assert world.false_deaths == []


# ── everything at once ───────────────────────────────────────────────────────────────────────────────────────────


def torment(world: Simulator, seconds: int) -> None:
    stopped: list[PeerId] = []
    for _ in range(seconds):
        world.run(1)
        running = [peer.peer for peer in world.running]
        match world.rng.randrange(8):
            case 0 | 1 if len(running) > 4:
                stopped.append(world.rng.choice(running))
                world.rng.choice([world.kill, world.vanish])(stopped[-1])
            case 2 | 3 if stopped:
                back = stopped.pop(world.rng.randrange(len(stopped)))
                world.restart(back, clock_error=world.rng.choice([0.0, -600.0]))
            case 4:
                world.pause(world.rng.choice(running), 2.0)
            case 5:
                world.part(world.rng.sample(running, len(running) // 3))
            case 6:
                world.heal()
            case _:
                world.join()
    world.heal()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_after_any_torment_all_views_become_the_same_and_right(seed: int, loss: float) -> None:
    world = settled(
        Simulator(seed=seed, link=Link.lan(loss=loss), membership=MembershipConfig(full_mesh=12)), 16
    )
    torment(world, 40)
    assert world.run_until(world.agreed, limit=60) is not None, world
    world.run(15)
    ages = [peer.membership.digest().ages for peer in world.running]
    running = [peer.peer for peer in world.running]
    assert all([known[peer] for peer in running] == [ages[0][peer] for peer in running] for known in ages), (
        world
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 112))
def test_after_any_torment_all_views_become_right_many_times(seed: int) -> None:
    world = settled(
        Simulator(seed=seed, link=Link.lan(loss=0.05), membership=MembershipConfig(full_mesh=16)), 24
    )
    torment(world, 90)
    assert world.run_until(world.agreed, limit=60) is not None, world


@pytest.mark.slow
@pytest.mark.parametrize("count", [30, 100])
def test_nobody_dies_in_ten_minutes_of_loss_and_pauses(count: int) -> None:
    world = settled(lan(19, loss=0.2), count)
    for number in range(100):
        world.pause(world.peer(number % count), 2.0)
        world.run(TEN_MINUTES / 100)
    assert world.false_deaths == []
    assert world.agreed(), world


@pytest.mark.slow
def test_a_thousand_peers_learn_of_a_hundred_deaths_within_fifteen_seconds() -> None:
    world = settled(lan(20), 1000)
    joined = world.join()
    assert world.run_until(lambda: world.known(joined), limit=5) is not None, world
    gone = world.rng.sample([peer.peer for peer in world.running], 100)
    for peer in gone:
        world.kill(peer)
    assert world.run_until(lambda: all(map(world.gone, gone)), limit=15, step=0.25) is not None, world
    assert world.false_deaths == []

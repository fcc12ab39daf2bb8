"""How membership behaves and what it costs from 10 to 1,000 peers, simulated: one table.

    python bench/membership.py            10, 30, 100, 300 and 1,000 peers on a LAN and a WAN; some minutes
    python bench/membership.py --most 100 only up to so many; --least 300 only from so many
    python bench/membership.py --seed 2   another run; the same seed gives the same table

Times are virtual seconds, over all observers; `worst` is the last of them. Traffic is what a peer sends.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

from libmesh import LivenessConfig, MembershipConfig
from libmesh.peers import PeerId
from libmesh.testing.simulator import Link, Simulator

SIZES = (10, 30, 100, 300, 1000)
TEN_MINUTES = 600.0
LONG_RUNS_UP_TO = 300
PARTITIONS_UP_TO = 300
"""Everybody announces anew after a partition: a million records heard among a thousand peers take too long here."""

KINDS = ("probe", "digest", "gossip", "hello")


def lan(seed: int, loss: float = 0.0) -> Simulator:
    """Machines on a switch."""
    return Simulator(seed=seed, link=Link.lan(loss=loss))


def wan(seed: int, loss: float = 0.0) -> Simulator:
    """Machines on several continents."""
    return Simulator(
        seed=seed,
        link=Link.wan(loss=loss),
        membership=MembershipConfig.wan(),
        liveness=LivenessConfig.wan(),
    )


Make = Callable[..., Simulator]


def rates(world: Simulator, seconds: float, count: int) -> tuple[float, float, dict[str, float]]:
    """Messages and bytes per second and peer, and bytes by kind."""
    per = seconds * count
    traffic = world.traffic
    sizes = {kind: traffic[kind].size / per if kind in traffic else 0.0 for kind in KINDS}
    return sum(t.messages for t in traffic.values()) / per, sum(sizes.values()), sizes


def joined(world: Simulator) -> float | None:
    """Seconds until a joiner knows all and all know it."""
    peer = world.join()
    total = len(world.running)
    return world.run_until(
        lambda: world.known(peer) and len(world.peers[peer].membership.digest().ages) >= total,
        limit=20,
        step=0.02,
    )


def after_stopping(
    world: Simulator, stop: Callable[[PeerId], None], victims: Sequence[PeerId]
) -> list[float]:
    """Seconds after which each observer knew of each death, sorted; a missing one counts as infinite."""
    began, before = world.now, len(world.deaths)
    for victim in victims:
        stop(victim)
    world.run_until(lambda: all(map(world.gone, victims)), limit=40, step=0.1)
    known = {
        (death.observer, death.subject): death.time - began
        for death in world.deaths[before:]
        if death.subject in set(victims)
    }
    missing = len(victims) * len(world.running) - len(known)
    return sorted(known.values()) + [float("inf")] * missing


def p99(times: Sequence[float]) -> float:
    """The 99th percentile of sorted times."""
    return times[min(len(times) - 1, int(len(times) * 0.99))]


def healed(make: Make, seed: int, count: int) -> float | None:
    """Seconds from the end of a partition into halves, half a minute long, until all know all again."""
    world = make(seed)
    world.settle(count)
    world.part(list(world.peers)[: count // 2])
    world.run(30)
    world.heal()
    return world.run_until(world.agreed, limit=40)


def long_run(make: Make, seed: int, count: int) -> tuple[int, int]:
    """False deaths and suspicions in ten minutes with a fifth of all packets lost and a pause of 2 s every 6 s."""
    world = make(seed, loss=0.2)
    world.settle(count)
    for number in range(100):
        world.pause(world.peer(number % count), 2.0)
        world.run(TEN_MINUTES / 100)
    return len(world.false_deaths), world.suspicions


def row(name: str, make: Make, seed: int, count: int) -> str:
    """One line of the table."""
    began = time.perf_counter()
    world = make(seed)
    world.settle(count)
    world.run(30)
    messages, size, sizes = rates(world, 30, count)
    join = joined(world)
    single = after_stopping(world, world.kill, [world.peer(0)])
    tenth = world.rng.sample([peer.peer for peer in world.running], max(1, count // 10))
    crash = after_stopping(world, world.kill, tenth)
    gone = world.rng.sample([peer.peer for peer in world.running], max(1, count // 20))
    vanish = after_stopping(world, world.vanish, gone)
    false = len(world.false_deaths)
    heal = healed(make, seed, count) if count <= PARTITIONS_UP_TO else None
    lossy = long_run(make, seed, count) if count <= LONG_RUNS_UP_TO else None
    cells = [
        f"{name} {count:>5}",
        f"{messages:6.2f} {size:7.0f} {sizes['probe']:6.0f} {sizes['digest']:7.0f}",
        "  none" if join is None else f"{join:6.2f}",
        f"{p99(single):6.2f} {single[-1]:6.2f}",
        f"{p99(crash):6.2f} {crash[-1]:6.2f}",
        f"{p99(vanish):6.2f} {vanish[-1]:6.2f}",
        f"{false:5}",
        "    -" if heal is None else f"{heal:5.2f}",
        "    -      -" if lossy is None else f"{lossy[0]:5} {lossy[1]:6}",
        f"{time.perf_counter() - began:6.1f}",
    ]
    return " | ".join(cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--most", type=int, default=SIZES[-1], help="the largest mesh (default: %(default)s)")
    parser.add_argument("--least", type=int, default=SIZES[0], help="the smallest (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=1, help="of everything left to chance (default: %(default)s)"
    )
    args = parser.parse_args()
    print(f"seed {args.seed}")
    print(
        "          | idle, per peer and second      |   join |     killed     | 10 % killed   "
        "|  5 % vanished  | false | heal  | 10 min loss   |   real"
    )
    print(
        "    peers |  msgs   bytes  probe  digest  | s      | p99     worst  | p99     worst "
        "| p99     worst  | dead  | s     | false  suspects|     s"
    )
    for name, make in (("lan", lan), ("wan", wan)):
        for count in SIZES:
            if args.least <= count <= args.most:
                print(row(name, make, args.seed, count), flush=True)


if __name__ == "__main__":
    main()

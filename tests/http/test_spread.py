"""How one node's requests spread over servers: the policy with servers of virtual time. The real ones are in `bench/spread.py`."""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque

import pytest
from libmesh_node.http.balance import Balance
from libmesh_node.http.proxy import BACKLOG
from libmesh_node.http.wanted import NOTHING
from libmesh_node.snapshot import Server

TOKENS = 200
SLOTS = 4


class Simulation:
    """`lanes` that each ask again as soon as they are answered, of servers that answer first come, first served.

    Args:
        speeds: tokens per second of one slot, by peer.
        lanes: requests at a time.
        seed: of the draw of candidates, and of how far each answer's length is from the usual one.
    """

    def __init__(self, speeds: dict[str, float], lanes: int, seed: int) -> None:
        self._rng = random.Random(seed)
        self._balance = Balance(random.Random(seed + 1))
        self._speeds = speeds
        self._servers = {
            peer: Server(peer=peer, base_url=f"http://{peer}", local=False, slots=SLOTS, rtt=0.001)
            for peer in speeds
        }
        self._lines: dict[str, deque[float]] = {peer: deque() for peer in speeds}
        self._busy: Counter[str] = Counter()
        self._ends: list[tuple[float, str]] = []
        self._waiting = lanes
        self.now = 0.0
        self.answered: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        while self.now < seconds:
            self._dispatch()
            self.now, peer = heapq.heappop(self._ends)
            self.answered[peer] += 1
            self._busy[peer] -= 1
            self._balance.ends(self._servers[peer])
            self._balance.answered(self._servers[peer], first=0.01, speed=self._speeds[peer])
            self._waiting += 1
            self._start(peer)

    def _dispatch(self) -> None:
        servers = list(self._servers.values())
        while self._waiting and self._balance.has_room(servers, BACKLOG, self.now):
            server = self._balance.choose(servers, (), NOTHING, self.now, None, BACKLOG)
            assert server is not None
            self._balance.begins(server)
            self._waiting -= 1
            self._lines[server.peer].append(TOKENS * self._rng.uniform(0.5, 1.5))
            self._start(server.peer)

    def _start(self, peer: str) -> None:
        while self._lines[peer] and self._busy[peer] < SLOTS:
            took = self._lines[peer].popleft() / self._speeds[peer]
            self._busy[peer] += 1
            heapq.heappush(self._ends, (self.now + took, peer))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lanes", [3, 8, 64])
def test_equal_servers_each_get_about_half(lanes: int, seed: int) -> None:
    simulation = Simulation({"a": 20.0, "b": 20.0}, lanes, seed)
    simulation.run(600)
    shares = [count / simulation.answered.total() for count in simulation.answered.values()]
    assert max(shares) <= 0.6


@pytest.mark.parametrize("seed", range(5))
def test_server_four_times_slower_costs_no_throughput(seed: int) -> None:
    speeds = {"quick": 40.0, "slow": 10.0}
    simulation = Simulation(speeds, 64, seed)
    simulation.run(1000)
    ideal = sum(SLOTS * speed / TOKENS for speed in speeds.values())
    assert simulation.answered.total() / simulation.now >= 0.9 * ideal


@pytest.mark.parametrize("seed", range(5))
def test_server_four_times_slower_is_left_out_while_the_quick_one_has_slots(seed: int) -> None:
    simulation = Simulation({"quick": 40.0, "slow": 10.0}, 3, seed)
    simulation.run(1000)
    assert simulation.answered["quick"] >= 0.95 * simulation.answered.total()

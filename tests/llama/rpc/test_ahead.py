"""Results passed from worker to worker: two host's ends, two worker's ends, and rpc-servers that only repeat."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import pytest
from libmesh_node.llama.rpc.ahead import LATE_ALLOWED, REST, Chain, Foreseen
from libmesh_node.llama.rpc.facts import Device, WorkerFacts
from libmesh_node.llama.rpc.frames import AHEAD, Command, Link, ProtocolError, answer, frame
from libmesh_node.llama.rpc.host import Effect, HostEnd, ToClient
from libmesh_node.llama.rpc.uploads import ToWorker
from libmesh_node.llama.rpc.weights import LearnedHashes, Weights
from libmesh_node.llama.rpc.worker import Push, ToHost, ToServer, WorkerEnd

from tests.llama.rpc import messages
from tests.llama.rpc.messages import BASE, BUFFER, SIZE, tensor

FACTS = WorkerFacts((7, 0, 0), (Device(64, 1 << 40, SIZE, SIZE, True),))
WIDTH = 4  # values in an activation
GRAPH = messages.graph(tensor())
RECOMPUTE = frame(Command.GRAPH_RECOMPUTE, bytes(4))


class Server:
    """An rpc-server: its result is a count of its computations and the activation that it was given."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.given = b""
        self.computed = 0

    def hears(self, data: bytes) -> bytes:
        self.heard.append(data)
        command, payload = data[0], data[9:]
        if command == Command.ALLOC_BUFFER:
            return answer(struct.pack("<QQ", BUFFER, SIZE))
        if command == Command.BUFFER_GET_BASE:
            return answer(struct.pack("<Q", BASE))
        if command == Command.SET_TENSOR and b"activation" in payload[:300]:
            self.given = payload[305:]
        if command in (Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE):
            self.computed += 1
        if command == Command.GET_TENSOR:
            return answer(struct.pack("<QQ", self.computed, sum(self.given)))
        return b""


class Town:
    """A llama-server's view of two workers. `passing`: whether results reach the second one directly."""

    def __init__(self, *, passing: bool = True) -> None:
        self.chain = Chain(2)
        self.passing = passing
        none = Weights([], [], {})
        self.hosts = [HostEnd(FACTS, none, LearnedHashes(None), self.chain, place) for place in (0, 1)]
        self.workers = [WorkerEnd(4 * SIZE, 1, lambda place: False) for _ in (0, 1)]
        self.servers = [Server(), Server()]
        self.told: list[bytes] = [b"", b""]
        for place in (0, 1):
            self.chain.join(place, self._sender(place))
            self.say(place, messages.allocate(SIZE))

    def _sender(self, place: int) -> Callable[[Foreseen, bytes], bool]:
        def send(foreseen: Foreseen, data: bytes) -> bool:
            if not self.hosts[place].sent_ahead(foreseen):
                return False
            self._worker(place, data)
            return True

        return send

    def say(self, place: int, *requests: bytes) -> bytes:
        """llama-server says this to a worker. What it is answered."""
        self.told[place] = b""
        for request in requests:
            self._effects(place, self.hosts[place].from_client(request))
        return self.told[place]

    def _effects(self, place: int, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, ToClient):
                self.told[place] += effect.data
            elif isinstance(effect, ToWorker):
                self._worker(place, effect.data)

    def _worker(self, place: int, data: bytes) -> None:
        self.carry_out(place, self.workers[place].from_host(data))

    def carry_out(self, place: int, effects: Sequence[object]) -> None:
        for effect in effects:
            if isinstance(effect, ToServer):
                said = self.servers[place].hears(effect.data)
                self.carry_out(place, list(self.workers[place].from_server(said)))
            elif isinstance(effect, Push) and self.passing:
                self.carry_out(place + 1, list(self.workers[place + 1].fill(effect.ticket, effect.data)))
            elif isinstance(effect, ToHost):
                self._effects(place, self.hosts[place].from_worker(effect.data))

    def token(self, number: int, *, graph: bytes = RECOMPUTE, other: bytes | None = None) -> bytes:
        """One token, as llama-server does it; the last worker's result."""
        position = struct.pack("<I", number)
        question = messages.get_tensor(16, tensor(b"result"))
        result = self.say(0, inputs(struct.pack("<4f", 1, 2, 3, number)), pos(position), graph, question)[8:]
        assert len(result) == 16
        return self.say(1, inputs(result), pos(other or position), graph, question)[8:]


def inputs(data: bytes) -> bytes:
    return messages.set_tensor(data, tensor(b"activation", shape=(WIDTH, 1, 1, 1)))


def pos(data: bytes) -> bytes:
    return messages.set_tensor(data, tensor(b"inp_pos", kind=26, shape=(1, 1, 1, 1), strides=(4, 4, 4, 4)))


def texts(town: Town, **changes: bytes) -> list[bytes]:
    said = [town.token(0, graph=GRAPH)]
    return said + [town.token(number, **changes) for number in range(1, 8)]


def test_answers_are_those_without_it() -> None:
    ahead, plain = Town(), Town()
    plain.chain.misses = 10**6
    assert texts(ahead) == texts(plain)
    assert ahead.chain.hits == 6  # of the first graph, which came behind an allocation, nothing was learned
    assert plain.chain.hits == 0
    assert [server.heard for server in ahead.servers] == [server.heard for server in plain.servers]


def test_other_words_than_foreseen_are_sent_and_answered() -> None:
    town = Town()
    texts(town)
    before = town.servers[1].computed
    town.token(8, other=struct.pack("<I", 99))
    assert town.chain.misses == 1
    assert town.servers[1].heard[-3] == pos(struct.pack("<I", 99))
    assert town.servers[1].computed == before + 2  # once in vain
    hits = town.chain.hits
    town.token(9)
    town.token(10)
    assert town.chain.hits > hits


def test_a_new_graph_is_not_foreseen() -> None:
    town = Town()
    texts(town)
    hits = town.chain.hits
    town.token(8, graph=GRAPH)
    assert (town.chain.hits, town.chain.misses) == (hits, 0)
    town.token(9)
    assert (town.chain.hits, town.chain.misses) == (hits + 1, 0)


def test_of_a_worker_that_computes_two_graphs_a_token_nothing_is_foreseen() -> None:
    town = Town()
    texts(town)
    hits, computed = town.chain.hits, town.servers[1].computed
    question = messages.get_tensor(16, tensor(b"result"))
    for number in range(8, 12):
        position = pos(struct.pack("<I", number))
        first = inputs(struct.pack("<4f", 1, 2, 3, number))
        result = town.say(0, first, position, GRAPH if number == 8 else RECOMPUTE, question)[8:]
        town.say(1, inputs(result), position, GRAPH, GRAPH, question)
    assert (town.chain.hits, town.chain.misses) == (hits, 0)
    assert town.servers[1].computed == computed + 8


def test_a_result_that_does_not_come_is_sent_from_home() -> None:
    town = Town()
    texts(town)
    town.passing = False
    assert town.token(8) == b""  # llama-server waits
    missing = town.hosts[1].overdue
    assert missing is not None
    town._worker(1, missing)
    assert town.told[1][8:] == struct.pack(
        "<QQ", 9, sum(struct.pack("<QQ", 9, sum(struct.pack("<4f", 1, 2, 3, 8))))
    )
    assert town.hosts[1].overdue is None


def test_after_some_results_that_did_not_come_it_rests() -> None:
    town = Town()
    texts(town)
    for _ in range(LATE_ALLOWED):
        town.chain.late()
    hits = town.chain.hits
    for number in range(8, 8 + REST):
        town.token(number)
    assert town.chain.hits == hits
    town.token(0)
    assert town.chain.hits == hits + 1


def test_a_result_may_come_before_its_hole_or_twice() -> None:
    end = Town().workers[1]
    end.from_host(GRAPH)
    body = inputs(bytes(16)) + RECOMPUTE + messages.get_tensor(16)
    hole = 9 + 305
    told = frame(Link.AHEAD, AHEAD.pack(5, 0, hole, 16) + body)
    assert end.fill(5, b"r" * 16) == []
    carried = end.from_host(told)
    assert [effect.data[0] for effect in carried if isinstance(effect, ToServer)] == [
        Command.SET_TENSOR,
        Command.GRAPH_RECOMPUTE,
        Command.GET_TENSOR,
    ]
    assert carried[0] == ToServer(inputs(b"r" * 16))
    assert end.fill(5, b"r" * 16) == []


@pytest.mark.parametrize(
    "told",
    [
        frame(Link.AHEAD, b"short"),
        frame(Link.AHEAD, AHEAD.pack(1, 0, 0, 1 << 31) + messages.get_tensor(4)),
        frame(Link.AHEAD, AHEAD.pack(1, 0, 0, 0) + RECOMPUTE),
        frame(Link.AHEAD, AHEAD.pack(1, 0, 0, 0) + messages.get_tensor(4) + RECOMPUTE),
        frame(Link.AHEAD, AHEAD.pack(1, 0, 0, 0) + messages.allocate(4)),
        frame(Link.AHEAD, AHEAD.pack(1, 0, 0, 0) + messages.get_tensor(4)[:-1]),
        frame(Link.PASS, bytes(4)),
        frame(Link.FILL, b"abc"),
        frame(Link.DROP, b""),
    ],
)
def test_what_cannot_be_sent_ahead_is_refused(told: bytes) -> None:
    with pytest.raises(ProtocolError):
        Town().workers[1].from_host(told)


def test_what_waits_is_bounded() -> None:
    end = Town().workers[1]
    body = inputs(bytes(16)) + messages.get_tensor(16)
    for ticket in range(4):
        end.from_host(frame(Link.AHEAD, AHEAD.pack(ticket, 0, 314, 16) + body))
    with pytest.raises(ProtocolError):
        end.from_host(frame(Link.AHEAD, AHEAD.pack(9, 0, 314, 16) + body))
    for ticket in range(100, 200):
        assert end.fill(ticket, bytes(16)) == []


def test_a_hole_is_checked_like_everything_else() -> None:
    end = Town().workers[1]
    outside = messages.set_tensor(bytes(16), tensor(data=BASE + SIZE))
    end.from_host(frame(Link.AHEAD, AHEAD.pack(1, 0, 314, 16) + outside + messages.get_tensor(16)))
    with pytest.raises(ProtocolError):
        end.fill(1, bytes(16))


def test_a_chain_with_a_gap_foresees_nothing() -> None:
    town = Town()
    town.chain.leave(1)
    texts(town)
    assert town.chain.hits == 0

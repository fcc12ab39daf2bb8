"""Activations straight from one worker to the next: what llama-server is about to ask is asked before it does.

llama-server fetches each worker's result and gives it to the next one: a round trip for each worker and token. While it
generates, what it will say to the second worker is known as soon as it asks the first for its result: the same graph again
(GRAPH_RECOMPUTE), the same inputs as the first worker had for this token, and that result. So the host's ends send this
ahead, with a hole where the result belongs, and let the first worker's end send its result to the second one as well.
The answer waits here until llama-server has really said exactly that, byte by byte; then it is there at once. If it
says anything else, the answer is thrown away and llama-server's own words are sent. With N workers a token takes N + 1
ways instead of 2 N.

Saying it twice is harmless for a cache that is written by position; a model with a recurrent state must not be used so.

Only what was seen is foreseen: how each message came about is learned from the token before, and forgotten at the first
irregularity. A new graph (another prompt, a longer cache) is not foreseen, but what comes with it is learned: after a graph that
computes one token llama-server asks for the same again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from libmesh_node.llama.rpc.frames import AHEAD, SET_HEADER, TENSOR, WHOLE, Command, Link, frame

Message = tuple[int, bytes]
"""A command and its payload."""

_REGULAR = frozenset({Command.SET_TENSOR, Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE, Command.GET_TENSOR})

MAX_MESSAGES = 64
"""In one burst; five or six are usual."""

MISSES_ALLOWED = 8
"""Beyond this, and beyond a quarter of the hits, nothing is foreseen any more in this run."""


LATE_ALLOWED = 3
"""Results that may fail to come directly; each costs up to half a second."""

REST = 512
"""Tokens for which nothing is foreseen after that."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """How a message comes about: `head` stays; the data is the first worker's message `copy`, the hole, or `data`."""

    command: int
    head: bytes
    data: bytes = b""
    copy: int | None = None
    hole: bool = False


@dataclass(slots=True)
class Foreseen:
    """What was sent ahead to one worker.

    Attributes:
        messages: as llama-server will say them; the data of the one in the hole is not known yet.
        hole: which of them that is, and `size` the bytes of it.
        matched: how many llama-server has said.
        answer: of the last one, when it has come.
    """

    ticket: int
    messages: list[Message]
    hole: int
    size: int
    matched: int = 0
    answer: bytes | None = None


class Chain:
    """The workers of one llama-server, in order. Each `HostEnd` reports to it, and is told what was sent ahead.

    Args:
        count: of workers.

    Attributes:
        hits, misses: what was foreseen, and was or was not said.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._senders: list[Callable[[Foreseen, bytes], bool] | None] = [None] * count
        self._answers: list[bytes | None] = [None] * count
        self._slots: list[list[_Slot] | None] = [None] * count
        self._first: list[Message] | None = None
        self._ticket = 0
        self._late = 0
        self._resting = 0
        self.hits = 0
        self.misses = 0

    def join(self, place: int, send: Callable[[Foreseen, bytes], bool]) -> None:
        """The worker at `place` has a session. `send` gives it bytes; it returns whether it could."""
        self._senders[place] = send

    def leave(self, place: int) -> None:
        """It has none any more."""
        self._senders[place] = None
        self.irregular(place)

    def irregular(self, place: int) -> None:
        """llama-server said something that is not part of steady generation."""
        self._slots[place] = None
        self._answers[place] = None
        if place == 0:
            self._first = None
            self._slots = [None] * self._count

    def asked(self, place: int, burst: list[Message], *, anew: bool) -> int | None:
        """The worker at `place` was told `burst`, which ends with the question for its result; `anew`: with a new graph.

        Returns a ticket if that result shall be passed on to the next worker.
        """
        if place == 0:
            before, self._first = self._first, burst
            if anew:
                self._slots = [None] * self._count
                return None
            return self._foresee(burst) if before is not None and _alike(before, burst) else None
        result = self._answers[place - 1]
        first = self._first
        self._slots[place] = (
            _learn(first, result, burst) if first is not None and result is not None else None
        )
        return None

    def answered(self, place: int, result: bytes | None) -> None:
        """The result of the worker at `place`; `None` if it is too large to be kept."""
        self._answers[place] = result

    def late(self) -> None:
        """A result did not come directly, and was sent from here. If that goes on, nothing is foreseen for a while."""
        self._late += 1
        if self._late >= LATE_ALLOWED:
            self._late, self._resting = 0, REST

    def hit(self) -> None:
        """What was foreseen was said."""
        self.hits += 1

    def result_before(self, place: int) -> bytes | None:
        """What belongs into the hole for the worker at `place`."""
        return self._answers[place - 1]

    def _foresee(self, first: list[Message]) -> int | None:
        if self._resting:
            self._resting -= 1
            return None
        if self._count < 2 or self.misses > MISSES_ALLOWED + self.hits // 4:
            return None
        plans = [slots for slots in self._slots[1:] if slots is not None]
        senders = [sender for sender in self._senders[1:] if sender is not None]
        if len(plans) < self._count - 1 or len(senders) < self._count - 1:
            return None
        tickets = [self._ticket + at + 1 for at in range(self._count - 1)]
        self._ticket += self._count
        for at, (slots, send) in enumerate(zip(plans, senders, strict=True)):
            following = tickets[at + 1] if at + 1 < len(tickets) else 0
            foreseen, data = _compose(slots, first, tickets[at], following)
            if not send(foreseen, data):
                return None
        return tickets[0]


def _alike(one: Sequence[Message], other: Sequence[Message]) -> bool:
    """Whether two bursts differ in the data of their uploads only."""
    return len(one) == len(other) and all(
        a[0] == b[0]
        and len(a[1]) == len(b[1])
        and (a[1][:SET_HEADER] == b[1][:SET_HEADER] if a[0] == Command.SET_TENSOR else a[1] == b[1])
        for a, b in zip(one, other, strict=True)
    )


def _learn(first: Sequence[Message], result: bytes, burst: Sequence[Message]) -> list[_Slot] | None:
    """How `burst` follows from the first worker's burst and the previous worker's result; `None` if it does not."""
    slots: list[_Slot] = []
    known = [payload[SET_HEADER:] if command == Command.SET_TENSOR else None for command, payload in first]
    for at, (command, payload) in enumerate(burst):
        if command != Command.SET_TENSOR:
            slots.append(_Slot(command, payload))
            continue
        head, data = payload[:SET_HEADER], payload[SET_HEADER:]
        if data == result:
            slots.append(_Slot(command, head, hole=True))
        elif at < len(known) and known[at] == data:  # both get the same inputs in the same order, as a rule
            slots.append(_Slot(command, head, copy=at))
        else:
            slots.append(_Slot(command, head, data, known.index(data) if data in known else None))
    return slots if sum(slot.hole for slot in slots) == 1 else None


def _compose(
    slots: Sequence[_Slot], first: Sequence[Message], ticket: int, following: int
) -> tuple[Foreseen, bytes]:
    messages: list[Message] = []
    body = bytearray()
    hole = hole_at = size = 0
    for at, slot in enumerate(slots):
        data = slot.data if slot.copy is None else first[slot.copy][1][SET_HEADER:]
        if slot.hole:
            hole = at
            size = _tensor_size(slot.head)
            data = bytes(size)
            hole_at = len(body) + 9 + SET_HEADER
        messages.append((slot.command, slot.head + data))
        body += frame(slot.command, slot.head + data)
    head = AHEAD.pack(ticket, following, hole_at, size)
    return Foreseen(ticket, messages, hole, size), frame(Link.AHEAD, head + body)


def _tensor_size(head: bytes) -> int:
    """Bytes of a plain f32 activation: rows times stride."""
    lengths, strides = struct.unpack_from("<4I", head, 20), struct.unpack_from("<4I", head, 36)
    return int(strides[0] + sum((n - 1) * step for n, step in zip(lengths, strides, strict=True)))


class Watch:
    """Cuts what one `HostEnd` hears into bursts: uploads, one graph, one question for the result.

    A graph stands in its burst as the order to compute it again, which is what the next token will say. Of two graphs a worker
    only keeps the second, so neither will be said again so.

    Args:
        chain: to report to; `None` if nothing shall be foreseen.
        place: of this worker in it.
    """

    def __init__(self, chain: Chain | None, place: int) -> None:
        self.chain, self.place = chain, place
        self._burst: list[Message] | None = []
        self._graph: int | None = None  # how the burst's was given

    def heard(self, command: int, payload: bytes) -> int | None:
        """llama-server said this. Returns a ticket if the answer shall be passed on."""
        if self.chain is None or command == Command.GET_ALLOC_SIZE:  # which changes nothing anywhere
            return None
        graph = command in (Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE)
        regular = command in _REGULAR and not (graph and self._graph is not None)
        if self._burst is not None and regular and len(self._burst) < MAX_MESSAGES:
            if graph:
                self._graph = command
                command, payload = Command.GRAPH_RECOMPUTE, payload[:4]
            self._burst.append((command, payload))
        else:
            self._burst = None
            self.chain.irregular(self.place)
        if command != Command.GET_TENSOR:
            return None
        burst, self._burst = self._burst, []
        said, self._graph = self._graph, None
        size = int.from_bytes(payload[TENSOR + 8 :], "little")
        if burst is None or said is None or size > WHOLE:
            self.chain.irregular(self.place)
            return None
        return self.chain.asked(self.place, burst, anew=said == Command.GRAPH_COMPUTE)

    def upset(self) -> None:
        """Something was said that is no whole message, such as a large upload."""
        self._burst = None
        if self.chain is not None:
            self.chain.irregular(self.place)

"""The worker's end of one session: what the host's end says goes in, what rpc-server shall hear comes out, and back.

Nothing reaches rpc-server that `armour.py` has not passed. Requests that the host's end answers itself have no business
here and are refused. Answers leave in the order of the requests; each is held to the size that its request asked for.

A buffer's base address is asked for at once when it has been allocated: the checks need it, and the host's end, which
gets it together with the allocation's answer, is spared a round trip.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from libmesh_node.llama.rpc.armour import Armour
from libmesh_node.llama.rpc.frames import (
    AHEAD,
    MAX_AHEAD,
    REFERENCE,
    SET_HEADER,
    TENSOR,
    TICKET,
    WHOLE,
    Command,
    Event,
    Frame,
    FrameParser,
    FramePiece,
    FrameStart,
    Link,
    ProtocolError,
    Reply,
    answer_size,
    check_request,
    frame,
    frame_head,
)
from libmesh_node.llama.rpc.packing import MOST, unpack
from libmesh_node.llama.rpc.weights import Place

MAX_WAITING = 1024
"""Requests of one session without an answer yet."""

MAX_TICKETS = 4
"""Of what was sent ahead and waits, and of results that wait for it. A host sends one and waits."""

ALLOWED = frozenset(
    {
        Command.ALLOC_BUFFER,
        Command.FREE_BUFFER,
        Command.BUFFER_CLEAR,
        Command.SET_TENSOR,
        Command.GET_TENSOR,
        Command.COPY_TENSOR,
        Command.GRAPH_COMPUTE,
        Command.INIT_TENSOR,
        Command.GET_ALLOC_SIZE,
        Command.GRAPH_RECOMPUTE,
        Command.MEMSET_TENSOR,
    }
)
"""SET_TENSOR_HASH is not among them: it would fill rpc-server's cache, which outlives the session."""


@dataclass(frozen=True, slots=True)
class ToServer:
    """Send these bytes to rpc-server."""

    data: bytes


@dataclass(frozen=True, slots=True)
class FileToServer:
    """Send these bytes of the model's files to rpc-server."""

    place: Place


@dataclass(frozen=True, slots=True)
class ToHost:
    """Send these bytes to the host's end."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Push:
    """Send this result to the next worker, which holds `ticket` for it."""

    ticket: int
    data: bytes


Effect = ToServer | FileToServer | ToHost | Push


@dataclass(frozen=True, slots=True)
class _Expected:
    """An answer that rpc-server owes.

    Attributes:
        asked: the size of an allocation.
        foreseen: the ticket, if it answers what was sent ahead.
        passed_on: the next worker's ticket, if that gets it too.
    """

    command: int
    size: int
    asked: int | None = None
    foreseen: int = 0
    passed_on: int = 0


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Requests that wait for what belongs into their hole; `following` is the next worker's ticket for the answer."""

    following: int
    hole: int
    size: int
    body: bytes


class WorkerEnd:
    """One session. `from_host` and `from_server` take bytes in any pieces; both raise `ProtocolError`.

    Args:
        granted: bytes that the host may allocate.
        devices: how many the rpc-server has.
        holds: whether a place lies within the model's files; `Weights.holds`.
    """

    def __init__(self, granted: int, devices: int, holds: Callable[[Place], bool]) -> None:
        self._armour = Armour(granted, devices)
        self._holds = holds
        self._host = FrameParser(_check, {Command.SET_TENSOR: SET_HEADER})
        self._server = FrameParser(self._check_answer, {0: 0}, kinds=False)
        self._expected: deque[_Expected] = deque()
        self._allocation: tuple[int, bytes] | None = (
            None  # what was asked, and the answer that still lacks its base
        )

        self._ahead: dict[int, _Ahead] = {}
        self._done: deque[int] = deque(maxlen=4 * MAX_TICKETS)
        self._early: dict[int, bytes] = {}  # results that came before their hole

    @property
    def midway(self) -> bool:
        """Whether a request has begun and not ended. A host that lets this last is no host."""
        return self._host.midway

    @property
    def holds_nothing(self) -> bool:
        """Whether no memory of rpc-server's is allocated. A host that serves has some, however long it is not asked."""
        return self._armour.is_empty

    def from_host(self, data: bytes) -> list[Effect]:
        """The host's end sent `data`."""
        effects: list[Effect] = []
        for event in self._host.feed(data):
            match event:
                case Frame():
                    self._request(event.kind, event.payload, effects)
                case FrameStart():
                    self._armour.check_range(event.head, _offset(event.head), event.size)
                    effects.append(ToServer(_set_head(event.head, event.size)))
                case FramePiece():
                    effects.append(ToServer(event.data))
        return effects

    def from_server(self, data: bytes) -> list[Effect]:
        """rpc-server sent `data`."""
        effects: list[Effect] = []
        for event in self._server.feed(data):
            self._reply(event, effects)
        return effects

    def fill(self, ticket: int, data: bytes) -> list[Effect]:
        """What belongs into the hole of what was sent ahead as `ticket`, from the worker before or from the host.

        Carries it out. The second time, or for a ticket that is not known and finds no room to wait, nothing happens.
        """
        ahead = self._ahead.pop(ticket, None)
        if ahead is None:
            if len(self._early) < MAX_TICKETS and ticket not in self._done:
                self._early[ticket] = data
            return []
        if len(data) != ahead.size:
            raise ProtocolError(f"{len(data)} bytes for a hole of {ahead.size}")
        self._finish(ticket)
        body = ahead.body[: ahead.hole] + data + ahead.body[ahead.hole + ahead.size :]
        effects: list[Effect] = []
        for event in FrameParser(_check_ahead, {}).feed(body):
            assert isinstance(event, Frame)
            self._request(event.kind, event.payload, effects, foreseen=ticket, passed_on=ahead.following)
        return effects

    def _finish(self, ticket: int) -> None:
        self._done.append(ticket)
        self._early.pop(ticket, None)

    def _send_ahead(self, payload: bytes) -> list[Effect]:
        if len(payload) < AHEAD.size or len(self._ahead) >= MAX_TICKETS:
            raise ProtocolError("more was sent ahead than may wait")
        ticket, following, hole, size = AHEAD.unpack_from(payload)
        body = payload[AHEAD.size :]
        parser = FrameParser(_check_ahead, {})
        kinds = [event.kind for event in parser.feed(body) if isinstance(event, Frame)]
        if parser.midway or kinds.count(Command.GET_TENSOR) != 1 or kinds[-1] != Command.GET_TENSOR:
            raise ProtocolError("what was sent ahead does not end with one question")
        if hole + size > len(body):
            raise ProtocolError("a hole beyond what was sent ahead")
        self._ahead[ticket] = _Ahead(following, hole, size, body)
        early = self._early.pop(ticket, None)
        return [] if early is None else self.fill(ticket, early)

    def _between(self, kind: int, payload: bytes, effects: list[Effect]) -> bool:
        """Handle what the host's end says on its own account. Whether it was that."""
        match kind:
            case Link.REFERENCE:
                self._refer(payload, effects)
            case Link.PASS:
                (ticket,) = TICKET.unpack_from(payload)
                self._request(Command.GET_TENSOR, payload[TICKET.size :], effects, passed_on=ticket)
            case Link.AHEAD:
                effects += self._send_ahead(payload)
            case Link.FILL:
                effects += self.fill(TICKET.unpack_from(payload)[0], payload[TICKET.size :])
            case Link.DROP:
                (ticket,) = TICKET.unpack_from(payload)
                self._ahead.pop(ticket, None)
                self._finish(ticket)
            case Link.PACKED:
                graph = unpack(payload)
                check_request(Command.GRAPH_COMPUTE, len(graph))
                self._request(Command.GRAPH_COMPUTE, graph, effects)
            case _:
                return False
        return True

    def _request(
        self, kind: int, payload: bytes, effects: list[Effect], *, foreseen: int = 0, passed_on: int = 0
    ) -> None:
        if self._allocation is not None or (self._expected and self._expected[-1].asked is not None):
            raise ProtocolError("a request while a buffer is being allocated")
        if self._between(kind, payload, effects):
            return
        if kind == Command.ALLOC_BUFFER:
            self._allocate(payload, effects)
            return
        self._check_request(kind, payload)
        size = answer_size(kind, payload)
        if size is not None:
            if len(self._expected) >= MAX_WAITING:
                raise ProtocolError(f"more than {MAX_WAITING} requests at once")
            self._expected.append(_Expected(kind, size, foreseen=foreseen, passed_on=passed_on))
        effects.append(ToServer(frame(kind, payload)))

    def _check_request(self, kind: int, payload: bytes) -> None:
        armour = self._armour
        match kind:
            case Command.FREE_BUFFER:
                armour.freed(_u64(payload, 0))
            case Command.BUFFER_CLEAR:
                armour.check_buffer(_u64(payload, 0))
            case Command.SET_TENSOR:
                armour.check_range(payload, _offset(payload), len(payload) - SET_HEADER)
                if payload[TENSOR]:
                    raise ProtocolError("an upload that is to be kept")
            case Command.GET_TENSOR | Command.MEMSET_TENSOR:
                armour.check_range(payload, _u64(payload, TENSOR), _u64(payload, TENSOR + 8))
            case Command.COPY_TENSOR:
                armour.check_range(payload[:TENSOR], 0, 0)
                armour.check_range(payload[TENSOR:], 0, 0)
            case Command.INIT_TENSOR:
                armour.check_range(payload, 0, 0)
            case Command.GRAPH_COMPUTE:
                armour.check_graph(payload)
            case Command.GRAPH_RECOMPUTE:
                armour.check_recompute(int.from_bytes(payload, "little"))
            case Command.GET_ALLOC_SIZE:
                armour.check_device(int.from_bytes(payload[:4], "little"))
                armour.check_tensors(payload[4:], 11)

    def _refer(self, payload: bytes, effects: list[Effect]) -> None:
        header, part, offset, size = REFERENCE.unpack(payload)
        place = Place(part, offset, size)
        if not self._holds(place):
            raise ProtocolError("a reference to bytes that the model has not")
        self._armour.check_range(header, _offset(header), size)
        effects.append(ToServer(_set_head(header, size)))
        effects.append(FileToServer(place))

    def _allocate(self, payload: bytes, effects: list[Effect]) -> None:
        device, size = int.from_bytes(payload[:4], "little"), _u64(payload, 4)
        if self._expected:
            raise ProtocolError("an allocation while answers are to come")
        if not self._armour.reserve(device, size):
            effects.append(ToHost(frame(Reply.ANSWER, bytes(24))))
            return
        self._expected.append(_Expected(Command.ALLOC_BUFFER, 16, asked=size))
        effects.append(ToServer(frame(Command.ALLOC_BUFFER, payload)))

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_answer(self, _kind: int, size: int) -> None:
        if not self._expected:
            raise ProtocolError("rpc-server answered what nobody asked")
        if size != self._expected[0].size:
            raise ProtocolError(f"rpc-server answered {size} bytes instead of {self._expected[0].size}")

    def _reply(self, event: Event, effects: list[Effect]) -> None:
        match event:
            case Frame():
                expected = self._expected.popleft()
                if expected.passed_on:  # first: the next worker waits for nothing else
                    effects.append(Push(expected.passed_on, event.payload))
                if expected.command == Command.ALLOC_BUFFER:
                    self._allocated(expected, event.payload, effects)
                elif self._allocation is not None:
                    self._based(_u64(event.payload, 0), effects)
                elif expected.foreseen:
                    effects.append(
                        ToHost(frame(Reply.FORESEEN, TICKET.pack(expected.foreseen) + event.payload))
                    )
                else:
                    effects.append(ToHost(frame(Reply.ANSWER, event.payload)))
            case FrameStart():
                if self._expected.popleft().foreseen:
                    raise ProtocolError("what was sent ahead has a large answer")
                effects.append(ToHost(frame_head(Reply.ANSWER, event.size)))
            case FramePiece():
                effects.append(ToHost(event.data))

    def _allocated(self, expected: _Expected, payload: bytes, effects: list[Effect]) -> None:
        assert expected.asked is not None
        if not _u64(payload, 0):
            self._armour.allocated(expected.asked, 0, 0, 0)
            effects.append(ToHost(frame(Reply.ANSWER, payload + bytes(8))))
            return
        self._allocation = expected.asked, payload
        self._expected.append(_Expected(Command.BUFFER_GET_BASE, 8))
        effects.append(ToServer(frame(Command.BUFFER_GET_BASE, payload[:8])))

    def _based(self, base: int, effects: list[Effect]) -> None:
        assert self._allocation is not None
        asked, payload = self._allocation
        self._allocation = None
        self._armour.allocated(asked, _u64(payload, 0), _u64(payload, 8), base)
        effects.append(ToHost(frame(Reply.ANSWER, payload + base.to_bytes(8, "little"))))


_LINK_SIZES = {
    Link.REFERENCE: (REFERENCE.size, REFERENCE.size),
    Link.PASS: (TICKET.size + TENSOR + 16, TICKET.size + TENSOR + 16),
    Link.AHEAD: (AHEAD.size, MAX_AHEAD),
    Link.FILL: (TICKET.size, TICKET.size + WHOLE),
    Link.DROP: (TICKET.size, TICKET.size),
    Link.PACKED: (1, MOST),
}


def _check_ahead(kind: int, size: int) -> None:
    if kind not in (Command.SET_TENSOR, Command.GET_TENSOR, Command.GRAPH_RECOMPUTE) or size > MAX_AHEAD:
        raise ProtocolError(f"a command {kind} that cannot be sent ahead")
    check_request(kind, size)


def _check(kind: int, size: int) -> None:
    if kind in _LINK_SIZES:
        least, most = _LINK_SIZES[Link(kind)]
        if not least <= size <= most:
            raise ProtocolError(f"a word of {size} bytes between the ends")
        return
    if kind not in ALLOWED:
        raise ProtocolError(f"a command {kind}, which no host needs")
    check_request(kind, size)


def _set_head(header: bytes, size: int) -> bytes:
    return frame_head(Command.SET_TENSOR, SET_HEADER + size) + header[:TENSOR] + b"\0" + header[TENSOR + 1 :]


def _offset(header: bytes) -> int:
    return _u64(header, TENSOR + 1)


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")

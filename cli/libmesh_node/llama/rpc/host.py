"""The host's end of one session: what llama-server says goes in, what the worker's end shall hear comes out, and back.

    local connection opened ─▶ probing ─▶ engaged ─▶ closed
                                  └──────────────────▶ closed

*probing*: everything so far could be answered from what the worker told when the session was opened: versions, devices,
memory. llama-server opens a handful of connections for nothing else. *engaged*: the first command that needs the
rpc-server was sent; from then on the session belongs to this connection.

Order: answers leave in the order of the requests, whoever gives them. llama-server waits for each answer before it goes on,
so the queue is short; a client that does not wait is held to `MAX_WAITING`. What was fetched ahead (`prefetch.py`) has a place
among the worker's answers, and none among the client's until it is asked for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from libmesh_node.llama.rpc.ahead import Chain, Foreseen, Watch
from libmesh_node.llama.rpc.armour import tensor_bytes
from libmesh_node.llama.rpc.facts import Device, WorkerFacts
from libmesh_node.llama.rpc.frames import (
    HELLO_ANSWER,
    MAJOR,
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
    answer,
    answer_head,
    answer_size,
    check_request,
    frame,
)
from libmesh_node.llama.rpc.opening import UNSAID, printable
from libmesh_node.llama.rpc.packing import pack
from libmesh_node.llama.rpc.prefetch import Fetch, Prefetch
from libmesh_node.llama.rpc.uploads import FromFile, ToWorker, Uploads
from libmesh_node.llama.rpc.weights import LearnedHashes, Weights

MAX_WAITING = 1024
"""Requests without an answer yet."""


@dataclass(frozen=True, slots=True)
class ToClient:
    """Send these bytes to llama-server."""

    data: bytes


Effect = ToWorker | FromFile | ToClient


class HostEnd:
    """One connection of llama-server's. `from_client` and `from_worker` take bytes in any pieces.

    Both raise `ProtocolError` when the other side is not what it should be; close both then.

    Args:
        facts: of the worker.
        weights: of the model that is loaded; the worker has proved to have the same.
        hashes: shared by all sessions of the model.
        chain: of all workers of this llama-server, and this one's `place` in it; `None` to foresee nothing.

    Attributes:
        engaged: the session's rpc-server is in use.
        denied: bytes of an allocation that the worker did not make; 0 if it made all.
    """

    def __init__(
        self,
        facts: WorkerFacts,
        weights: Weights,
        hashes: LearnedHashes,
        chain: Chain | None = None,
        place: int = 0,
    ) -> None:
        self._facts = facts
        self._uploads = Uploads(weights, hashes)
        self._client = FrameParser(check_request, {Command.SET_TENSOR: SET_HEADER})
        self._worker = FrameParser(_check_reply, {Reply.ANSWER: 0})
        self._waiting: deque[bytes | int] = (
            deque()
        )  # an answer that must wait its turn, or the size of one to come
        self._allocating = 0  # bytes asked for
        self._commands: deque[int | Fetch] = deque()  # those whose answers are to come from the worker
        self._prefetch = Prefetch()
        self._held: ToWorker | None = None  # an allocation behind what was fetched in vain
        self._streaming = False  # a large answer is on its way, in pieces
        self._bases: dict[int, int] = {}
        self._watch = Watch(chain, place)
        self._foreseen: Foreseen | None = None
        self.engaged = False
        self.denied = 0

    @property
    def spared(self) -> int:
        """Bytes of uploads that needed not travel."""
        return self._uploads.spared

    @property
    def waiting(self) -> bool:
        """Whether the worker owes an answer."""
        return bool(self._commands) or self._streaming

    def from_client(self, data: bytes) -> list[Effect]:
        """llama-server sent `data`."""
        effects: list[Effect] = []
        for event in self._client.feed(data):
            match event:
                case Frame():
                    self._request(Command(event.kind), event.payload, effects)
                case FrameStart():
                    self.engaged = True
                    self._watch.upset()
                    self._prefetch.other()
                    self._abandon(effects)
                    effects += self._uploads.begin(event)
                case FramePiece():
                    effects += self._uploads.go_on(event)
        return effects

    def from_worker(self, data: bytes) -> list[Effect]:
        """The worker's end sent `data`."""
        effects: list[Effect] = []
        for event in self._worker.feed(data):
            self._reply(event, effects)
        return effects

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _request(self, command: Command, payload: bytes, effects: list[Effect]) -> None:
        known = self._known(command, payload)
        if known is not None:
            self._answer(known, effects)
            return
        self.engaged = True
        ticket = self._watch.heard(command, payload)
        if self._foreseen is not None and self._follow(self._foreseen, command, payload, effects):
            return
        self._forward(command, payload, ticket, effects)

    def _forward(self, command: Command, payload: bytes, ticket: int | None, effects: list[Effect]) -> None:
        if self._held is not None:
            raise ProtocolError("a request while a buffer is being allocated")
        if command in (Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE):
            self._run_graph(command, payload, effects)
            return
        if command != Command.GET_TENSOR:
            self._prefetch.other(command)
        elif (fetch := self._prefetch.question(payload)) is not None:
            self._take_fetched(fetch, effects)
            return
        if command == Command.SET_TENSOR:
            effects += self._uploads.whole(payload)
            return
        if command == Command.SET_TENSOR_HASH:
            known, uploaded = self._uploads.hash(payload)
            effects += uploaded
            self._answer(bytes([known]), effects)
            return
        if command == Command.ALLOC_BUFFER:
            self._allocating = int.from_bytes(payload[4:], "little")
        if command == Command.FREE_BUFFER:
            self._bases.pop(int.from_bytes(payload, "little"), None)
        request = ToWorker(
            frame(command, payload) if ticket is None else frame(Link.PASS, TICKET.pack(ticket) + payload)
        )
        size = answer_size(command, payload)
        if command == Command.ALLOC_BUFFER and self._commands:  # the worker allocates when it owes nothing
            self._held = request
        else:
            effects.append(request)
        if size is not None:
            if len(self._waiting) >= MAX_WAITING:
                raise ProtocolError(f"more than {MAX_WAITING} requests at once")
            self._waiting.append(size)
            self._commands.append(command)

    def _run_graph(self, command: Command, payload: bytes, effects: list[Effect]) -> None:
        """Send a graph, and the questions that will follow. The chain's first worker is asked by the chain."""
        packed = pack(payload) if command == Command.GRAPH_COMPUTE and self._facts.unpacks else None
        said = frame(command, payload) if packed is None else frame(Link.PACKED, packed)
        effects.append(ToWorker(said))
        foreseeing = self._watch.chain is not None and not self._watch.place
        again = command == Command.GRAPH_RECOMPUTE and not foreseeing and not self._commands
        for fetch in self._prefetch.graph(payload[:4], again=again):
            self._commands.append(fetch)
            effects.append(ToWorker(frame(Command.GET_TENSOR, fetch.payload)))

    def _take_fetched(self, fetch: Fetch, effects: list[Effect]) -> None:
        """llama-server asks what was fetched. If that has come, so has everything that was asked before it."""
        if fetch.answer is not None:
            self._got(Command.GET_TENSOR, fetch.answer, effects)
        else:
            fetch.asked = True
            self._waiting.append(fetch.size)

    def _known(self, command: Command, payload: bytes) -> bytes | None:
        """The answer, where it is known here."""
        match command:
            case Command.HELLO:
                return HELLO_ANSWER.pack(
                    *self._facts.protocol, bytes(24)
                )  # no capabilities: this stays a stream of TCP
            case Command.DEVICE_COUNT:
                return len(self._facts.devices).to_bytes(4, "little")
            case Command.GET_ALIGNMENT:
                return self._device(payload).alignment.to_bytes(8, "little")
            case Command.GET_MAX_SIZE:
                return self._device(payload).max_size.to_bytes(8, "little")
            case Command.GET_DEVICE_MEMORY:
                device = self._device(payload)
                return device.free.to_bytes(8, "little") + device.total.to_bytes(8, "little")
            case Command.BUFFER_GET_BASE:
                base = self._bases.get(int.from_bytes(payload, "little"))
                if base is None:
                    raise ProtocolError("llama-server asked for a buffer that it has not")
                return base.to_bytes(8, "little")
            case Command.GET_ALLOC_SIZE:
                device = self._device(payload)
                size = tensor_bytes(payload[4 : 4 + TENSOR])
                return size.to_bytes(8, "little") if device.cpu and size is not None else None
        return None

    def _device(self, payload: bytes) -> Device:
        number = int.from_bytes(payload[:4], "little")
        if number >= len(self._facts.devices):
            raise ProtocolError(f"llama-server asked for device {number}")
        return self._facts.devices[number]

    # ── what was sent ahead ──────────────────────────────────────────────────────────────────────────────────────

    def sent_ahead(self, foreseen: Foreseen) -> bool:
        """The worker is to be sent this before llama-server says it. `False` if something is under way there."""
        if self._foreseen is not None or self._waiting or self._commands or self._client.midway:
            return False
        if self._prefetch.pending:
            return False
        self._foreseen = foreseen
        return True

    @property
    def overdue(self) -> bytes | None:
        """A frame that fills the hole from here, while llama-server waits for an answer that was foreseen."""
        foreseen, chain = self._foreseen, self._watch.chain
        if foreseen is None or chain is None or foreseen.matched < len(foreseen.messages):
            return None
        result = chain.result_before(self._watch.place)
        return None if result is None else frame(Link.FILL, TICKET.pack(foreseen.ticket) + result)

    def _follow(self, foreseen: Foreseen, command: int, payload: bytes, effects: list[Effect]) -> bool:
        """Whether llama-server said what was foreseen. If not, all that it said so far is sent now."""
        expected = foreseen.messages[foreseen.matched] if foreseen.matched < len(foreseen.messages) else None
        if expected is not None and foreseen.matched == foreseen.hole:
            result = (
                self._watch.chain.result_before(self._watch.place) if self._watch.chain is not None else None
            )
            expected = (expected[0], expected[1][:SET_HEADER] + (result or b""))
            foreseen.messages[foreseen.hole] = expected
        if expected != (command, payload):
            self._abandon(effects)
            return False
        foreseen.matched += 1
        if foreseen.matched == len(foreseen.messages):
            self._waiting.append(answer_size(command, payload) or 0)
            self._commands.append(command)
            self._deliver(foreseen, effects)
        return True

    def _abandon(self, effects: list[Effect]) -> None:
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is None:
            return
        self._prefetch.other()
        if self._watch.chain is not None:
            self._watch.chain.misses += 1
        effects.append(ToWorker(frame(Link.DROP, TICKET.pack(foreseen.ticket))))
        for command, payload in foreseen.messages[: foreseen.matched]:
            effects.append(ToWorker(frame(command, payload)))

    def _deliver(self, foreseen: Foreseen, effects: list[Effect]) -> None:
        if foreseen.answer is None or foreseen.matched < len(foreseen.messages):
            return
        self._foreseen = None
        if self._watch.chain is not None:
            self._watch.chain.hit()
        command, size = self._expect()
        self._got(command, self._take(foreseen.answer, (command, size)), effects)

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _answer(self, payload: bytes, effects: list[Effect]) -> None:
        """Answer from here, behind those that are still to come."""
        if len(self._waiting) >= MAX_WAITING:
            raise ProtocolError(f"more than {MAX_WAITING} requests at once")
        if self._waiting or self._streaming:
            self._waiting.append(payload)
        else:
            effects.append(ToClient(answer(payload)))

    def _reply(self, event: Event, effects: list[Effect]) -> None:
        match event:
            case Frame(kind=Reply.LOST):
                raise ProtocolError(printable(event.payload.decode("utf-8", "replace")) or UNSAID)
            case Frame(kind=Reply.ANSWER):
                if self._commands and isinstance(self._commands[0], Fetch):
                    self._fetched(self._commands[0], event.payload, effects)
                else:
                    command, size = self._expect()
                    self._got(command, self._take(event.payload, (command, size)), effects)
            case Frame(kind=Reply.FORESEEN):
                foreseen = self._foreseen
                if foreseen is not None and TICKET.unpack_from(event.payload)[0] == foreseen.ticket:
                    foreseen.answer = event.payload[TICKET.size :]
                    self._deliver(foreseen, effects)
            case FrameStart(kind=Reply.ANSWER):
                _, size = self._expect()
                if size != event.size:
                    raise ProtocolError(f"an answer of {event.size} bytes instead of {size}")
                self._streaming = True
                effects.append(ToClient(answer_head(size)))
            case FramePiece():
                effects.append(ToClient(event.data))
                if event.last:
                    self._streaming = False
                    self._release(effects)
            case _:
                raise ProtocolError("a reply out of turn")
        if self._held is not None and len(self._commands) == 1:
            effects.append(self._held)
            self._held = None

    def _fetched(self, fetch: Fetch, payload: bytes, effects: list[Effect]) -> None:
        if len(payload) != fetch.size:
            raise ProtocolError(f"an answer of {len(payload)} bytes instead of {fetch.size}")
        self._commands.popleft()
        if fetch.asked:
            self._waiting.popleft()
            self._got(Command.GET_TENSOR, payload, effects)
        elif not fetch.dropped:
            fetch.answer = payload

    def _expect(self) -> tuple[int, int]:
        command = self._commands.popleft() if self._commands else None
        if not isinstance(command, int):
            raise ProtocolError("an answer that nobody asked for")
        size = self._waiting.popleft()
        assert isinstance(size, int)
        return command, size

    def _take(self, payload: bytes, expected: tuple[int, int]) -> bytes:
        command, size = expected
        if command == Command.ALLOC_BUFFER:
            if len(payload) != size + 8:
                raise ProtocolError("an allocation without its base")
            if not any(payload[:8]):
                self.denied = self._allocating
            self._bases[int.from_bytes(payload[:8], "little")] = int.from_bytes(payload[16:], "little")
            return payload[:16]
        if len(payload) != size:
            raise ProtocolError(f"an answer of {len(payload)} bytes instead of {size}")
        return payload

    def _got(self, command: int, payload: bytes, effects: list[Effect]) -> None:
        if command == Command.GET_TENSOR and self._watch.chain is not None:
            self._watch.chain.answered(self._watch.place, payload if len(payload) <= WHOLE else None)
        effects.append(ToClient(answer(payload)))
        self._release(effects)

    def _release(self, effects: list[Effect]) -> None:
        while self._waiting and isinstance(self._waiting[0], bytes):
            effects.append(ToClient(answer(self._waiting.popleft())))  # type: ignore[arg-type]


def supported(protocol: tuple[int, int, int]) -> bool:
    """Whether these ends understand a protocol."""
    return protocol[0] == MAJOR


def _check_reply(kind: int, size: int) -> None:
    if kind == Reply.ANSWER or (kind == Reply.LOST and size <= 4096):
        return
    if kind == Reply.FORESEEN and TICKET.size <= size <= WHOLE + TICKET.size:
        return
    raise ProtocolError(f"a reply {kind} of {size} bytes")

"""The host's end of one session: what llama-server says goes in, what the worker's end shall hear comes out, and back.

    local connection opened ─▶ probing ─▶ engaged ─▶ closed
                                  └──────────────────▶ closed

*probing*: everything so far could be answered from what the worker told when the session was opened: versions, devices,
memory. llama-server opens a handful of connections for nothing else. *engaged*: the first command that needs the
rpc-server was sent; from then on the session belongs to this connection.

Order: answers leave in the order of the requests, whoever gives them. llama-server waits for each answer before it goes on,
so the queue is short; a client that does not wait is held to `MAX_WAITING`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from libmesh_node.llama.rpc.frames import (
    HELLO_ANSWER,
    MAJOR,
    REFERENCE,
    SET_HEADER,
    TENSOR,
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
    frame_head,
)
from libmesh_node.llama.rpc.weights import LearnedHashes, Place, Weights

LEAST_REFERENCE = 256
"""Smaller data is sent as it is: a reference takes 20 bytes itself."""

MAX_WAITING = 1024
"""Requests without an answer yet."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device of the worker's rpc-server, as it answers for it. `cpu`: its buffers are plain memory."""

    alignment: int
    max_size: int
    free: int
    total: int
    cpu: bool


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What the worker told when the session was opened."""

    protocol: tuple[int, int, int]
    devices: tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class ToWorker:
    """Send these bytes to the worker's end."""

    data: bytes


@dataclass(frozen=True, slots=True)
class FromFile:
    """Send the first `size` bytes of `place` of the model's files to the worker's end."""

    place: Place
    size: int


@dataclass(frozen=True, slots=True)
class ToClient:
    """Send these bytes to llama-server."""

    data: bytes


Effect = ToWorker | FromFile | ToClient


class _Upload:
    """A large SET_TENSOR under way: while it equals `place`, nothing of it has been sent."""

    def __init__(self, header: bytes, size: int, candidates: list[Place]) -> None:
        self.header, self.size = header, size
        self.candidates = candidates
        self.position = 0
        self.hash: int | None = None


class HostEnd:
    """One connection of llama-server's. `from_client` and `from_worker` take bytes in any pieces.

    Both raise `ProtocolError` when the other side is not what it should be; close both then.

    Args:
        facts: of the worker.
        weights: of the model that is loaded; the worker has proved to have the same.
        hashes: shared by all sessions of the model.

    Attributes:
        engaged: the session's rpc-server is in use.
        denied: bytes of an allocation that the worker did not make; 0 if it made all.
        references: uploads that were replaced, and `spared` their bytes.
    """

    def __init__(self, facts: WorkerFacts, weights: Weights, hashes: LearnedHashes) -> None:
        self._facts, self._weights, self._hashes = facts, weights, hashes
        self._client = FrameParser(check_request, {Command.SET_TENSOR: SET_HEADER})
        self._worker = FrameParser(_check_reply, {Reply.ANSWER: 0})
        self._waiting: deque[bytes | int] = (
            deque()
        )  # an answer that must wait its turn, or the size of one to come
        self._allocating = 0  # bytes asked for
        self._commands: deque[int] = deque()  # those whose answers are to come from the worker
        self._streaming = False  # a large answer is on its way, in pieces
        self._bases: dict[int, int] = {}
        self._upload: _Upload | None = None
        self._asked: tuple[bytes, int, int] | None = None
        self.engaged = False
        self.denied = 0
        self.references = 0
        self.spared = 0

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
                    self._begin_upload(event, effects)
                case FramePiece():
                    self._go_on(event, effects)
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
        if command == Command.SET_TENSOR:
            self._small_upload(payload, effects)
            return
        if command == Command.SET_TENSOR_HASH:
            self._hash(payload, effects)
            return
        if command == Command.ALLOC_BUFFER:
            self._allocating = int.from_bytes(payload[4:], "little")
        if command == Command.FREE_BUFFER:
            self._bases.pop(int.from_bytes(payload, "little"), None)
        size = answer_size(command, payload)
        if size is not None:
            if len(self._waiting) >= MAX_WAITING:
                raise ProtocolError(f"more than {MAX_WAITING} requests at once")
            self._waiting.append(size)
            self._commands.append(command)
        effects.append(ToWorker(frame(command, payload)))

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
        return None

    def _device(self, payload: bytes) -> Device:
        number = int.from_bytes(payload[:4], "little")
        if number >= len(self._facts.devices):
            raise ProtocolError(f"llama-server asked for device {number}")
        return self._facts.devices[number]

    # ── uploads ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _hash(self, payload: bytes, effects: list[Effect]) -> None:
        """llama-server asks whether the data of this hash is there already. It is, if hash and name are known."""
        name, offset = _name(payload), int.from_bytes(payload[TENSOR : TENSOR + 8], "little")
        value = int.from_bytes(payload[TENSOR + 8 :], "little")
        for place in self._weights.whole(name) if offset == 0 else ():
            if self._hashes.get(name, place) == value:
                self._refer(payload[:TENSOR] + bytes(9), place, effects)
                self._answer(b"\x01", effects)
                return
        self._asked = (name, offset, value)
        self._answer(b"\x00", effects)

    def _small_upload(self, payload: bytes, effects: list[Effect]) -> None:
        header, data = payload[:SET_HEADER], payload[SET_HEADER:]
        for place in self._candidates(header, len(data)):
            if self._weights.read(place, 0, len(data)) == data:
                self._refer(header, place, effects)
                return
        effects.append(ToWorker(frame(Command.SET_TENSOR, _uncached(header) + data)))

    def _begin_upload(self, start: FrameStart, effects: list[Effect]) -> None:
        self.engaged = True
        self._upload = upload = _Upload(start.head, start.size, self._candidates(start.head, start.size))
        if self._asked is not None and self._asked[:2] == (_name(start.head), _offset(start.head)):
            upload.hash = self._asked[2]
        self._asked = None
        if not upload.candidates:
            effects.append(ToWorker(_set_head(upload)))

    def _go_on(self, piece: FramePiece, effects: list[Effect]) -> None:
        upload = self._upload
        assert upload is not None
        if upload.candidates:
            self._compare(upload, piece, effects)
        else:
            effects.append(ToWorker(piece.data))
        if piece.last:
            self._upload = None

    def _compare(self, upload: _Upload, piece: FramePiece, effects: list[Effect]) -> None:
        equal = [
            place
            for place in upload.candidates
            if self._weights.read(place, upload.position, len(piece.data)) == piece.data
        ]
        if not equal:  # what was equal so far comes from the file, for it was not kept
            effects.append(ToWorker(_set_head(upload)))
            effects.append(FromFile(upload.candidates[0], upload.position))
            effects.append(ToWorker(piece.data))
        elif piece.last:
            if upload.hash is not None and equal[0] in self._weights.whole(_name(upload.header)):
                self._hashes.learn(_name(upload.header), equal[0], upload.hash)
            self._refer(upload.header, equal[0], effects)
        upload.candidates = equal
        upload.position += len(piece.data)

    def _candidates(self, header: bytes, size: int) -> list[Place]:
        if size < LEAST_REFERENCE:
            return []
        return list(self._weights.candidates(_name(header), _offset(header), size))

    def _refer(self, header: bytes, place: Place, effects: list[Effect]) -> None:
        self.references += 1
        self.spared += place.size
        reference = REFERENCE.pack(_uncached(header), place.part, place.offset, place.size)
        effects.append(ToWorker(frame(Link.REFERENCE, reference)))

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
                raise ProtocolError(event.payload.decode("utf-8", "replace")[:500])
            case Frame(kind=Reply.ANSWER):
                payload = self._take(event.payload, self._expect())
                effects.append(ToClient(answer(payload)))
                self._release(effects)
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

    def _expect(self) -> tuple[int, int]:
        if not self._commands:
            raise ProtocolError("an answer that nobody asked for")
        size = self._waiting.popleft()
        assert isinstance(size, int)
        return self._commands.popleft(), size

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

    def _release(self, effects: list[Effect]) -> None:
        while self._waiting and isinstance(self._waiting[0], bytes):
            effects.append(ToClient(answer(self._waiting.popleft())))  # type: ignore[arg-type]


def supported(protocol: tuple[int, int, int]) -> bool:
    """Whether these ends understand a protocol."""
    return protocol[0] == MAJOR


def _check_reply(kind: int, size: int) -> None:
    if kind == Reply.ANSWER or (kind == Reply.LOST and size <= 4096):
        return
    raise ProtocolError(f"a reply {kind} of {size} bytes")


def _name(header: bytes) -> bytes:
    return header[228:292].split(b"\0", 1)[0]


def _offset(header: bytes) -> int:
    return int.from_bytes(header[TENSOR + 1 : SET_HEADER], "little")


def _uncached(header: bytes) -> bytes:
    """The header with `cache_flag` 0: nothing is to stay behind on the worker."""
    return header[:TENSOR] + b"\0" + header[TENSOR + 1 :]


def _set_head(upload: _Upload) -> bytes:
    return frame_head(Command.SET_TENSOR, SET_HEADER + upload.size) + _uncached(upload.header)

"""The two ends of the tunnel between llama-server and rpc-server, each against an oracle that is simpler than it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from functools import partial

from libmesh_node.llama.rpc import worker
from libmesh_node.llama.rpc.ahead import Chain, Foreseen
from libmesh_node.llama.rpc.armour import tensor_bytes
from libmesh_node.llama.rpc.facts import Device, WorkerFacts
from libmesh_node.llama.rpc.frames import (
    ANSWER_SIZES,
    REQUEST_SIZES,
    SET_HEADER,
    TENSOR,
    TICKET,
    Command,
    Frame,
    FrameParser,
    FramePiece,
    FrameStart,
    Link,
    ProtocolError,
    Reply,
    answer,
    frame,
)
from libmesh_node.llama.rpc.host import HostEnd, ToClient
from libmesh_node.llama.rpc.prefetch import Fetch
from libmesh_node.llama.rpc.uploads import FromFile, ToWorker
from libmesh_node.llama.rpc.weights import LearnedHashes, Place, Weights
from libmesh_node.llama.rpc.worker import FileToServer, Push, ToHost, ToServer, WorkerEnd

from tests.fuzz.rpc_requests import DEVICES, FILE, FILE_NAME, GRANTED, LINKS, REQUESTS
from tests.fuzz.target import Lots
from tests.llama.rpc import messages
from tests.llama.rpc.messages import BASE, BUFFER, SIZE, tensor

# ── the worker's end ─────────────────────────────────────────────────────────────────────────────────────────────


class _Heard:
    """What one end let out, by where to; pieces joined, since how it was cut must not matter."""

    def __init__(self) -> None:
        self.server, self.host, self.pushed = bytearray(), bytearray(), bytearray()

    def add(self, effects: Iterable[worker.Effect]) -> None:
        for effect in effects:
            match effect:
                case ToServer(data):
                    self.server += data
                case FileToServer(place):
                    assert place.part == 0
                    assert place.offset + place.size <= len(FILE)
                    self.server += FILE[place.offset : place.offset + place.size]
                case ToHost(data):
                    self.host += data
                case Push(ticket, data):
                    self.pushed += TICKET.pack(ticket) + data


class _Server:
    """rpc-server as far as memory goes: fails for what would have harmed the real one."""

    def __init__(self) -> None:
        self.parser = FrameParser(lambda *_: None, {Command.SET_TENSOR: SET_HEADER})
        self.buffer = False
        self.granted = 0
        self.owed: list[tuple[int, int]] = []

    def hears(self, data: bytes) -> None:
        for event in self.parser.feed(data):
            match event:
                case FrameStart():
                    self._within(event.head, _u64(event.head, TENSOR + 1), event.size)
                case Frame():
                    self._request(event.kind, event.payload)
                case FramePiece():
                    pass

    def _request(self, kind: int, payload: bytes) -> None:
        assert kind in worker.ALLOWED or kind == Command.BUFFER_GET_BASE
        assert kind in (Command.SET_TENSOR, Command.GRAPH_COMPUTE) or REQUEST_SIZES[kind] == len(payload)
        if kind == Command.SET_TENSOR:
            assert not payload[TENSOR], "an upload for the cache"
            self._within(payload, _u64(payload, TENSOR + 1), len(payload) - SET_HEADER)
        if kind in (Command.GET_TENSOR, Command.MEMSET_TENSOR):
            self._within(payload, _u64(payload, TENSOR), _u64(payload, TENSOR + 8))
        if kind == Command.FREE_BUFFER:
            assert self.buffer
            self.buffer = False
        if kind == Command.ALLOC_BUFFER:
            assert _u64(payload, 4) <= GRANTED
            assert int.from_bytes(payload[:4], "little") < DEVICES
        size = _u64(payload, TENSOR + 8) if kind == Command.GET_TENSOR else ANSWER_SIZES.get(Command(kind))
        if size is not None:
            self.owed.append((kind, size))

    def _within(self, about: bytes, offset: int, size: int) -> None:
        assert self.buffer
        assert _u64(about, 12) == BUFFER
        data = _u64(about, 220)
        assert BASE <= data <= data + offset + size <= BASE + SIZE, "bytes outside of their buffer"
        assert offset + size <= (tensor_bytes(about[:TENSOR]) or 0), "bytes outside of their tensor"

    def answers(self, lots: Lots) -> bytes:
        """The next answer, honest as a rule; the one buffer that there is lies at `BASE`."""
        if not self.owed or not lots.number() % 16:
            return answer(lots.piece())
        kind, size = self.owed.pop(0)
        if kind == Command.ALLOC_BUFFER:
            refused = self.buffer
            self.buffer = True
            return answer(struct.pack("<QQ", 0 if refused else BUFFER, SIZE))
        if kind == Command.BUFFER_GET_BASE:
            return answer(struct.pack("<Q", BASE))
        return answer(bytes(min(size, 1 << 20)))


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def _worker_end() -> WorkerEnd:
    return WorkerEnd(
        GRANTED, DEVICES, lambda place: place.part == 0 and place.offset + place.size <= len(FILE)
    )


def worker_end(data: bytes) -> None:
    lots = Lots(data)
    step = 1 + lots.number()
    whole, cut, ends, server = _Heard(), _Heard(), (_worker_end(), _worker_end()), _Server()
    if lots.number() % 8:  # as a rule there is a buffer
        for end, heard in zip(ends, (_Heard(), _Heard()), strict=True):
            heard.add(end.from_host(messages.allocate(SIZE)))
            heard.add(end.from_server(answer(struct.pack("<QQ", BUFFER, SIZE))))
            heard.add(end.from_server(answer(struct.pack("<Q", BASE))))
        server.buffer = True
    told = 0
    try:
        while lots:
            choice = lots.number() % 12
            if choice < 2:
                said = server.answers(lots)
                for end, heard in zip(ends, (whole, cut), strict=True):
                    heard.add(end.from_server(said))
            elif choice < 3:
                ticket, size = lots.number() % 8, lots.one_of((4, 64, 300))
                for end, heard in zip(ends, (whole, cut), strict=True):
                    heard.add(end.fill(ticket, bytes(size)))
            else:
                said = lots.one_of(LINKS if choice < 6 else REQUESTS)(lots)
                _cut(
                    said, step, lambda piece: cut.add(ends[1].from_host(piece)), partial(_all, whole, ends[0])
                )
            assert (whole.server, whole.host, whole.pushed) == (cut.server, cut.host, cut.pushed)
            server.hears(bytes(whole.server[told:]))
            told = len(whole.server)
    except ProtocolError as exc:
        assert str(exc)  # noqa: PT017 - refused in words; what was let out before did no harm
        server.hears(bytes(cut.server[told:]))


def _all(heard: _Heard, end: WorkerEnd, data: bytes) -> None:
    heard.add(end.from_host(data))


def _cut(data: bytes, step: int, feed: Callable[[bytes], None], feed_all: Callable[[bytes], None]) -> None:
    """Feed one in pieces and the other whole. Both take it, or both refuse it; then raise as they did."""
    refused: list[bool] = []
    for take, size in ((feed, step), (feed_all, max(1, len(data)))):
        try:
            for at in range(0, len(data), size):
                take(data[at : at + size])
            refused.append(False)
        except ProtocolError:
            refused.append(True)
    assert refused[0] == refused[1], "how it was cut decides whether it is refused"
    if refused[0]:
        raise ProtocolError("refused by both")


# ── the host's end ───────────────────────────────────────────────────────────────────────────────────────────────

FACTS = WorkerFacts((7, 0, 0), (Device(64, 1 << 40, 100, 200, True), Device(128, 1 << 40, 1, 2, False)))


def _token(lots: Lots) -> bytes:
    """What llama-server says while it generates: the same again and again, with other data."""
    data = bytes([lots.number() % 4]) * 64
    about = tensor(b"inp", kind=24, shape=(64, 1, 1, 1))
    recompute = frame(Command.GRAPH_RECOMPUTE, bytes(4))
    return messages.set_tensor(data, about) + recompute + messages.get_tensor(64, about)


def _answered(end: HostEnd, lots: Lots) -> bytes:
    """The worker's answer that is due, as a rule; else anything."""
    if end._commands and lots.number() % 8:
        due = end._commands[0]
        size = due.size if isinstance(due, Fetch) else end._waiting[0]
        if isinstance(size, int) and size <= 1 << 20:
            base = 8 if due == Command.ALLOC_BUFFER else 0
            return frame(Reply.ANSWER, bytes([lots.number() % 4]) * (size + base))
    if lots.number() % 2:
        return frame(Reply.FORESEEN, TICKET.pack(lots.number() % 64) + bytes([lots.number() % 4]) * 64)
    return lots.one_of((frame(lots.number() % 5, lots.piece()), lots.piece()))


def host_end(data: bytes) -> None:
    lots = Lots(data)
    step = 1 + lots.number()
    number = os.memfd_create("weights")
    try:
        os.write(number, FILE)
        weights = Weights([number], [len(FILE)], {FILE_NAME: [Place(0, 0, len(FILE))]})
        _converse(lots, step, weights)
    except ProtocolError as exc:
        assert str(exc)  # noqa: PT017 - refused in words
    finally:
        os.close(number)


def _converse(lots: Lots, step: int, weights: Weights) -> None:
    chain, sent = Chain(2), [bytearray(), bytearray()]
    ends = [HostEnd(FACTS, weights, LearnedHashes(None), chain, place) for place in (0, 1)]
    alone = HostEnd(FACTS, weights, LearnedHashes(None)), HostEnd(FACTS, weights, LearnedHashes(None))
    heard = bytearray(), bytearray()

    def send(place: int, foreseen: Foreseen, data: bytes) -> bool:
        if not ends[place].sent_ahead(foreseen):
            return False
        sent[place] += data
        return True

    for place in (0, 1):
        chain.join(place, partial(send, place))
    while lots:
        place, choice = lots.number() % 2, lots.number() % 8
        if choice < 4:
            said = _token(lots) if choice < 2 else lots.one_of(REQUESTS)(lots)
            _cut(
                said,
                step,
                lambda piece: _pour(heard[0], weights, alone[0].from_client(piece)),
                lambda piece: _pour(heard[1], weights, alone[1].from_client(piece)),
            )
            assert heard[0] == heard[1], "how it was cut decides what the worker hears"
            ends[place].from_client(said)
            assert ends[place].spared >= 0
        else:
            ends[place].from_worker(_answered(ends[place], lots))
            both = _answered(alone[0], lots)
            assert _to_client(alone[0], both) == _to_client(alone[1], both)
        overdue = ends[place].overdue
        assert overdue is None or overdue[0] == Link.FILL


def _pour(heard: bytearray, weights: Weights, effects: Iterable[ToWorker | FromFile | ToClient]) -> None:
    for effect in effects:
        match effect:
            case ToWorker(data):
                heard += data
            case FromFile(place, size):
                heard += weights.read(place, 0, size)


def _to_client(end: HostEnd, data: bytes) -> bytes:
    return b"".join(effect.data for effect in end.from_worker(data) if isinstance(effect, ToClient))

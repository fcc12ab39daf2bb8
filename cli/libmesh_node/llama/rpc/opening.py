"""The first frame each way: what a host asks of a worker, and what it is told. See rpc.proto.

Both come from another node, so decoding trusts nothing: what makes no sense is a `ProtocolError`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from libmesh_node._pb import rpc_pb2 as pb
from libmesh_node.llama.rpc.facts import Device, WorkerFacts
from libmesh_node.llama.rpc.frames import MAJOR, TOKEN, ProtocolError

MAX_MESSAGE = 4096
"""Bytes of either message."""

MAX_DEVICES = 16
MAX_NEIGHBOURS = 16
UNSAID = "it gave no reason"
_MAX_TEXT = 500
_PROTOCOL = re.compile(r"(\d{1,3})\.(\d{1,3})\.(\d{1,3})", re.ASCII)

Protocol = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A worker of the same host's, and the port by which the host's own programs reach it."""

    port: int
    peer: str
    token: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """What a host asks for; the fields are those of the message."""

    digest: str
    memory_bytes: int
    protocol: Protocol
    model: str = ""
    token: bytes = b""
    previous: str = ""
    next: str = ""
    next_token: bytes = b""
    neighbours: tuple[Neighbour, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """The worker will not. `later`: it may, some other time."""

    reason: str
    later: bool = False


def encode_request(request: SessionRequest) -> bytes:
    """`request` as the payload of `Link.OPEN`."""
    message = pb.SessionRequest(
        digest=request.digest,
        memory_bytes=request.memory_bytes,
        rpc_protocol=_text(request.protocol),
        model=request.model[:_MAX_TEXT],
        token=request.token,
        previous=request.previous,
        next=request.next,
        next_token=request.next_token,
        neighbours=[
            pb.Neighbour(port=each.port, peer=each.peer, token=each.token) for each in request.neighbours
        ],
    )
    return message.SerializeToString(deterministic=True)


def decode_request(data: bytes) -> SessionRequest:
    """The inverse of `encode_request`. Raises `ProtocolError`."""
    message = pb.SessionRequest()
    _parse(message, data)
    if not re.fullmatch(r"[0-9a-f]{64}", message.digest):
        raise ProtocolError("a digest that is none")
    if any(len(token) not in (0, TOKEN) for token in (message.token, message.next_token)):
        raise ProtocolError("a token that is none")
    return SessionRequest(
        digest=message.digest,
        memory_bytes=message.memory_bytes,
        protocol=read_protocol(message.rpc_protocol),
        model=printable(message.model),
        token=message.token,
        previous=printable(message.previous),
        next=printable(message.next),
        next_token=message.next_token,
        neighbours=_neighbours(message),
    )


def encode_answer(outcome: WorkerFacts | Refusal) -> bytes:
    """`outcome` as the payload of `Reply.OPENED`."""
    if isinstance(outcome, Refusal):
        message = pb.SessionAnswer(refusal=outcome.reason[:_MAX_TEXT] or "refused", later=outcome.later)
        return message.SerializeToString(deterministic=True)
    devices = [
        pb.RpcDevice(
            alignment=device.alignment,
            max_size=device.max_size,
            free_bytes=device.free,
            total_bytes=device.total,
            cpu=device.cpu,
        )
        for device in outcome.devices
    ]
    message = pb.SessionAnswer(rpc_protocol=_text(outcome.protocol), devices=devices, unpacks=outcome.unpacks)
    return message.SerializeToString(deterministic=True)


def decode_answer(data: bytes) -> WorkerFacts | Refusal:
    """The inverse of `encode_answer`. Raises `ProtocolError`."""
    message = pb.SessionAnswer()
    _parse(message, data)
    if message.refusal:
        return Refusal(printable(message.refusal) or UNSAID, message.later)
    if not 1 <= len(message.devices) <= MAX_DEVICES:
        raise ProtocolError(f"{len(message.devices)} devices")
    devices = tuple(
        Device(entry.alignment, entry.max_size, entry.free_bytes, entry.total_bytes, entry.cpu)
        for entry in message.devices
    )
    if any(not device.alignment or device.alignment & (device.alignment - 1) for device in devices):
        raise ProtocolError("an alignment that is no power of two")
    return WorkerFacts(read_protocol(message.rpc_protocol), devices, message.unpacks)


def read_protocol(text: str) -> Protocol:
    """`major.minor.patch` as numbers. Raises `ProtocolError`."""
    match = _PROTOCOL.fullmatch(text)
    if match is None or any(int(number) > 255 for number in match.groups()):
        raise ProtocolError(f"{printable(text)!r} is no version of the RPC protocol")
    return int(match[1]), int(match[2]), int(match[3])


def is_fork(protocol: tuple[int, ...]) -> bool:
    """Whether this is the first mesh's fork of llama.cpp: 4.x, from 4.1 on. Stock llama.cpp's 4 had no minor version."""
    return protocol[0] == 4 and protocol[1] >= 1


def protocol_mismatch(host: Protocol, worker: Protocol) -> str | None:
    """Why a host's llama-server and a worker's rpc-server cannot work together, in words; `None` if they can.

    llama.cpp demands the same major, and of the server no newer minor than the client's.
    """
    ours, theirs = _text(host), _text(worker)
    if host[0] != worker[0] or worker[1] > host[1]:
        return f"the host speaks llama.cpp's RPC protocol {ours}, the worker {theirs}; both need the same llama.cpp"
    if host[0] != MAJOR and not is_fork(host):
        return f"llama.cpp's RPC protocol {ours} is not known here, only {MAJOR}.x and the fork's 4.1"
    return None


def _neighbours(message: pb.SessionRequest) -> tuple[Neighbour, ...]:
    found = tuple(Neighbour(each.port, printable(each.peer), each.token) for each in message.neighbours)
    if len(found) > MAX_NEIGHBOURS or len({each.port for each in found}) < len(found):
        raise ProtocolError("neighbours that cannot be told apart")
    if any(not 0 < each.port < 1 << 16 or len(each.token) != TOKEN for each in found):
        raise ProtocolError("a neighbour that is none")
    return found


def _text(protocol: Protocol) -> str:
    return ".".join(map(str, protocol))


def printable(text: str) -> str:
    """`text` from another node, fit for people: without control characters, at most 500 characters."""
    return "".join(c for c in text[:_MAX_TEXT] if c.isprintable())


def _parse(message: pb.SessionRequest | pb.SessionAnswer, data: bytes) -> None:
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"a first message of {len(data)} bytes")
    try:
        message.ParseFromString(data)
    except DecodeError as exc:
        raise ProtocolError("a first message that cannot be read") from exc

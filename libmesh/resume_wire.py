"""Messages by which a tunnel survives the loss of its connection ⇄ bytes. Meaning and limits: mesh.proto."""

from __future__ import annotations

from dataclasses import dataclass

from libmesh._pb import mesh_pb2 as pb
from libmesh.wire import MAX_OPEN
from libmesh.wire_pieces import WireError, parse

SESSION_BYTES = 16


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one end of a tunnel has got in what the other sends."""

    session: bytes
    received: int
    ended: bool


def session_of_open(data: bytes) -> bytes | None:
    """The session that an `Open` names; `None` if it names none, or not one of 16 bytes."""
    session = parse(pb.Open(), data, MAX_OPEN).session
    return session if len(session) == SESSION_BYTES else None


def is_resumable(opened: bytes) -> bool:
    """Whether an `Opened` says that the tunnel can be resumed."""
    return parse(pb.Opened(), opened, MAX_OPEN).resumable


def encode_progress(progress: Progress) -> bytes:
    """The bytes of a `Progress`."""
    return pb.Progress(
        session=progress.session, received=progress.received, ended=progress.ended
    ).SerializeToString()


def decode_progress(data: bytes) -> Progress:
    """The inverse of `encode_progress`."""
    message = parse(pb.Progress(), data, MAX_OPEN)
    if len(message.session) != SESSION_BYTES:
        raise WireError(f"a session of {len(message.session)} bytes, not {SESSION_BYTES}")
    return Progress(message.session, message.received, message.ended)


def encode_resumed(refusal: str | None, received: int, ended: bool) -> bytes:
    """The bytes of a `Resumed`; a `refusal` of `None` agrees."""
    return pb.Resumed(refusal=refusal, received=received, ended=ended).SerializeToString()


def decode_resumed(data: bytes) -> tuple[str | None, int, bool]:
    """The refusal's word or `None`, and how far the other end has got."""
    message = parse(pb.Resumed(), data, MAX_OPEN)
    return message.refusal if message.HasField("refusal") else None, message.received, message.ended

"""The form of `tests/vectors/*.json`: golden bytes of every message, and the values that they stand for.

A file is `{"message", "about", "valid": […], "invalid": […]}`. Each entry has a `name` and either `hex` (the message's
bytes) or `text` (a token). A valid one has its `value`; its bytes are exactly what we send, unless `canonical` is false:
then they are only to be accepted. An invalid one has the `reason` for which it is to be refused.

In values, bytes are hex, enumerations are lower-case names, absence is null, a pair is a list.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

from libmesh import resume_wire, tokens, wire
from libmesh.core.announcement import Record
from libmesh.core.credentials import Invite, Revocation
from libmesh.core.membership_io import Suspicion
from libmesh.core.summary import Digest, Summary
from libmesh.peers import PeerId
from libmesh.resume_wire import Progress

FOLDER = Path(__file__).resolve().parent / "vectors"

GOSSIP = {"record": Record, "revocation": Revocation, "suspicion": Suspicion}


@dataclasses.dataclass(frozen=True)
class Codec:
    """How a message's value, bytes and JSON hang together; `shape` is the value's type."""

    encode: Callable[[Any], bytes | str]
    decode: Callable[[Any], Any]
    shape: Any
    about: str


CODECS: dict[str, Codec] = {
    "hello": Codec(wire.encode_hello, wire.decode_hello, wire.Hello, "Hello"),
    "hello_reply": Codec(wire.encode_hello_reply, wire.decode_hello_reply, wire.HelloReply, "HelloReply"),
    "digest": Codec(wire.encode_digest, wire.decode_digest, Digest, "Digest"),
    "summary": Codec(
        lambda value: wire.encode_summary(*value),
        wire.decode_summary,
        tuple[bytes, Summary | None],
        "Summary: the fingerprint, and those of the parts",
    ),
    "records": Codec(
        lambda value: wire.encode_records(*value),
        wire.decode_records,
        tuple[list[Record], list[Revocation]],
        "Records: the records, and the revocations",
    ),
    "gossip": Codec(wire.encode_gossip, wire.decode_gossip, None, "Gossip, by its kind; null if unknown"),
    "revocation": Codec(wire.encode_revocation, wire.decode_revocation, Revocation, "Revocation"),
    "probe": Codec(wire.encode_probe, wire.decode_probe, PeerId | None, "Probe: the target"),
    "probe_answer": Codec(wire.encode_probe_answer, wire.decode_probe_answer, bool, "ProbeAnswer: heard"),
    "open": Codec(wire.encode_open, wire.decode_open, str, "Open: the service"),
    "opened": Codec(wire.encode_opened, wire.decode_opened, str | None, "Opened: the refusal"),
    "progress": Codec(resume_wire.encode_progress, resume_wire.decode_progress, Progress, "Progress"),
    "resumed": Codec(
        lambda value: resume_wire.encode_resumed(*value),
        resume_wire.decode_resumed,
        tuple[str | None, int, bool],
        "Resumed: the refusal, received, ended",
    ),
    "post": Codec(
        lambda value: wire.encode_post(*value), wire.decode_post, tuple[str, bytes], "Post: topic, data"
    ),
    "invite": Codec(tokens.encode_invite, tokens.decode_invite, Invite, "the invite token, as text"),
}


def to_json(value: Any) -> Any:
    """The JSON form of a value."""
    match value:
        case bytes():
            return value.hex()
        case IntEnum():
            return value.name.lower()
        case None | bool() | int() | str():
            return value
        case dict():
            return {key: to_json(item) for key, item in value.items()}
        case frozenset():
            return sorted(to_json(item) for item in value)
        case tuple() | list():
            return [to_json(item) for item in value]
        case _:
            return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}


def from_json(shape: Any, data: Any) -> Any:
    """The inverse of `to_json` for a value of type `shape`."""
    if dataclasses.is_dataclass(shape):
        hints = typing.get_type_hints(shape)
        return shape(**{name: from_json(hints[name], item) for name, item in data.items()})  # type: ignore[operator]
    arguments = typing.get_args(shape)
    match typing.get_origin(shape):
        case typing.Union | types.UnionType:
            return None if data is None else from_json(arguments[0], data)
        case origin if origin is tuple and arguments[-1] is Ellipsis:
            return tuple(from_json(arguments[0], item) for item in data)
        case origin if origin is tuple:
            return tuple(from_json(kind, item) for kind, item in zip(arguments, data, strict=True))
        case origin if origin in (list, frozenset):
            return origin(from_json(arguments[0], item) for item in data)
        case None if shape is bytes:
            return bytes.fromhex(data)
        case None if isinstance(shape, type) and issubclass(shape, IntEnum):
            return shape[data.upper()]
        case None:
            return data
        case _:  # a mapping from peers
            return {key: from_json(arguments[1], item) for key, item in data.items()}


def value_to_json(message: str, value: Any) -> Any:
    """As `to_json`, for what `CODECS[message]` decodes to."""
    if message != "gossip" or value is None:
        return to_json(value)
    return {"kind": type(value).__name__.lower(), **to_json(value)}


def value_from_json(message: str, data: Any) -> Any:
    """The inverse of `value_to_json`."""
    if message != "gossip":
        return from_json(CODECS[message].shape, data)
    if data is None:
        return None
    return from_json(GOSSIP[data["kind"]], {name: item for name, item in data.items() if name != "kind"})

"""The messages of libp2p's rendezvous ⇄ values. Their specification is proto/libmesh/libp2p/rendezvous.proto.

Encoding and decoding are inverses. What does not decode, is too long or lacks what its type needs raises `WireError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import base58

from libmesh import keys
from libmesh._pb import rendezvous_pb2 as pb
from libmesh.core.rendezvous_desk import MAX_NAMESPACE
from libmesh.framing import frame
from libmesh.net.envelope import EnvelopeKind
from libmesh.peers import PeerId
from libmesh.wire_pieces import WireError, addresses_from_pb, encode_address, parse

PROTOCOL = "/rendezvous/1.0.0"

MAX_REQUEST = 8192
MAX_ANSWER = 65536
MAX_RECORD = 3072
"""Bytes of a signed record; so the most that one answer may hold fit into it."""

MAX_ADDRESSES = 32

RECORD = EnvelopeKind(b"libp2p-peer-record", b"\x03\x01")
"""A peer's word of its addresses."""

_COOKIE_BYTES = 8


class Status(IntEnum):
    """An answer. The numbers are the specification's."""

    OK = 0
    INVALID_NAMESPACE = 100
    INVALID_RECORD = 101
    INVALID_TTL = 102
    INVALID_COOKIE = 103
    NOT_AUTHORIZED = 200
    INTERNAL_ERROR = 300
    UNAVAILABLE = 400


@dataclass(frozen=True, slots=True)
class Register:
    """Tell others in `namespace` of the signed `record`, for `lasts` seconds; 0 for as long as is allowed."""

    namespace: str
    record: bytes
    lasts: int = 0


@dataclass(frozen=True, slots=True)
class Unregister:
    """Tell nobody any more."""

    namespace: str


@dataclass(frozen=True, slots=True)
class Discover:
    """Who is in `namespace`? At most `limit` (0: all), and only what is newer than `cookie`."""

    namespace: str
    limit: int = 0
    cookie: bytes = b""


@dataclass(frozen=True, slots=True)
class Registered:
    """The answer to `Register`. `status` may be a number that `Status` does not know."""

    status: int
    lasts: int = 0


@dataclass(frozen=True, slots=True)
class Discovered:
    """The answer to `Discover`."""

    status: int
    records: tuple[bytes, ...] = ()
    cookie: bytes = b""


def encode_request(request: Register | Unregister | Discover) -> bytes:
    """The frame of a request."""
    match request:
        case Register(namespace, record, lasts):
            said = pb.Register(ns=namespace, signed_peer_record=record, ttl=lasts)
            return _framed(pb.Message(type=pb.Message.REGISTER, register=said))
        case Unregister(namespace):
            return _framed(pb.Message(type=pb.Message.UNREGISTER, unregister=pb.Unregister(ns=namespace)))
        case Discover(namespace, limit, cookie):
            asked = pb.Discover(ns=namespace, limit=limit, cookie=cookie)
            return _framed(pb.Message(type=pb.Message.DISCOVER, discover=asked))


def decode_request(data: bytes) -> Register | Unregister | Discover:
    """The inverse of `encode_request`, without the length. A namespace may be empty or too long: see `is_namespace`."""
    message = parse(pb.Message(), data, MAX_REQUEST)
    if message.HasField("type"):
        match message.type:
            case pb.Message.REGISTER:
                said = message.register
                return Register(said.ns, said.signed_peer_record, said.ttl)
            case pb.Message.UNREGISTER:
                return Unregister(message.unregister.ns)
            case pb.Message.DISCOVER:
                return Discover(message.discover.ns, message.discover.limit, message.discover.cookie)
    raise WireError("not a request to a rendezvous point")


def is_namespace(namespace: str) -> bool:
    """Whether it may name a namespace."""
    return 0 < len(namespace.encode()) <= MAX_NAMESPACE


def encode_registered(answer: Registered) -> bytes:
    """The frame of an answer to `Register`."""
    said = pb.RegisterResponse(status=pb.Status.ValueType(answer.status), ttl=answer.lasts)
    return _framed(pb.Message(type=pb.Message.REGISTER_RESPONSE, register_response=said))


def decode_registered(data: bytes) -> Registered:
    """The inverse of `encode_registered`, without the length."""
    message = parse(pb.Message(), data, MAX_ANSWER)
    if not message.HasField("type") or message.type != pb.Message.REGISTER_RESPONSE:
        raise WireError("not an answer to a registration")
    return Registered(message.register_response.status, message.register_response.ttl)


def encode_discovered(namespace: str, answer: Discovered, lasts: tuple[int, ...] = ()) -> bytes:
    """The frame of an answer to `Discover`; `lasts` are the seconds left of each record."""
    said = pb.DiscoverResponse(status=pb.Status.ValueType(answer.status), cookie=answer.cookie)
    for record, left in zip(answer.records, lasts, strict=True):
        said.registrations.append(pb.Register(ns=namespace, signed_peer_record=record, ttl=left))
    return _framed(pb.Message(type=pb.Message.DISCOVER_RESPONSE, discover_response=said))


def decode_discovered(data: bytes) -> Discovered:
    """The inverse of `encode_discovered`, without the length. What a record says is for `open_record`."""
    message = parse(pb.Message(), data, MAX_ANSWER)
    if not message.HasField("type") or message.type != pb.Message.DISCOVER_RESPONSE:
        raise WireError("not an answer to who is there")
    said = message.discover_response
    return Discovered(said.status, tuple(r.signed_peer_record for r in said.registrations), said.cookie)


def encode_cookie(number: int) -> bytes:
    """A number as a cookie."""
    return number.to_bytes(_COOKIE_BYTES, "big")


def decode_cookie(cookie: bytes) -> int:
    """The inverse of `encode_cookie`; no cookie is 0."""
    if cookie and len(cookie) != _COOKIE_BYTES:
        raise WireError(f"a cookie of {len(cookie)} bytes, which is none of ours")
    return int.from_bytes(cookie, "big")


# ---- signed peer records ----------------------------------------------------------------------------------------


def make_record(seed: bytes, sequence: int, addresses: tuple[str, ...]) -> bytes:
    """A signed envelope in which the peer with the Ed25519 `seed` says where it is; the first of `addresses` that fit."""
    public = keys.public_key(seed)
    said = pb.PeerRecord(peer_id=base58.b58decode(keys.peer_id_of(public)), seq=sequence)
    room = MAX_RECORD - 256
    for address in map(encode_address, addresses[:MAX_ADDRESSES]):
        if (room := room - len(address) - 8) < 0:
            break
        said.addresses.append(pb.PeerRecord.Address(multiaddr=address))
    payload = said.SerializeToString(deterministic=True)
    return RECORD.seal(seed, payload)


def open_record(data: bytes) -> tuple[PeerId, tuple[str, ...]]:
    """Who signed a record, and where it says that it is. Raises `WireError` unless it is whole and of an Ed25519 key."""
    public, payload = RECORD.open(data, MAX_RECORD)
    said = parse(pb.PeerRecord(), payload, MAX_RECORD)
    peer = keys.peer_id_of(public)
    if said.peer_id != base58.b58decode(peer):
        raise WireError("a peer record of another peer than signed it")
    return peer, addresses_from_pb(entry.multiaddr for entry in said.addresses[:MAX_ADDRESSES])


def _framed(message: pb.Message) -> bytes:
    return frame(message.SerializeToString(deterministic=True))

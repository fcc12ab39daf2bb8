"""The messages of circuit relay v2 and of DCUtR ⇄ values. Their specification is proto/libmesh/libp2p.

Encoding and decoding are inverses. What does not decode, is too long or lacks what its type needs raises `WireError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import base58

from libmesh import keys
from libmesh._pb import circuit_pb2 as pb
from libmesh._pb import holepunch_pb2 as punch_pb
from libmesh.framing import frame
from libmesh.net.envelope import EnvelopeKind
from libmesh.peers import PeerId
from libmesh.wire_pieces import WireError, addresses_from_pb, encode_address, parse

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"
DCUTR = "/libp2p/dcutr"

MAX_MESSAGE = 4096
"""Bytes of a message without its length: DCUtR's own limit, and what go-libp2p and js-libp2p take of relays."""

MAX_RELAY_ADDRESSES = 32
MAX_PUNCH_ADDRESSES = 16
_MAX_PEER_ID = 64

_VOUCHER = EnvelopeKind(b"libp2p-relay-rsvp", b"\x03\x02")


class Status(IntEnum):
    """A relay's or a target's answer. The numbers are the specification's."""

    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


WORDS: dict[int, str] = {
    Status.RESERVATION_REFUSED: "the relay has no room for a reservation",
    Status.RESOURCE_LIMIT_EXCEEDED: "the relay has no room for another circuit",
    Status.PERMISSION_DENIED: "the relay does not serve this node",
    Status.CONNECTION_FAILED: "the relay could not reach the peer",
    Status.NO_RESERVATION: "the peer is not to be reached through this relay",
}
"""What each refusal means, for a person."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What a relay lets one circuit do.

    Attributes:
        duration: seconds; 0 for ever.
        data: bytes in each direction; 0 without limit.
    """

    duration: int = 0
    data: int = 0


@dataclass(frozen=True, slots=True)
class Reserve:
    """A client asks for a reservation."""


@dataclass(frozen=True, slots=True)
class Connect:
    """To a relay: connect me with `peer`. To a target: `peer` wants to be connected with you."""

    peer: PeerId
    limit: Limit = Limit()


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place at a relay.

    Attributes:
        expires_unix: when it ends, by the relay's clock.
        addresses: the relay's multiaddrs, each with `/p2p/…` at its end.
        voucher: the relay's signed word for it; empty for none.
    """

    expires_unix: int
    addresses: tuple[str, ...] = ()
    voucher: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a relay says to a client. `status` may be a number that `Status` does not know."""

    status: int
    reservation: Reservation | None = None
    limit: Limit = Limit()


# ---- hop --------------------------------------------------------------------------------------------------------


def encode_hop_request(request: Reserve | Connect) -> bytes:
    """The frame of a client's request to a relay."""
    if isinstance(request, Reserve):
        return _framed(pb.HopMessage(type=pb.HopMessage.RESERVE))
    return _framed(pb.HopMessage(type=pb.HopMessage.CONNECT, peer=_peer_to_pb(request.peer)))


def decode_hop_request(data: bytes) -> Reserve | Connect:
    """The inverse of `encode_hop_request`, without the length."""
    message = parse(pb.HopMessage(), data, MAX_MESSAGE)
    if message.HasField("type") and message.type == pb.HopMessage.RESERVE:
        return Reserve()
    if message.HasField("type") and message.type == pb.HopMessage.CONNECT:
        return Connect(_peer_from_pb(message.peer), _limit_from_pb(message.limit))
    raise WireError("not a request to a relay")


def encode_hop_answer(answer: Answer) -> bytes:
    """The frame of a relay's answer to a client."""
    message = pb.HopMessage(type=pb.HopMessage.STATUS, status=pb.Status.ValueType(answer.status))
    if (reservation := answer.reservation) is not None:
        message.reservation.expire = reservation.expires_unix
        message.reservation.addrs.extend(map(encode_address, reservation.addresses[:MAX_RELAY_ADDRESSES]))
        if reservation.voucher:
            message.reservation.voucher = reservation.voucher
    if answer.limit != Limit():
        message.limit.CopyFrom(_limit_to_pb(answer.limit))
    return _framed(message)


def decode_hop_answer(data: bytes) -> Answer:
    """The inverse of `encode_hop_answer`, without the length."""
    message = parse(pb.HopMessage(), data, MAX_MESSAGE)
    if not message.HasField("type") or message.type != pb.HopMessage.STATUS:
        raise WireError("not a relay's answer")
    reservation = None
    if message.HasField("reservation"):
        reservation = Reservation(
            message.reservation.expire,
            addresses_from_pb(message.reservation.addrs[:MAX_RELAY_ADDRESSES]),
            message.reservation.voucher,
        )
    return Answer(message.status, reservation, _limit_from_pb(message.limit))


# ---- stop -------------------------------------------------------------------------------------------------------


def encode_stop_request(request: Connect) -> bytes:
    """The frame in which a relay tells a target who wants to be connected with it."""
    message = pb.StopMessage(type=pb.StopMessage.CONNECT, peer=_peer_to_pb(request.peer))
    if request.limit != Limit():
        message.limit.CopyFrom(_limit_to_pb(request.limit))
    return _framed(message)


def decode_stop_request(data: bytes) -> Connect:
    """The inverse of `encode_stop_request`, without the length."""
    message = parse(pb.StopMessage(), data, MAX_MESSAGE)
    if not message.HasField("type") or message.type != pb.StopMessage.CONNECT:
        raise WireError("not a relay's request")
    return Connect(_peer_from_pb(message.peer), _limit_from_pb(message.limit))


def encode_stop_answer(status: int) -> bytes:
    """The frame of a target's answer to a relay."""
    return _framed(pb.StopMessage(type=pb.StopMessage.STATUS, status=pb.Status.ValueType(status)))


def decode_stop_answer(data: bytes) -> int:
    """The inverse of `encode_stop_answer`, without the length."""
    message = parse(pb.StopMessage(), data, MAX_MESSAGE)
    if not message.HasField("type") or message.type != pb.StopMessage.STATUS:
        raise WireError("not a target's answer")
    return message.status


# ---- vouchers ---------------------------------------------------------------------------------------------------


def make_voucher(seed: bytes, peer: PeerId, expires_unix: int) -> bytes:
    """A signed envelope in which the relay with the Ed25519 `seed` says that it keeps a place for `peer`."""
    public = keys.public_key(seed)
    voucher = pb.Voucher(
        relay=base58.b58decode(keys.peer_id_of(public)),
        peer=base58.b58decode(peer),
        expiration=expires_unix,
    ).SerializeToString(deterministic=True)
    return _VOUCHER.seal(seed, voucher)


# ---- hole punching ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PunchAddresses:
    """DCUtR's CONNECT: where others see the sender. Those that we cannot read are left out."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PunchNow:
    """DCUtR's SYNC: dial at once."""


def encode_punch(message: PunchAddresses | PunchNow) -> bytes:
    """The frame of a message of DCUtR."""
    if isinstance(message, PunchNow):
        return _framed(punch_pb.HolePunch(type=punch_pb.HolePunch.SYNC))
    addresses = map(encode_address, message.addresses[:MAX_PUNCH_ADDRESSES])
    return _framed(punch_pb.HolePunch(type=punch_pb.HolePunch.CONNECT, addrs=addresses))


def decode_punch(data: bytes) -> PunchAddresses | PunchNow:
    """The inverse of `encode_punch`, without the length."""
    message = parse(punch_pb.HolePunch(), data, MAX_MESSAGE)
    if not message.HasField("type"):
        raise WireError("not a message of a hole punch")
    if message.type == punch_pb.HolePunch.SYNC:
        return PunchNow()
    return PunchAddresses(addresses_from_pb(message.addrs[:MAX_PUNCH_ADDRESSES]))


# ---- pieces -----------------------------------------------------------------------------------------------------


def _framed(message: pb.HopMessage | pb.StopMessage | punch_pb.HolePunch) -> bytes:
    return frame(message.SerializeToString(deterministic=True))


def _peer_to_pb(peer: PeerId) -> pb.Peer:
    return pb.Peer(id=base58.b58decode(peer))


def _peer_from_pb(message: pb.Peer) -> PeerId:
    if not 0 < len(message.id) <= _MAX_PEER_ID:
        raise WireError(f"a peer id of {len(message.id)} bytes; 1 to {_MAX_PEER_ID} are allowed")
    return PeerId(base58.b58encode(message.id).decode("ascii"))


def _limit_to_pb(limit: Limit) -> pb.Limit:
    return pb.Limit(duration=limit.duration, data=limit.data)


def _limit_from_pb(message: pb.Limit) -> Limit:
    return Limit(message.duration, message.data)

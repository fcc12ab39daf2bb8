"""The messages of AutoNAT v2, and what is needed of identify, ⇄ values. Specified in proto/libmesh/libp2p/autonat.proto.

Encoding and decoding are inverses. What does not decode or lacks what its type needs raises `WireError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from libp2p.identity.identify.pb.identify_pb2 import Identify

from libmesh._pb import autonat_pb2 as pb
from libmesh.framing import frame
from libmesh.wire_pieces import WireError, addresses_from_pb, encode_address, parse

DIAL_REQUEST = "/libp2p/autonat/2/dial-request"
DIAL_BACK = "/libp2p/autonat/2/dial-back"
IDENTIFY = "/ipfs/id/1.0.0"

MAX_MESSAGE = 8192
MAX_IDENTIFY = 8192
MAX_ADDRESSES = 16
MAX_PIECE = 4096
MAX_DATA = 100_000


class Verdict(IntEnum):
    """What came of a request. Positive: the address at `index` was dialled."""

    REACHED = 1
    NOT_REACHED = 2
    REJECTED = -1  # too often, or too busy
    REFUSED = -2  # no address that the other side dials
    BROKEN = -3  # its own fault


@dataclass(frozen=True, slots=True)
class Request:
    """Dial the first of `addresses` that you can, and say `nonce` there."""

    addresses: tuple[str, ...]
    nonce: int


@dataclass(frozen=True, slots=True)
class DataWanted:
    """Send `size` bytes first, as the address at `index` is not where I see you."""

    index: int
    size: int


@dataclass(frozen=True, slots=True)
class Data:
    """Some of those bytes."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Response:
    """What came of it."""

    verdict: Verdict
    index: int = 0


Reply = DataWanted | Data | Response | Request

_STATUS = {
    Verdict.REJECTED: pb.DialResponse.E_REQUEST_REJECTED,
    Verdict.REFUSED: pb.DialResponse.E_DIAL_REFUSED,
    Verdict.BROKEN: pb.DialResponse.E_INTERNAL_ERROR,
}
_FAILED = {number: verdict for verdict, number in _STATUS.items()}


def encode(message: Reply) -> bytes:
    """The frame of a message on a dial-request stream."""
    match message:
        case Request(addresses, nonce):
            encoded = [encode_address(address) for address in addresses[:MAX_ADDRESSES]]
            body = pb.Message(dial_request=pb.DialRequest(addrs=encoded, nonce=nonce))
        case DataWanted(index, size):
            body = pb.Message(dial_data_request=pb.DialDataRequest(addr_idx=index, num_bytes=size))
        case Data(data):
            body = pb.Message(dial_data_response=pb.DialDataResponse(data=data))
        case Response(verdict, index):
            body = pb.Message(dial_response=_response(verdict, index))
    return frame(body.SerializeToString())


def _response(verdict: Verdict, index: int) -> pb.DialResponse:
    if verdict in _STATUS:
        return pb.DialResponse(status=_STATUS[verdict])
    dialled = pb.DIAL_OK if verdict is Verdict.REACHED else pb.E_DIAL_ERROR
    return pb.DialResponse(status=pb.DialResponse.OK, addr_idx=index, dial_status=dialled)


def decode(data: bytes) -> Reply:
    """The inverse of `encode`, without the length. Addresses that we cannot read are passed over."""
    message = parse(pb.Message(), data, MAX_MESSAGE)
    match message.WhichOneof("msg"):
        case "dial_request":
            request = message.dial_request
            return Request(addresses_from_pb(request.addrs[:MAX_ADDRESSES]), request.nonce)
        case "dial_data_request":
            return DataWanted(message.dial_data_request.addr_idx, message.dial_data_request.num_bytes)
        case "dial_data_response":
            return Data(message.dial_data_response.data)
        case "dial_response":
            return _response_from_pb(message.dial_response)
    raise WireError("not a message of AutoNAT")


def _response_from_pb(message: pb.DialResponse) -> Response:
    if message.status != pb.DialResponse.OK:
        return Response(_FAILED.get(message.status, Verdict.BROKEN))
    if message.dial_status == pb.DIAL_OK:
        return Response(Verdict.REACHED, message.addr_idx)
    if message.dial_status == pb.E_DIAL_ERROR:
        return Response(Verdict.NOT_REACHED, message.addr_idx)
    return Response(Verdict.BROKEN, message.addr_idx)


def encode_dial_back(nonce: int) -> bytes:
    """The frame that the dialler sends."""
    return frame(pb.DialBack(nonce=nonce).SerializeToString())


def decode_dial_back(data: bytes) -> int:
    """The nonce."""
    return parse(pb.DialBack(), data, MAX_MESSAGE).nonce


def encode_dial_back_taken() -> bytes:
    """The frame that answers a dial-back."""
    return frame(pb.DialBackResponse(status=pb.DialBackResponse.OK).SerializeToString())


def observed_address(data: bytes) -> str | None:
    """Where a peer sees us, from its identify message; `None` if it does not say."""
    addresses = addresses_from_pb([parse(Identify(), data, MAX_IDENTIFY).observed_addr])
    return addresses[0] if addresses else None

"""The parts that several messages share, between values and protobuf, and the checks that all of them need.

For `wire.py` and `tokens.py` only; all other files see values and bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtobufMessage
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from libmesh import keys
from libmesh._pb import mesh_pb2 as pb
from libmesh.core.credentials import MAX_LINKS, Credential, Link, LinkKind
from libmesh.errors import MeshError
from libmesh.peers import Scope

MAX_ADDRESS = 255

# C0 and C1 control characters, and those that turn the direction of writing (Unicode TR 9, "Directional Formatting").
_REFUSED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

_M = TypeVar("_M", bound=ProtobufMessage)


class WireError(MeshError):
    """Bytes from a peer break the specification; the text says how."""


class NotAMessage(WireError):
    """They are too many, or not protobuf: there is nobody there who speaks this protocol."""


def exactly(length: int, data: bytes, what: str) -> bytes:
    """`data`, if it has `length` bytes."""
    if len(data) != length:
        raise WireError(f"{what} has {len(data)} bytes, not {length}")
    return data


def scope_from_pb(number: int) -> Scope:
    """The scope of this number."""
    try:
        return Scope(number)
    except ValueError as exc:
        raise WireError(f"unknown scope {number}") from exc


def link_to_pb(link: Link) -> pb.Link:
    """A link as protobuf."""
    return pb.Link(
        subject=link.subject,
        kind=pb.LinkKind.ValueType(link.kind),
        scope=pb.Scope.ValueType(link.scope),
        not_after=link.not_after_unix,
        signature=link.signature,
    )


def _link_from_pb(message: pb.Link) -> Link:
    try:
        kind = LinkKind(message.kind)
    except ValueError as exc:
        raise WireError(f"unknown link kind {message.kind}") from exc
    return Link(
        subject=exactly(keys.KEY_LENGTH, message.subject, "a link's subject"),
        kind=kind,
        scope=scope_from_pb(message.scope),
        not_after_unix=message.not_after if message.HasField("not_after") else None,
        signature=exactly(keys.SIGNATURE_LENGTH, message.signature, "a link's signature"),
    )


def links_from_pb(messages: Iterable[pb.Link]) -> tuple[Link, ...]:
    """At most `MAX_LINKS` links."""
    links = list(messages)
    if len(links) > MAX_LINKS:
        raise WireError(f"a chain of {len(links)} links; at most {MAX_LINKS} are accepted")
    return tuple(_link_from_pb(link) for link in links)


def credential_to_pb(credential: Credential) -> pb.Credential:
    """A credential as protobuf."""
    return pb.Credential(mesh_key=credential.mesh_key, links=[link_to_pb(link) for link in credential.links])


def credential_from_pb(message: pb.Credential) -> Credential:
    """The inverse of `credential_to_pb`."""
    links = links_from_pb(message.links)
    if not links:
        raise WireError("a credential without links")
    return Credential(mesh_key=exactly(keys.KEY_LENGTH, message.mesh_key, "a mesh key"), links=links)


def encode_address(address: str) -> bytes:
    """A multiaddr's binary form. Raises `ValueError` if `address` is none."""
    try:
        data = bytes(Multiaddr(address).to_bytes())
    except (MultiaddrError, ValueError) as exc:
        raise ValueError(f"{address!r} is not a multiaddr, such as /ip4/192.0.2.1/tcp/4001: {exc}") from exc
    if not 0 < len(data) <= MAX_ADDRESS:
        raise ValueError(f"{address!r} is not a multiaddr of 1 to {MAX_ADDRESS} bytes")
    return data


def addresses_from_pb(addresses: Iterable[bytes]) -> tuple[str, ...]:
    """Multiaddrs as text, from their binary forms of at most 255 bytes.

    Those that we cannot read are passed over: they may be of a protocol that is newer than we are. So are those whose
    text would not give the same bytes again, as we could not pass them on.
    """
    found = (_address_from_bytes(address) for address in addresses)
    return tuple(text for text in found if text is not None)


def _address_from_bytes(data: bytes) -> str | None:
    if len(data) > MAX_ADDRESS:
        raise WireError(f"an address of {len(data)} bytes; at most {MAX_ADDRESS} are allowed")
    try:
        text = str(Multiaddr(data))
        return text if encode_address(text) == data else None
    # multiaddr lets its codecs' own errors through (struct.error, KeyError, …); all of them mean the same.
    except Exception:  # noqa: BLE001
        return None


def valid_service_name(name: str) -> bool:
    """Whether `name` may name a service: 1 to 255 bytes of UTF-8, without what would garble a terminal.

    The characters that are refused are listed, not taken from Unicode's categories: those grow with each version of
    Python, and peers must agree.
    """
    try:
        return isinstance(name, str) and 1 <= len(name.encode()) <= 255 and not _REFUSED.search(name)
    except UnicodeEncodeError:
        return False


def parse(message: _M, data: bytes, limit: int) -> _M:
    """Fill `message` from at most `limit` bytes."""
    if len(data) > limit:
        raise NotAMessage(f"a {type(message).__name__} of {len(data)} bytes; at most {limit} are allowed")
    try:
        message.ParseFromString(data)
    except DecodeError as exc:
        raise NotAMessage(f"not a {type(message).__name__}: {exc}") from exc
    return message

"""Messages put together by hand, so that tests of what reads them do not depend on what writes them."""

from __future__ import annotations

from libmesh import keys
from tests.members import MESH, seed

# ── protobuf by hand (protobuf.dev, "Encoding") ──────────────────────────────────────────────────────────────────


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out) + bytes([number])


def field(number: int, content: bytes | str | int) -> bytes:
    """One field: bytes and text with their length, numbers as varints."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    data = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(data)) + data


def public(number: int) -> bytes:
    return keys.public_key(seed(number))


def link(
    *,
    subject: bytes = public(1),
    kind: int = 2,
    scope: int = 1,
    end: int | None = None,
    signature: bytes = bytes(64),
) -> bytes:
    body = field(1, subject) + field(2, kind) + field(3, scope)
    return body + (b"" if end is None else field(4, end)) + field(5, signature)


def chain(*links: bytes, mesh_key: bytes = MESH.mesh_key) -> bytes:
    return field(1, mesh_key) + b"".join(field(2, each) for each in links)


def said(
    *,
    peer_key: bytes = public(1),
    shown: bytes | None = None,
    services: tuple[tuple[str | bytes, int], ...] = (),
    addresses: tuple[bytes, ...] = (),
    attributes: bytes = b"",
    signature: bytes = bytes(64),
    more: bytes = b"",
) -> bytes:
    """A `Record`, made of the parts of its announcement."""
    body = (
        field(1, peer_key) + field(2, chain(link()) if shown is None else shown) + field(3, 1) + field(4, 1)
    )
    for name, scope in services:
        body += field(6, field(1, name) + (field(2, scope) if scope else b""))
    for address in addresses:
        body += field(7, address)
    return field(1, body + (field(8, attributes) if attributes else b"") + more) + field(2, signature)

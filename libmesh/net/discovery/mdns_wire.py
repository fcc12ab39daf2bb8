"""Multicast DNS messages (RFC 6762), as far as finding members of a mesh on a LAN needs them, ⇄ values. No I/O.

After libp2p's own discovery (libp2p/specs, discovery/mdns.md): a question for the service's PTR record is answered with that
record and a TXT record, in which each string `dnsaddr=…` is a multiaddr with `/p2p/…`. The service is ours, as strangers
are of no use to a member, and the TXT record also says of which mesh, to those who know its id only: `mesh=SALT.HASH` with
the first 8 bytes of SHA-256(`libmesh lan` ‖ salt ‖ mesh id). The salt is new for each start of a node.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

SERVICE = "_libmesh._udp.local"
TTL = 120

MAX_MESSAGE = 1400
"""Bytes of a message that is sent: one packet on any LAN."""

MAX_ADDRESSES = 8

_PTR, _TXT, _IN, _ANY = 12, 16, 1, 255
_UNIQUE = 0x8000  # RFC 6762, 10.2: what was known of this name is replaced
_ANSWER = 0x8400  # a response, authoritative
_LONGEST_NAME = 255
_MAX_RECORDS = 64


@dataclass(frozen=True, slots=True)
class Notice:
    """A node says of itself that it is here. `ttl` 0: that it leaves."""

    instance: str
    mesh: str
    addresses: tuple[str, ...]
    ttl: int = TTL


def mesh_mark(mesh_id: str, salt: bytes) -> str:
    """Names a mesh to those who know its id, and tells nothing to others."""
    digest = hashlib.sha256(b"libmesh lan" + salt + mesh_id.encode("ascii")).digest()
    return f"{salt.hex()}.{digest[:8].hex()}"


def is_marked(mark: str, mesh_id: str) -> bool:
    """Whether `mark` names the mesh with this id."""
    salt, _, _ = mark.partition(".")
    try:
        return len(salt) == 16 and mesh_mark(mesh_id, bytes.fromhex(salt)) == mark
    except ValueError:
        return False


def encode_question() -> bytes:
    """Who is here?"""
    return struct.pack("!6H", 0, 0, 1, 0, 0, 0) + _name(SERVICE) + struct.pack("!HH", _PTR, _IN)


def encode_notice(notice: Notice) -> bytes:
    """I am. Addresses that do not fit into one packet are left out."""
    full = f"{notice.instance}.{SERVICE}"
    pointer = _record(_name(SERVICE), _PTR, _IN, notice.ttl, _name(full))
    text = _string(f"mesh={notice.mesh}")
    for address in notice.addresses[:MAX_ADDRESSES]:
        string = _string(f"dnsaddr={address}")
        if 12 + len(pointer) + len(_name(full)) + 10 + len(text) + len(string) > MAX_MESSAGE:
            break
        text += string
    head = struct.pack("!6H", 0, _ANSWER, 0, 1, 0, 1)
    return head + pointer + _record(_name(full), _TXT, _IN | _UNIQUE, notice.ttl, text)


def is_question(data: bytes) -> bool:
    """Whether it asks for our service. Raises `ValueError` for what is no DNS message."""
    _, flags, questions, *_ = _head(data)
    if flags & 0x8000:
        return False
    offset = 12
    for _ in range(min(questions, _MAX_RECORDS)):
        name, offset = _read_name(data, offset)
        kind, _ = struct.unpack_from("!HH", _through(data, offset + 4), offset)
        offset += 4
        if name.lower() == SERVICE and kind in (_PTR, _ANY):
            return True
    return False


def decode_notices(data: bytes) -> list[Notice]:
    """What nodes say in an answer. Empty for a question. Raises `ValueError` for what is no DNS message."""
    _, flags, questions, *counts = _head(data)
    if not flags & 0x8000:
        return []
    offset = 12
    for _ in range(min(questions, _MAX_RECORDS)):
        _, offset = _read_name(data, offset)
        offset += 4
    found: list[Notice] = []
    for _ in range(min(sum(counts), _MAX_RECORDS)):
        name, offset = _read_name(data, offset)
        kind, _, ttl, length = struct.unpack_from("!HHIH", _through(data, offset + 10), offset)
        offset += 10
        body = _through(data, offset + length)[offset : offset + length]
        offset += length
        if kind == _TXT and name.lower().endswith(f".{SERVICE}"):
            found.append(_notice(name[: -len(SERVICE) - 1], ttl, _strings(body)))
    return found


def _notice(instance: str, ttl: int, strings: list[str]) -> Notice:
    values = [string.partition("=") for string in strings]
    mesh = next((value for key, _, value in values if key == "mesh"), "")
    addresses = [value for key, _, value in values if key == "dnsaddr"]
    return Notice(instance, mesh, tuple(addresses[:MAX_ADDRESSES]), ttl)


def _head(data: bytes) -> tuple[int, ...]:
    return struct.unpack_from("!6H", _through(data, 12))


def _through(data: bytes, end: int) -> bytes:
    if len(data) < end:
        raise ValueError("a DNS message that is cut off")
    return data


def _name(name: str) -> bytes:
    return b"".join(_string(label) for label in name.split(".")) + b"\0"


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")[:255]
    return bytes([len(encoded)]) + encoded


def _strings(data: bytes) -> list[str]:
    found, offset = [], 0
    while offset < len(data):
        length = data[offset]
        found.append(
            _through(data, offset + 1 + length)[offset + 1 : offset + 1 + length].decode("utf-8", "replace")
        )
        offset += 1 + length
    return found


def _record(name: bytes, kind: int, which: int, ttl: int, body: bytes) -> bytes:
    return name + struct.pack("!HHIH", kind, which, ttl, len(body)) + body


def _read_name(data: bytes, offset: int) -> tuple[str, int]:
    """A name, and where what follows it begins. Pointers (RFC 1035, 4.1.4) must lead backwards, so they end."""
    labels: list[str] = []
    after: int | None = None
    lowest = offset
    while (length := _through(data, offset + 1)[offset]) != 0:
        if length >= 0xC0:
            target = struct.unpack_from("!H", _through(data, offset + 2), offset)[0] & 0x3FFF
            after = offset + 2 if after is None else after
            if target >= lowest:
                raise ValueError("a name that leads forwards")
            offset = lowest = target
            continue
        if length > 63:
            raise ValueError("a label of an unknown kind")
        labels.append(
            _through(data, offset + 1 + length)[offset + 1 : offset + 1 + length].decode("utf-8", "replace")
        )
        offset += 1 + length
        if sum(map(len, labels)) > _LONGEST_NAME:
            raise ValueError("a name that is too long")
    return ".".join(labels), offset + 1 if after is None else after

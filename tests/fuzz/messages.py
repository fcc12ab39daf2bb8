"""Targets for whatever is decoded: `decode_*` raises its own error or gives a value that survives a round trip."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator

import trio
from libmesh_node.announced import decode_status, encode_status

from libmesh import keys, tokens, wire
from libmesh.core import credentials
from libmesh.core.announcement import Record, authentic
from libmesh.core.credentials import Revocation, Revoked
from libmesh.errors import InviteExpired, InviteMalformed
from libmesh.framing import FrameReader
from libmesh.invites import check_invite, read_invite
from libmesh.net.tcp import host_and_port
from libmesh.wire_pieces import WireError, addresses_from_pb
from tests.fuzz.target import Lots, Target, drive
from tests.members import MESH, NOW, peer
from tests.vector_form import CODECS, FOLDER

MESSAGES = [name for name in CODECS if name != "invite"]


def _wire(data: bytes) -> None:
    codec = CODECS[MESSAGES[data[0] % len(MESSAGES)]] if data else CODECS["hello"]
    try:
        value = codec.decode(data[1:])
    except WireError:
        return
    assert codec.decode(codec.encode(value)) == value
    match value:
        case wire.Hello() | wire.HelloReply() if value.credential is not None:
            refusal = credentials.verify(
                value.credential, mesh_id=MESH.mesh_id, peer_key=keys.public_key_of(peer(1)), now_unix=NOW
            )
            assert refusal is None or refusal.detail
        case Record():
            authentic(value, mesh_id=MESH.mesh_id, now_unix=NOW)
        case Revocation():
            value.is_valid(MESH.mesh_id)
            revoked = Revoked()
            assert revoked.add(value)
            assert not revoked.add(value)


def _vectors(name: str) -> Iterator[bytes]:
    described = json.loads((FOLDER / f"{name}.json").read_text())
    for entry in (*described["valid"], *described["invalid"]):
        data = bytes.fromhex(entry["hex"]) if "hex" in entry else entry["text"].encode()
        if len(data) <= 2048:
            yield data


def _wire_seeds() -> Iterator[bytes]:
    for number, name in enumerate(MESSAGES):
        yield from (bytes([number]) + data for data in _vectors(name))


def _invites(data: bytes) -> None:
    text = data[1:].decode("utf-8", "replace")
    if data[:1] == b"s":  # sealed: the checksum is right
        body = data[1:] + hashlib.sha256(data[1:]).digest()[:4]
        text = tokens.TOKEN_PREFIX + base64.urlsafe_b64encode(body).rstrip(b"=").decode()
    try:
        invite = tokens.decode_invite(text)
    except InviteMalformed:
        return
    assert tokens.decode_invite(tokens.encode_invite(invite)) == invite
    info = read_invite(text)
    assert tokens.decode_chain(info.chain).mesh_key == invite.authority.mesh_key
    try:
        check_invite(text, now_unix=NOW)
    except (InviteMalformed, InviteExpired) as exc:
        assert str(exc)  # noqa: PT017 - either is right; without words it is not


def _invite_seeds() -> Iterator[bytes]:
    for token in _vectors("invite"):
        yield b"t" + token
        encoded = "".join(token.decode().split())[len(tokens.TOKEN_PREFIX) :]
        try:
            yield b"s" + base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))[:-4]
        except ValueError:
            continue


class Scripted(trio.abc.ReceiveStream):
    """Says what it was given, in pieces, and ends."""

    def __init__(self, data: bytes, most: int) -> None:
        self._data, self._most = data, most

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        count = self._most if max_bytes is None else min(max_bytes, self._most)
        piece, self._data = self._data[:count], self._data[count:]
        return piece

    @property
    def left(self) -> bytes:
        return self._data

    async def aclose(self) -> None:
        return


def _frames(data: bytes) -> None:
    lots = Lots(data)
    limit, most = lots.one_of((0, 1, 127, 128, 1024, 2**20)), 1 + lots.number()
    rest = lots.rest()
    stream = Scripted(rest, most)
    length = prefix = 0
    for prefix, byte in enumerate(rest[:4], 1):
        length |= (byte & 0x7F) << 7 * (prefix - 1)
        if byte < 0x80:
            break
    else:
        prefix = 0
    whole = prefix and length <= limit and len(rest) >= prefix + length
    try:
        message = drive(FrameReader(stream, limit).receive())
    except WireError:
        assert not whole
    else:
        assert whole
        assert (message, stream.left) == (rest[prefix : prefix + length], rest[prefix + length :])


def _node_status(data: bytes) -> None:
    status = decode_status(data)
    assert decode_status(encode_status(status)) == status
    for text in (status.version, status.hostname, status.node_status, *(m.name for m in status.models)):
        assert text.isprintable()


def _addresses(data: bytes) -> None:
    try:
        (*found,) = addresses_from_pb([data])
    except WireError:
        assert len(data) > 255
        return
    for address in (*found, data.decode("utf-8", "replace")):
        try:
            host, port = host_and_port(address)
        except ValueError:
            continue
        assert host
        assert 0 <= port < 65536


DECODERS = (
    Target("wire", "a message is refused with WireError or survives a round trip", _wire, _wire_seeds, 2048),
    Target("invites", "a token is refused in words or survives a round trip", _invites, _invite_seeds, 1024),
    Target("frames", "a frame is taken off a stream to the byte, or refused", _frames, longest=600),
    Target("node_status", "any attributes are a status that is fit to print", _node_status, longest=512),
    Target(
        "addresses", "any address is dialled, skipped, or refused with ValueError", _addresses, longest=256
    ),
)

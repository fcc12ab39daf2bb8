"""A connection of a peer whose key is not Ed25519, which libmesh's own network cannot make."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from libmesh.net.muxer import YamuxConnection
from libmesh.net.noise import Noise

_ORDER = (
    0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141  # of secp256k1 (SEC 2, section 2.4.1)
)


class HandshakeFailed(Exception):
    """The other side did not finish the handshake."""


class Secp256k1Key:
    """A key pair of the kind that many libp2p peers have; it is its own public and private key.

    Its protobuf is `PublicKey{Type = Secp256k1 (2), Data = 33 bytes}`; it signs ECDSA over SHA-256, in DER (libp2p
    specs, "peer-ids").
    """

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256K1())
        self.public_key = self.private_key = self

    def serialize(self) -> bytes:
        """The public key, as the handshake shows it."""
        point = self._key.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        return b"\x08\x02\x12\x21" + point

    def sign(self, data: bytes) -> bytes:
        """A signature, of the two that are good the one with the lower S: libsecp256k1 takes no other."""
        r, s = decode_dss_signature(self._key.sign(data, ec.ECDSA(hashes.SHA256())))
        return encode_dss_signature(r, min(s, _ORDER - s))


class RawConnection:
    """A socket with the calls that the handshake and the muxer use of a py-libp2p connection."""

    def __init__(self, socket: trio.SocketStream) -> None:
        self._socket = socket

    async def read(self, n: int | None = None) -> bytes:
        """Some bytes; empty at the end."""
        return bytes(await self._socket.receive_some(n))

    async def write(self, data: bytes) -> None:
        """Send all of `data`."""
        await self._socket.send_all(data)

    async def close(self) -> None:
        """Close the socket."""
        await self._socket.aclose()


@asynccontextmanager
async def foreign_connection(socket: trio.SocketStream) -> AsyncIterator[YamuxConnection]:
    """Secure `socket`, on which /noise was agreed, with a secp256k1 key, and multiplex it. Owns `socket`.

    Raises `HandshakeFailed`. Who answers is not looked at.
    """
    raw: Any = RawConnection(socket)
    key: Any = Secp256k1Key()
    anybody: Any = None
    try:
        session: Any = await Noise(key).secure_outbound(raw, anybody)
    except Exception as exc:  # py-libp2p's own errors, which only libmesh.net may name
        raise HandshakeFailed(str(exc)) from exc
    connection = YamuxConnection(session, session.get_remote_peer())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        try:
            yield connection
        finally:
            with trio.CancelScope(shield=True):
                await connection.close()

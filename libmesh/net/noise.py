"""The Noise XX handshake of libp2p as a py-libp2p security transport, on `cryptography` alone.

Sources: the Noise Protocol Framework, revision 34 (XX in 7.5, the symmetric state in 5.2); libp2p/specs `noise`
(payload, signed static key, extensions) and `connections/inlined-muxer-negotiation`.

    initiator                                   responder
    -> e                                        an empty payload, in clear
    <- e, ee, s, es, payload                    the payload: identity key, signature over the static key,
    -> s, se, payload                           and the muxers that this side offers

When both sides offer muxers, the first of the initiator's that the responder has too is used, and the negotiation of
the muxer, a round trip, does not take place. In the same way two of ours agree on a faster cipher (`ciphers.py`).

py-libp2p's own transport encrypts with a pure Python Noise object and copies each record four times: 151 MiB/s for one
stream where this one and our muxer carry five times as much.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from struct import Struct
from typing import Any

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from google.protobuf.message import DecodeError
from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.crypto.keys import KeyPair, PublicKey
from libp2p.crypto.serialization import deserialize_public_key
from libp2p.io.exceptions import IOException
from libp2p.io.utils import read_exactly
from libp2p.peer.id import ID
from libp2p.security.noise.exceptions import NoiseFailure, PeerIDMismatchesPubkey

from libmesh._pb.noise_pb2 import NoiseExtensions, NoisePayload
from libmesh.net.ciphers import CHACHA, fast_ciphers
from libmesh.net.eager import Proposed
from libmesh.net.pipes import BufferPool, pipe_of
from libmesh.net.records import BUFFER_BYTES, RecordChannel
from libmesh.net.session import Session, not_the_peer

PROTOCOL_ID = "/noise"
YAMUX_ID = "/yamux/1.0.0"

_NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"  # exactly 32 bytes, so it is the first hash as it stands
_SIGNED_PREFIX = b"noise-libp2p-static-key:"
_KEY_BYTES = 32
_TAG_BYTES = 16
_LENGTH = Struct("!H")
_NONCE = Struct("<IQ")


class _Symmetric:
    """The Noise symmetric state: one hash over everything said, one chaining key, one cipher."""

    def __init__(self) -> None:
        self._hash = _NAME
        self._chain = _NAME
        self._cipher: ChaCha20Poly1305 | None = None
        self._count = 0
        self.mix_hash(b"")  # the prologue is empty

    def mix_hash(self, data: bytes) -> None:
        """Noise specification, 5.2: MixHash."""
        self._hash = hashlib.sha256(self._hash + data).digest()

    def mix_key(self, shared: bytes) -> None:
        """Noise specification, 5.2: MixKey."""
        self._chain, key = _hkdf(self._chain, shared)
        self._cipher, self._count = ChaCha20Poly1305(key), 0

    def encrypt(self, plain: bytes) -> bytes:
        """Noise specification, 5.2: EncryptAndHash. In clear before the first key."""
        data = plain
        if self._cipher is not None:
            data = self._cipher.encrypt(_NONCE.pack(0, self._count), plain, self._hash)
            self._count += 1
        self.mix_hash(data)
        return data

    def decrypt(self, data: bytes) -> bytes:
        """Noise specification, 5.2: DecryptAndHash. Raises `InvalidTag`."""
        plain = data
        if self._cipher is not None:
            plain = self._cipher.decrypt(_NONCE.pack(0, self._count), data, self._hash)
            self._count += 1
        self.mix_hash(data)
        return plain

    def split(self) -> tuple[bytes, bytes]:
        """The keys for the initiator's and for the responder's messages."""
        return _hkdf(self._chain, b"")


def _hkdf(key: bytes, material: bytes) -> tuple[bytes, bytes]:
    secret = hmac.digest(key, material, "sha256")
    first = hmac.digest(secret, b"\x01", "sha256")
    return first, hmac.digest(secret, first + b"\x02", "sha256")


class NoiseSession(Session):
    """A connection secured by Noise, to an authenticated peer."""


class Noise(ISecureTransport):
    """Noise for `sec_opt["/noise"]`. One for each host; it holds the host's static key and buffers.

    Args:
        key_pair: the host's identity.
        muxers: the muxers to offer in the handshake, best first; empty to always negotiate afterwards.
        ciphers: the ciphers to offer besides ChaCha20-Poly1305, best first; `None` for those that this machine is fast with.
        handshake_timeout: seconds within which a handshake must be done. A silent peer holds a socket no longer.
    """

    def __init__(
        self,
        key_pair: KeyPair,
        *,
        muxers: Sequence[str] = (YAMUX_ID,),
        ciphers: Sequence[str] | None = None,
        handshake_timeout: float = 10.0,
    ) -> None:
        self._identity = key_pair
        self._peer = ID.from_pubkey(key_pair.public_key)
        self._muxers = tuple(muxers)
        self._ciphers = fast_ciphers() if ciphers is None else tuple(ciphers)
        self._timeout = handshake_timeout
        self._pool = BufferPool(BUFFER_BYTES)
        self._static = X25519PrivateKey.generate()
        self._static_public = self._static.public_key().public_bytes_raw()
        payload = NoisePayload(
            identity_key=key_pair.public_key.serialize(),
            identity_sig=key_pair.private_key.sign(_SIGNED_PREFIX + self._static_public),
        )
        payload.extensions.stream_muxers.extend(self._muxers)
        payload.extensions.ciphers.extend(self._ciphers)
        self._payload = payload.SerializeToString()

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """Answer a handshake. Raises `NoiseFailure`, whatever the other side sends or does not send."""
        return await self._secure(conn, None, initiator=False)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """Start a handshake with `peer_id`. Raises `NoiseFailure`, also when somebody else answers."""
        return await self._secure(conn, peer_id, initiator=True)

    async def secure_eagerly(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """As `secure_outbound`, on a connection on which nothing has been agreed yet: proposes Noise and speaks it at once.

        Raises `ProposalRefused`, too.
        """
        return await self._secure(conn, peer_id, initiator=True, speak_on=Proposed(conn, PROTOCOL_ID))

    async def _secure(
        self, conn: IRawConnection, expected: ID | None, *, initiator: bool, speak_on: Any = None
    ) -> ISecureConn:
        handshake = _Handshake(speak_on or conn, self._static, self._static_public, self._payload)
        try:
            with trio.fail_after(self._timeout):
                received = await (handshake.initiate() if initiator else handshake.respond())
        except trio.TooSlowError:
            raise NoiseFailure(f"no Noise handshake within {self._timeout} s") from None
        except (InvalidTag, ValueError, DecodeError, IOException, OSError, trio.BrokenResourceError) as exc:
            raise NoiseFailure(f"Noise handshake failed: {exc!r}") from exc
        identity, offered = _verified(received, handshake.remote_static)
        peer = ID.from_pubkey(identity)
        if expected is not None and peer != expected:
            raise PeerIDMismatchesPubkey(not_the_peer(peer, self._peer))

        def agreed(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
            first, second = (ours, theirs) if initiator else (theirs, ours)
            return next((offer for offer in first if offer in second), None)

        cipher = agreed(self._ciphers, offered.ciphers) or CHACHA
        first, second = handshake.symmetric.split()
        send_key, receive_key = (first, second) if initiator else (second, first)
        return NoiseSession(
            conn,
            RecordChannel(pipe_of(conn), send_key, receive_key, self._pool, cipher),
            agreed(self._muxers, offered.stream_muxers),
            local_peer=self._peer,
            local_private_key=self._identity.private_key,
            remote_peer=peer,
            remote_permanent_pubkey=identity,
            is_initiator=initiator,
        )


class _Handshake:
    """The three messages of XX over a raw connection."""

    def __init__(
        self, conn: IRawConnection, static: X25519PrivateKey, static_public: bytes, payload: bytes
    ) -> None:
        self._conn = conn
        self._static = static
        self._static_public = static_public
        self._payload = payload
        self._ephemeral = X25519PrivateKey.generate()
        self._remote_ephemeral: X25519PublicKey | None = None
        self.symmetric = _Symmetric()
        self.remote_static = b""

    async def initiate(self) -> bytes:
        """Run as the initiator; return the responder's payload."""
        state = self.symmetric
        await self._send(self._own_ephemeral() + state.encrypt(b""))
        message = await self._receive()
        rest = self._take_ephemeral(message)
        state.mix_key(self._ephemeral.exchange(self._their_ephemeral()))  # ee
        rest = self._take_static(rest)
        state.mix_key(self._ephemeral.exchange(X25519PublicKey.from_public_bytes(self.remote_static)))  # es
        payload = state.decrypt(rest)
        sealed_static = state.encrypt(self._static_public)
        state.mix_key(self._static.exchange(self._their_ephemeral()))  # se
        await self._send(sealed_static + state.encrypt(self._payload))
        return payload

    async def respond(self) -> bytes:
        """Run as the responder; return the initiator's payload."""
        state = self.symmetric
        state.decrypt(self._take_ephemeral(await self._receive()))
        message = self._own_ephemeral()
        state.mix_key(self._ephemeral.exchange(self._their_ephemeral()))  # ee
        message += state.encrypt(self._static_public)
        state.mix_key(self._static.exchange(self._their_ephemeral()))  # es
        await self._send(message + state.encrypt(self._payload))
        rest = self._take_static(await self._receive())
        state.mix_key(self._ephemeral.exchange(X25519PublicKey.from_public_bytes(self.remote_static)))  # se
        return state.decrypt(rest)

    def _own_ephemeral(self) -> bytes:
        public = self._ephemeral.public_key().public_bytes_raw()
        self.symmetric.mix_hash(public)
        return public

    def _their_ephemeral(self) -> X25519PublicKey:
        if self._remote_ephemeral is None:
            raise ValueError("no ephemeral key yet")
        return self._remote_ephemeral

    def _take_ephemeral(self, message: bytes) -> bytes:
        public = message[:_KEY_BYTES]
        self._remote_ephemeral = X25519PublicKey.from_public_bytes(public)
        self.symmetric.mix_hash(public)
        return message[_KEY_BYTES:]

    def _take_static(self, message: bytes) -> bytes:
        self.remote_static = self.symmetric.decrypt(message[: _KEY_BYTES + _TAG_BYTES])
        return message[_KEY_BYTES + _TAG_BYTES :]

    async def _send(self, message: bytes) -> None:
        await self._conn.write(_LENGTH.pack(len(message)) + message)

    async def _receive(self) -> bytes:
        (length,) = _LENGTH.unpack(await read_exactly(self._conn, _LENGTH.size))
        return await read_exactly(self._conn, length)


def _verified(payload: bytes, static: bytes) -> tuple[PublicKey, NoiseExtensions]:
    """The identity key that signed `static`, and what is offered. Raises `NoiseFailure`."""
    try:
        message = NoisePayload.FromString(payload)
        identity = deserialize_public_key(message.identity_key)
        if not identity.verify(_SIGNED_PREFIX + static, message.identity_sig):
            raise NoiseFailure("the static key is not signed by the identity it claims")
    except NoiseFailure:
        raise
    except (
        Exception
    ) as exc:  # four key types, three libraries, hostile bytes: no list of errors would be complete
        raise NoiseFailure(f"bad handshake payload: {exc!r}") from exc
    return identity, message.extensions

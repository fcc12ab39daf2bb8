"""Signed envelopes: a payload, what it is, and the key that signed both (libp2p's RFC 0002)."""

from __future__ import annotations

from dataclasses import dataclass

from libmesh import keys
from libmesh._pb import circuit_pb2 as pb
from libmesh.framing import frame
from libmesh.wire_pieces import WireError, parse

_ED25519 = bytes.fromhex("08011220")  # protobuf PublicKey{Type = Ed25519 (1), Data = 32 bytes that follow}


@dataclass(frozen=True, slots=True)
class EnvelopeKind:
    """What is signed: the specification's `domain`, a part of every signature, and the payload's `type`, a multicodec."""

    domain: bytes
    type: bytes

    def seal(self, seed: bytes, payload: bytes) -> bytes:
        """The envelope of `payload`, signed with the Ed25519 `seed` (32 bytes)."""
        return pb.Envelope(
            public_key=_ED25519 + keys.public_key(seed),
            payload_type=self.type,
            payload=payload,
            signature=keys.sign(seed, self.signed_bytes(payload)),
        ).SerializeToString(deterministic=True)

    def open(self, data: bytes, limit: int) -> tuple[bytes, bytes]:
        """The Ed25519 public key that signed, and the payload. Raises `WireError`, also beyond `limit` bytes."""
        envelope = parse(pb.Envelope(), data, limit)
        public = envelope.public_key.removeprefix(_ED25519)
        if len(public) != keys.KEY_LENGTH or envelope.payload_type != self.type:
            raise WireError("not what it should be, signed with an Ed25519 key")
        if not keys.verify(public, self.signed_bytes(envelope.payload), envelope.signature):
            raise WireError("an envelope with a wrong signature")
        return public, envelope.payload

    def signed_bytes(self, payload: bytes) -> bytes:
        """What the signature is of."""
        return frame(self.domain) + frame(self.type) + frame(payload)

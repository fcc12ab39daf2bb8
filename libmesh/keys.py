"""Ed25519 keys: an identity's seed, its public key, and the libp2p peer id made of it.

Pure functions over bytes. A seed is 32 secret bytes, a public key 32 bytes, a signature 64 bytes (RFC 8032).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from libmesh.peers import MeshId, PeerId

KEY_LENGTH = 32
SIGNATURE_LENGTH = 64

# libp2p specs, "peer-ids": keys of up to 42 bytes are inlined with the identity multihash (0x00, length 0x24);
# what is inlined is the protobuf PublicKey{Type = Ed25519 (1), Data = 32 bytes}.
_PEER_ID_PREFIX = bytes.fromhex("002408011220")


def public_key(seed: bytes) -> bytes:
    """The public key that belongs to `seed`. Raises `ValueError` unless `seed` is 32 bytes."""
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def sign(seed: bytes, data: bytes) -> bytes:
    """Sign `data`; 64 bytes, the same for the same input."""
    return Ed25519PrivateKey.from_private_bytes(seed).sign(data)


REMEMBERED_DATA = 1024
"""Signatures over up to so many bytes are checked once and remembered, the last 4096 of them (some 5 MiB): the links
near a mesh's key recur in every credential, and one announcement comes on several ways. A check takes 0.1 ms."""


def verify(public: bytes, data: bytes, signature: bytes) -> bool:
    """Whether `signature` over `data` was made by the holder of `public`. Malformed input is just `False`."""
    if len(data) <= REMEMBERED_DATA and len(signature) == SIGNATURE_LENGTH:
        return _verify_remembered(public, data, signature)
    return _verify(public, data, signature)


@lru_cache(maxsize=4096)
def _verify_remembered(public: bytes, data: bytes, signature: bytes) -> bool:
    return _verify(public, data, signature)


def _verify(public: bytes, data: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


@lru_cache(maxsize=4096)
def peer_id_of(public: bytes) -> PeerId:
    """The libp2p peer id of an Ed25519 public key, in base58 (`12D3KooW…`)."""
    if len(public) != KEY_LENGTH:
        raise ValueError(f"an Ed25519 public key has {KEY_LENGTH} bytes, not {len(public)}")
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public).decode("ascii"))


@lru_cache(maxsize=4096)
def public_key_of(peer: PeerId) -> bytes:
    """The public key inside a peer id. Raises `ValueError` if `peer` is not an Ed25519 peer id."""
    try:
        raw = base58.b58decode(peer)
    except ValueError as exc:
        raise ValueError(f"{peer!r} is not a peer id: {exc}") from exc
    if len(raw) != len(_PEER_ID_PREFIX) + KEY_LENGTH or not raw.startswith(_PEER_ID_PREFIX):
        raise ValueError(f"{peer!r} is not an Ed25519 peer id")
    return raw[len(_PEER_ID_PREFIX) :]


def mesh_id_of(mesh_key: bytes) -> MeshId:
    """The id of the mesh whose public key is `mesh_key`: the first 16 bytes of its SHA-256, in hex."""
    return MeshId(hashlib.sha256(mesh_key).digest()[:16].hex())

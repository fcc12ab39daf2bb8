"""Ed25519 keys and the ids made of them, against published vectors."""

from __future__ import annotations

import pytest

from libmesh import keys
from libmesh.peers import PeerId
from tests.members import peer

# RFC 8032, section 7.1, TEST 2.
RFC_SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
RFC_PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
RFC_SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)

PEER_OF_RFC_KEY = "12D3KooWDwTirQce1RRKnasT5fPVFgzXCy6SiRgSwrwPGLC7zE91"


def test_signatures_are_those_of_rfc_8032() -> None:
    assert keys.public_key(RFC_SEED) == RFC_PUBLIC
    assert keys.sign(RFC_SEED, b"\x72") == RFC_SIGNATURE
    assert keys.verify(RFC_PUBLIC, b"\x72", RFC_SIGNATURE)


@pytest.mark.parametrize(
    ("public", "data", "signature"),
    [
        (RFC_PUBLIC, b"\x73", RFC_SIGNATURE),
        (RFC_PUBLIC, b"\x72", RFC_SIGNATURE[:-1]),
        (RFC_PUBLIC, b"\x72", b""),
        (RFC_PUBLIC[:-1], b"\x72", RFC_SIGNATURE),
        (b"", b"\x72", RFC_SIGNATURE),
        (b"\xff" * 32, b"\x72", RFC_SIGNATURE),
    ],
)
def test_a_bad_signature_or_key_is_just_false(public: bytes, data: bytes, signature: bytes) -> None:
    assert not keys.verify(public, data, signature)


def test_a_signature_has_one_form_only() -> None:
    order = 2**252 + 27742317777372353535851937790883648493
    other = int.from_bytes(RFC_SIGNATURE[32:], "little") + order
    assert not keys.verify(RFC_PUBLIC, b"\x72", RFC_SIGNATURE[:32] + other.to_bytes(32, "little"))


def test_a_peer_id_is_the_base58_of_the_inlined_key() -> None:
    # libp2p specs, "peer-ids", Ed25519 test vector's layout; compared with py-libp2p's own in tests/net.
    assert keys.peer_id_of(RFC_PUBLIC) == PEER_OF_RFC_KEY
    assert keys.public_key_of(PeerId(PEER_OF_RFC_KEY)) == RFC_PUBLIC


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "0OIl",
        "12D3KooW",
        str(peer(1))[:-1],
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # a hash of an RSA key
        "é",
    ],
)
def test_other_texts_are_no_peer_ids(text: str) -> None:
    with pytest.raises(ValueError, match="peer id"):
        keys.public_key_of(PeerId(text))


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_key_has_32_bytes(length: int) -> None:
    with pytest.raises(ValueError, match="32"):
        keys.peer_id_of(bytes(length))
    with pytest.raises(ValueError, match="32"):
        keys.public_key(bytes(length))


def test_a_mesh_id_is_the_start_of_the_keys_hash() -> None:
    assert keys.mesh_id_of(bytes(32)) == "66687aadf862bd776c8fc18b8e9f8e20"

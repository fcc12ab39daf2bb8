"""The certificates of libp2p's TLS: the specification's own, ours, and every kind of bad one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from libp2p.crypto.secp256k1 import create_new_key_pair as create_secp256k1
from libp2p.peer.id import ID

from libmesh.net.certificate import EXTENSION, MAX_CERTIFICATE, TlsFailure, identity_of, make_certificate
from tests.net.pairs import KEYS, peer_of

VECTORS = json.loads((Path(__file__).parent / "tls_certificates.json").read_text())
NOW = datetime(2026, 1, 1, tzinfo=UTC)


NO_ECDSA = pytest.mark.xfail(strict=True, reason="py-libp2p 0.8.1 has no ECDSA identities, for Noise neither")


@pytest.mark.parametrize(
    "vector",
    [
        pytest.param(vector, id=vector["name"], marks=NO_ECDSA if vector["name"] == "ecdsa" else ())
        for vector in VECTORS["valid"]
    ],
)
def test_the_specifications_certificates_prove_their_peers(vector: dict[str, str]) -> None:
    assert str(ID.from_pubkey(identity_of(bytes.fromhex(vector["hex"]), now=NOW))) == vector["peer"]


@pytest.mark.parametrize("vector", VECTORS["invalid"], ids=lambda vector: vector["name"])
def test_the_specifications_bad_certificates_prove_nothing(vector: dict[str, str]) -> None:
    with pytest.raises(TlsFailure):
        identity_of(bytes.fromhex(vector["hex"]), now=NOW)


@pytest.mark.parametrize("keys", [KEYS[0], create_secp256k1()], ids=["ed25519", "secp256k1"])
def test_our_own_prove_us(keys: Any) -> None:
    made = make_certificate(keys)
    assert ID.from_pubkey(identity_of(made.certificate.public_bytes(Encoding.DER))) == peer_of(keys)


# ---- bad ones ---------------------------------------------------------------------------------------------------

NAME = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "libp2p.io")])
KEY = ec.generate_private_key(ec.SECP256R1())


def octets(value: bytes) -> bytes:
    return b"\x04" + (bytes([len(value)]) if len(value) < 128 else bytes([0x81, len(value)])) + value


def signed_key(signature: bytes | None = None, identity: bytes | None = None) -> bytes:
    public = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    signature = (
        KEYS[0].private_key.sign(b"libp2p-tls-handshake:" + public) if signature is None else signature
    )
    inner = octets(KEYS[0].public_key.serialize() if identity is None else identity) + octets(signature)
    return b"\x30" + (bytes([len(inner)]) if len(inner) < 128 else bytes([0x81, len(inner)])) + inner


def certificate(
    extension: bytes | None = None,
    *,
    starts: datetime = NOW - timedelta(days=1),
    ends: datetime = NOW + timedelta(days=1),
    issuer_key: Any = KEY,
    issuer: x509.Name = NAME,
    digest: Any = hashes.SHA256(),  # noqa: B008 - a constant
    more: tuple[x509.UnrecognizedExtension, bool] | None = None,
    without: bool = False,
) -> bytes:
    builder = x509.CertificateBuilder().subject_name(NAME).issuer_name(issuer).public_key(KEY.public_key())
    builder = builder.serial_number(7).not_valid_before(starts).not_valid_after(ends)
    if not without:
        value = signed_key() if extension is None else extension
        builder = builder.add_extension(x509.UnrecognizedExtension(EXTENSION, value), critical=False)
    if more is not None:
        builder = builder.add_extension(more[0], critical=more[1])
    return builder.sign(issuer_key, digest).public_bytes(Encoding.DER)


UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4.5"), b"?")


def test_one_made_by_hand_is_good() -> None:
    assert identity_of(certificate(), now=NOW) == KEYS[0].public_key
    assert identity_of(certificate(more=(UNKNOWN, False)), now=NOW) == KEYS[0].public_key


BAD: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "no certificate": lambda: b"\x30\x03\x02\x01\x01",
    "cut off": lambda: certificate()[:-5],
    "too large": lambda: certificate() + bytes(MAX_CERTIFICATE),
    "without the extension": lambda: certificate(without=True),
    "expired": lambda: certificate(ends=NOW - timedelta(hours=1)),
    "not yet valid": lambda: certificate(starts=NOW + timedelta(hours=1)),
    "signed by another key": lambda: certificate(issuer_key=ec.generate_private_key(ec.SECP256R1())),
    "signed by a key of another kind": lambda: certificate(
        issuer_key=ed25519.Ed25519PrivateKey.generate(), digest=None
    ),
    "issued by another name": lambda: certificate(issuer=x509.Name([])),
    "an unknown critical extension": lambda: certificate(more=(UNKNOWN, True)),
    "signed with SHA-224": lambda: certificate(digest=hashes.SHA224()),
    "a signature of nothing": lambda: certificate(signed_key(signature=bytes(64))),
    "an empty signature": lambda: certificate(signed_key(signature=b"")),
    "another's identity": lambda: certificate(signed_key(identity=KEYS[1].public_key.serialize())),
    "no identity": lambda: certificate(signed_key(identity=b"")),
    "an identity that is no key": lambda: certificate(signed_key(identity=b"\x08\x01\x12\x04abcd")),
    "an identity of an unknown kind": lambda: certificate(
        signed_key(identity=b"\x08\x63\x12\x20" + bytes(32))
    ),
    "an extension that is no SEQUENCE": lambda: certificate(b"\x04" + signed_key()[1:]),
    "an extension that is empty": lambda: certificate(b""),
    "an extension of one byte": lambda: certificate(b"\x30"),
    "an extension that is cut off": lambda: certificate(signed_key()[:-1]),
    "something behind the extension": lambda: certificate(signed_key() + b"\0"),
    "a length of four gigabytes": lambda: certificate(b"\x30\x84\xff\xff\xff\xff"),
    "a length of 127 bytes": lambda: certificate(b"\x30\xff" + bytes(3)),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_certificate_is_refused_in_words(kind: str) -> None:
    with pytest.raises(TlsFailure, match="certificate"):
        identity_of(BAD[kind](), now=NOW)


@pytest.mark.parametrize("seed", range(60))
def test_a_changed_certificate_proves_nobody_else(seed: int) -> None:
    lots = random.Random(seed)
    changed = bytearray(certificate())
    for _ in range(lots.randrange(1, 4)):
        changed[lots.randrange(len(changed))] ^= 1 << lots.randrange(8)
    try:
        identity = identity_of(bytes(changed), now=NOW)
    except TlsFailure:
        return
    assert identity == KEYS[0].public_key

"""The certificate of libp2p's TLS: self-signed, with the identity key and its signature in an extension.

Source: libp2p/specs `tls/tls.md`, "Peer Authentication". The certificate's own key lives as long as the host and says
nothing; the extension `1.3.6.1.4.1.53594.1.1` holds `SignedKey { publicKey OCTET STRING, signature OCTET STRING }`,
where the identity signed `libp2p-tls-handshake:` and the certificate's public key.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtensionOID
from libp2p.crypto.keys import KeyPair, PublicKey
from libp2p.crypto.serialization import deserialize_public_key
from libp2p.security.exceptions import HandshakeFailure

EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")

MAX_CERTIFICATE = 16 * 1024
"""Bytes; one with an RSA identity of 8192 bits takes 4 KiB."""

_SIGNED_PREFIX = b"libp2p-tls-handshake:"
_UNDERSTOOD = {EXTENSION, ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE,
               ExtensionOID.EXTENDED_KEY_USAGE, ExtensionOID.SUBJECT_ALTERNATIVE_NAME}  # fmt: skip
_SHORTEST_HASH = 32  # bytes
_OCTETS, _SEQUENCE = 0x04, 0x30


class TlsFailure(HandshakeFailure):
    """A TLS handshake did not lead to an authenticated peer; the text says why."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate and the key that it is for."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def make_certificate(identity: KeyPair, *, now: datetime | None = None) -> Certificate:
    """A certificate for `identity`, with a fresh P-256 key, which every implementation can verify.

    Valid from a day ago, for clocks that differ, and for a hundred years: nobody relies on its end (go-libp2p has the
    same). `now` is the present unless given.
    """
    now = now or datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    signature = identity.private_key.sign(_SIGNED_PREFIX + _encoded(key.public_key()))
    signed = _tlv(_OCTETS, identity.public_key.serialize()) + _tlv(_OCTETS, signature)
    name = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "libp2p.io")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=36500))
        .add_extension(x509.UnrecognizedExtension(EXTENSION, _tlv(_SEQUENCE, signed)), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Certificate(key, certificate)


def identity_of(certificate: bytes, *, now: datetime | None = None) -> PublicKey:
    """The identity key that a certificate (DER) proves. Raises `TlsFailure` for whatever else it is."""
    if len(certificate) > MAX_CERTIFICATE:
        raise TlsFailure(f"a certificate of {len(certificate)} bytes; at most {MAX_CERTIFICATE} are read")
    try:
        return _identity_of(x509.load_der_x509_certificate(certificate), now or datetime.now(UTC))
    except TlsFailure:
        raise
    # X.509, ASN.1, four key types, three libraries, hostile bytes: no list of errors would be complete.
    except Exception as exc:
        raise TlsFailure(f"bad certificate: {exc!r}") from exc


def _identity_of(certificate: x509.Certificate, now: datetime) -> PublicKey:
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise TlsFailure(
            f"the certificate holds from {certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}; "
            f"here it is {now:%F %T}"
        )
    digest = certificate.signature_hash_algorithm
    if digest is not None and digest.digest_size < _SHORTEST_HASH:
        raise TlsFailure(f"the certificate is signed with {digest.name}")
    certificate.verify_directly_issued_by(certificate)  # raises unless it is signed by its own key
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD:
            raise TlsFailure(f"the certificate has the critical extension {extension.oid.dotted_string}")
    found = certificate.extensions.get_extension_for_oid(EXTENSION).value
    assert isinstance(found, x509.UnrecognizedExtension)
    (signed,) = _parts(found.value, _SEQUENCE, 1)
    encoded_identity, signature = _parts(signed, _OCTETS, 2)
    identity = deserialize_public_key(encoded_identity)
    if not identity.verify(_SIGNED_PREFIX + _encoded(certificate.public_key()), signature):
        raise TlsFailure("the certificate's key is not signed by the identity that it claims")
    return identity


def _encoded(key: object) -> bytes:
    encode = getattr(key, "public_bytes", None)
    if encode is None:
        raise TlsFailure("a key of an unknown kind")
    data: bytes = encode(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return data


# ---- as much of DER (X.690) as this takes -----------------------------------------------------------------------


def _tlv(tag: int, value: bytes) -> bytes:
    """A value with its tag and length."""
    size = len(value)
    if size < 0x80:
        return bytes([tag, size]) + value
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + value


def _parts(data: bytes, tag: int, count: int) -> list[bytes]:
    """Exactly `count` values with this tag, and nothing behind them."""
    parts: list[bytes] = []
    while len(parts) < count:
        if len(data) < 2 or data[0] != tag:
            raise TlsFailure("the certificate's extension is not a SignedKey")
        start, size = 2, data[1]
        if size >= 0x80:
            start = 2 + (size & 0x7F)
            size = int.from_bytes(data[2:start], "big")
        value, data = data[start : start + size], data[start + size :]
        if len(value) != size:
            raise TlsFailure("the certificate's extension is cut off")
        parts.append(value)
    if data:
        raise TlsFailure("the certificate's extension has something behind the SignedKey")
    return parts

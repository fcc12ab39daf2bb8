"""Targets for TLS: certificates, and any bytes in place of a handshake."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from libp2p.peer.id import ID

from libmesh.net.certificate import EXTENSION, TlsFailure, identity_of, make_certificate
from libmesh.net.tls import Tls
from tests.fuzz.channels import Wire, in_virtual_time
from tests.fuzz.target import Target
from tests.net.pairs import KEYS, peer_of
from tests.vector_form import FOLDER

NOW = datetime(2026, 1, 1, tzinfo=UTC)
VECTORS = json.loads((FOLDER.parent / "net" / "tls_certificates.json").read_text())


@lru_cache(maxsize=1)
def _own() -> Any:
    return make_certificate(KEYS[0], now=NOW)


@lru_cache(maxsize=1)
def _believable() -> set[str]:
    return {str(peer_of(KEYS[0])), *(vector["peer"] for vector in VECTORS["valid"])}


def _signed_key() -> bytes:
    value = _own().certificate.extensions.get_extension_for_oid(EXTENSION).value.value
    assert isinstance(value, bytes)
    return value


def _with_extension(value: bytes) -> bytes:
    own = _own()
    name = own.certificate.subject
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(own.key.public_key())
    builder = builder.serial_number(7).not_valid_before(own.certificate.not_valid_before_utc)
    builder = builder.not_valid_after(own.certificate.not_valid_after_utc)
    builder = builder.add_extension(x509.UnrecognizedExtension(EXTENSION, value), critical=False)
    return builder.sign(own.key, hashes.SHA256()).public_bytes(Encoding.DER)


def _certificate(data: bytes) -> None:
    certificate = _with_extension(data[1:]) if data[:1] == b"e" else data[1:]
    try:
        identity = identity_of(certificate, now=NOW)
    except TlsFailure as exc:
        assert str(exc)  # noqa: PT017 - refused in words, or true
    else:
        assert str(ID.from_pubkey(identity)) in _believable()


def _certificate_seeds() -> Iterator[bytes]:
    assert _own().key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    yield b"e" + _signed_key()
    yield b"c" + _own().certificate.public_bytes(Encoding.DER)
    for vector in (*VECTORS["valid"], *VECTORS["invalid"]):
        yield b"c" + bytes.fromhex(vector["hex"])


async def _handshake_with(data: bytes, initiator: bool) -> None:
    near, far = trio.testing.memory_stream_pair()
    await far.send_all(data)
    await far.send_eof()
    conn: Any = Wire(near, initiator)
    tls = _tls()
    try:
        await (tls.secure_outbound(conn, peer_of(KEYS[1])) if initiator else tls.secure_inbound(conn))
    except TlsFailure:
        return
    raise AssertionError("a handshake with nobody succeeded")


@lru_cache(maxsize=1)
def _tls() -> Tls:
    return Tls(KEYS[0])


def _tls_bytes(data: bytes) -> None:
    in_virtual_time(_handshake_with, data[1:], bool(data[:1] and data[0] & 1))


def _hello_seeds() -> Iterator[bytes]:
    hello = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + b"\0\7\0\x2b\0\3\2\3\4"
    message = b"\1" + len(hello).to_bytes(3, "big") + hello
    yield b"\0\x16\3\1" + len(message).to_bytes(2, "big") + message
    yield b"\1\x15\3\3\0\2\2\x28"


TLS = (
    Target(
        "certificate",
        "no certificate proves an identity that did not sign it",
        _certificate,
        _certificate_seeds,
        1024,
    ),
    Target("tls", "any bytes for a TLS handshake are a TlsFailure", _tls_bytes, _hello_seeds, 1024),
)

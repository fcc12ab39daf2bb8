"""The ciphers that transport messages can be sealed with, and which of them this machine is fast with.

libp2p's Noise has ChaCha20-Poly1305 only, because it is fast everywhere. Where the processor has instructions for AES, as nearly all
have, AES-GCM is three times as fast again (measured, 64 KiB: 5.2 GB/s against 1.6), and sealing and opening are most of what
a tunnel costs. So two of ours agree on it within the handshake (`noise.proto`); nobody else notices.
"""

from __future__ import annotations

import hmac
import time
from functools import lru_cache
from struct import Struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

CHACHA = "chacha20-poly1305"
AES = "aes-256-gcm"

REKEY_EVERY = 2**20
"""Messages under one key of AES-GCM: 64 GiB at most. TLS 1.3 stops at 2^24.5 records of 16 KiB, 360 GiB (RFC 8446, 5.5)."""

_LAST = 2**64 - 1
_SAMPLE_BYTES = 16 * 1024
_SAMPLES = 5


class Cipher:
    """One direction of a connection: what to call, and with which nonce. Whoever uses it counts.

    Attributes:
        encrypt_into: seals; see `cryptography`.
        decrypt: opens; raises `InvalidTag`.
        decrypt_into: the same into a buffer that the plaintext fills.
        pack_nonce: makes a nonce of 0 and a message's number.
        rekey_every: the number of messages after which `renew` takes this one's place; 0 for never.
    """

    __slots__ = ("_cipher", "decrypt", "decrypt_into", "encrypt_into", "pack_nonce", "rekey_every")

    def __init__(self, name: str, key: bytes) -> None:
        """`key` is the direction's from Noise's Split, 32 bytes. Raises `ValueError` for a name that is none."""
        if name == CHACHA:
            self._use(ChaCha20Poly1305(key), "<IQ", 0)
        elif name == AES:
            self._use(AESGCM(hmac.digest(key, b"libmesh " + name.encode(), "sha256")), ">IQ", REKEY_EVERY)
        else:
            raise ValueError(f"cipher {name!r}: {CHACHA} or {AES}")

    def _use(self, cipher: ChaCha20Poly1305 | AESGCM, nonce: str, rekey_every: int) -> None:
        self._cipher = cipher
        self.encrypt_into = cipher.encrypt_into
        self.decrypt, self.decrypt_into = cipher.decrypt, cipher.decrypt_into
        self.pack_nonce = Struct(nonce).pack
        self.rekey_every = rekey_every

    def renew(self) -> None:
        """Replace the key, as both sides do after each `rekey_every` messages. Noise specification, 4.2, REKEY."""
        key = self._cipher.encrypt(self.pack_nonce(0, _LAST), bytes(32), None)[:32]
        self._use(AESGCM(key), ">IQ", self.rekey_every)


@lru_cache(maxsize=1)
def fast_ciphers() -> tuple[str, ...]:
    """The ciphers to offer on this machine besides ChaCha20-Poly1305: those that are faster here. Takes a millisecond."""
    return (AES,) if _seconds(AES) < _seconds(CHACHA) else ()


def _seconds(name: str) -> float:
    """The best of a few: a machine that is busy only ever adds."""
    seal, plain, sealed = (
        Cipher(name, bytes(32)).encrypt_into,
        bytes(_SAMPLE_BYTES),
        bytearray(_SAMPLE_BYTES + 16),
    )
    best = float("inf")
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        seal(bytes(12), plain, None, sealed)
        best = min(best, time.perf_counter() - start)
    return best

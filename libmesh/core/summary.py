"""What two peers compare to find out what one of them missed: fingerprints of all, then of parts, then the rows themselves.

A digest of a thousand rows has 45 KB, and nearly always both sides know the same. So the rows are spread over `BUCKETS`
by a hash of the peer's key. A summary has one fingerprint of each bucket, and one of them all: those who agree exchange 16
bytes, and those who do not compare only the rows of the buckets that differ (a Merkle tree of two levels, as in Demers
et al., "Epidemic Algorithms for Replicated Database Maintenance", 1987, and Dynamo, section 4.7). One difference among a
thousand rows costs sixteen rows.

Fingerprints are cut SHA-256: whoever finds two tables with the same one gains that they are not compared, until the next
change. How they are made is part of the wire (`Summary` in mesh.proto).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from libmesh import keys
from libmesh.core.credentials import Revocation
from libmesh.peers import PeerId

BUCKETS = 64
CUT = 8
"""Bytes of the fingerprint of a bucket, and of the revocations."""

FINGERPRINT = 16
"""Bytes of the fingerprint of all."""

_NOTHING = bytes(CUT)


Row = tuple[PeerId, tuple[int, int], bool]
"""A peer, its age, and whether it is taken for dead."""


@lru_cache(maxsize=8192)
def bucket_of(peer: PeerId) -> int:
    """The bucket of a peer, below `BUCKETS`."""
    return hashlib.sha256(keys.public_key_of(peer)).digest()[0] % BUCKETS


@dataclass(frozen=True, slots=True)
class Part:
    """A part of what a peer knows: the rows of some buckets, and perhaps the revocations."""

    buckets: frozenset[int]
    revocations: bool


@dataclass(frozen=True, slots=True)
class Digest:
    """The age of each record that somebody holds, and whom they take for dead. `part`: of these rows only; `None`: all."""

    ages: Mapping[PeerId, tuple[int, int]]
    dead: frozenset[PeerId] = frozenset()
    part: Part | None = None

    def of(self, part: Part) -> Digest:
        """The part of it."""
        ages = {peer: age for peer, age in self.ages.items() if bucket_of(peer) in part.buckets}
        return Digest(ages, self.dead & ages.keys(), part)


@dataclass(frozen=True, slots=True)
class Summary:
    """The fingerprints of what a peer knows: of each bucket in turn, and of the revocations."""

    buckets: tuple[bytes, ...]
    revocations: bytes

    @property
    def fingerprint(self) -> bytes:
        """For all of it."""
        return hashlib.sha256(b"".join(self.buckets) + self.revocations).digest()[:FINGERPRINT]

    def difference(self, other: Summary) -> Part:
        """Where the two differ."""
        pairs = enumerate(zip(self.buckets, other.buckets, strict=True))
        differing = frozenset(number for number, (ours, theirs) in pairs if ours != theirs)
        return Part(differing, self.revocations != other.revocations)


def fingerprint_of_rows(rows: Iterable[Row]) -> bytes:
    """Of one bucket's rows, in any order."""
    packed = [keys.public_key_of(peer) + struct.pack(">QQB", *age, dead) for peer, age, dead in rows]
    return hashlib.sha256(b"".join(sorted(packed))).digest()[:CUT] if packed else _NOTHING


def fingerprint_of_revocations(revocations: Iterable[Revocation]) -> bytes:
    """Of all of them, in any order."""
    packed = sorted(revocation.link_id + revocation.signer_key for revocation in revocations)
    return hashlib.sha256(b"".join(packed)).digest()[:CUT] if packed else _NOTHING


class Prints:
    """The fingerprints of all buckets of a table that changes: only those of changed ones are made anew."""

    def __init__(self) -> None:
        self._members: dict[int, set[PeerId]] = {}
        self._stale: set[int] = set()
        self._prints = [_NOTHING] * BUCKETS

    def touch(self, peer: PeerId) -> None:
        """The row of `peer` came or changed."""
        bucket = bucket_of(peer)
        self._members.setdefault(bucket, set()).add(peer)
        self._stale.add(bucket)

    def remove(self, peer: PeerId) -> None:
        """There is no row of `peer` any more."""
        bucket = bucket_of(peer)
        self._members.get(bucket, set()).discard(peer)
        self._stale.add(bucket)

    def all(self, row_of: Callable[[PeerId], Row]) -> tuple[bytes, ...]:
        """Of each bucket in turn; `row_of` tells the present row of a peer that was touched and not removed."""
        for bucket in self._stale:
            self._prints[bucket] = fingerprint_of_rows(map(row_of, self._members.get(bucket, ())))
        self._stale.clear()
        return tuple(self._prints)

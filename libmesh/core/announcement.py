"""Announcements: what a peer says of itself, signed, and how one is told from a forgery or an older one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from libmesh import keys
from libmesh.core import credentials
from libmesh.core.credentials import Credential, Revoked
from libmesh.peers import MeshId, PeerId, Service

SIGNING_CONTEXT = b"libmesh announcement 1\0"
"""What an announcement's signature covers, before its body."""

_MAX_SAID = 56 * 1024  # leaves 4 KiB of an announcement's 60 for the credential, addresses and numbers
_SERVICE_BYTES = 8  # protobuf's own for each service


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What a peer says of itself; the fields are those of `Announcement` in mesh.proto."""

    peer: PeerId
    credential: Credential
    incarnation: int
    sequence: int
    leaving: bool = False
    services: tuple[Service, ...] = ()
    addresses: tuple[str, ...] = ()
    attributes: bytes = b""

    @property
    def age(self) -> tuple[int, int]:
        """Orders announcements of one peer; higher is newer."""
        return (self.incarnation, self.sequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An announcement with the bytes that were signed, to be passed on unchanged."""

    announcement: Announcement
    body: bytes
    signature: bytes


Seal = Callable[[Announcement], Record]
"""Encodes and signs an announcement of our own. Pure."""


def check_said(attributes: bytes, services: Iterable[str]) -> None:
    """Raise `ValueError` if an announcement has no room for these attributes and names of services."""
    size = len(attributes) + sum(len(name.encode()) + _SERVICE_BYTES for name in services)
    if size > _MAX_SAID:
        raise ValueError(
            f"attributes and services take {size} bytes together; at most {_MAX_SAID} are allowed"
        )


class Authentic(Protocol):
    """Checks a record: `authentic`, or one that remembers its verdicts."""

    def __call__(
        self, record: Record, *, mesh_id: MeshId, now_unix: float, revoked: Revoked | None = None
    ) -> bool:
        """As `authentic`."""
        ...


def authentic(record: Record, *, mesh_id: MeshId, now_unix: float, revoked: Revoked | None = None) -> bool:
    """Whether `record` was signed by the peer that it speaks for, and that peer is a member of the mesh now."""
    announcement = record.announcement
    try:
        peer_key = keys.public_key_of(announcement.peer)
    except ValueError:
        return False
    refusal = credentials.verify(
        announcement.credential, mesh_id=mesh_id, peer_key=peer_key, now_unix=now_unix, revoked=revoked
    )
    return refusal is None and keys.verify(peer_key, SIGNING_CONTEXT + record.body, record.signature)


def disproved(record: Record, *, mesh_id: MeshId) -> bool:
    """Whether nobody can ever have believed `record`, so that whoever tells it lies.

    One that was good once may be told in good faith after its end or its revocation: clocks disagree, and news travel.
    """
    return not authentic(record, mesh_id=mesh_id, now_unix=float("-inf"))

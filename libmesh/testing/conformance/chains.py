"""Chains, announcements and revocations as the specification describes them, good ones and any bad one that is wanted.

Written from `mesh.proto` alone and not from libmesh's own code for the same, so that a mistake there is not made here
again. This package works on generated protobuf classes for the same reason: `libmesh.wire` refuses to encode what a
broken peer might send.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from libmesh import keys
from libmesh._pb import mesh_pb2 as pb
from libmesh.peers import PeerId

NO_END = 2**64 - 1
LINK_CONTEXT = b"libmesh link 1\0"
REVOCATION_CONTEXT = b"libmesh revocation 1\0"
RECORD_CONTEXT = b"libmesh announcement 1\0"


@dataclass(frozen=True, slots=True)
class Identity:
    """A peer that the suite plays. `seed` is its secret Ed25519 seed."""

    seed: bytes

    @classmethod
    def fresh(cls) -> Identity:
        """One that nobody has met."""
        return cls(os.urandom(32))

    @property
    def key(self) -> bytes:
        """The public key, 32 bytes."""
        return keys.public_key(self.seed)

    @property
    def peer(self) -> PeerId:
        """The peer id."""
        return keys.peer_id_of(self.key)


def link_id(link: pb.Link) -> bytes:
    """The id by which a link is revoked."""
    return hashlib.sha256(link.signature).digest()[:16]


def signed_bytes(mesh_key: bytes, issuer: bytes, link: pb.Link) -> bytes:
    """What a link's signature is over."""
    end = link.not_after if link.HasField("not_after") else NO_END
    return LINK_CONTEXT + mesh_key + issuer + link.subject + struct.pack(">BBQ", link.kind, link.scope, end)


@dataclass(frozen=True, slots=True)
class Signer:
    """A key that stands in a mesh: the chain down to it, and its secret seed. Signs whatever it is asked to."""

    mesh_key: bytes
    links: tuple[pb.Link, ...]
    seed: bytes

    @classmethod
    def of_mesh(cls, seed: bytes) -> Signer:
        """The holder of the mesh key itself."""
        return cls(keys.public_key(seed), (), seed)

    @property
    def mesh_id(self) -> str:
        """The mesh's id."""
        return hashlib.sha256(self.mesh_key).digest()[:16].hex()

    @property
    def scope(self) -> int:
        """The widest scope that it may give."""
        return self.links[-1].scope if self.links else pb.SCOPE_INVITE

    @property
    def end(self) -> int | None:
        """The latest end that it may give; `None` for none."""
        return self.links[-1].not_after if self.links and self.links[-1].HasField("not_after") else None

    def sign(
        self,
        subject: bytes,
        *,
        kind: int = pb.LINK_KIND_PEER,
        scope: int | None = None,
        end: int | None = None,
    ) -> pb.Link:
        """A link below this key, allowed or not. Without a scope and an end it has this key's own."""
        link = pb.Link(
            subject=subject,
            kind=pb.LinkKind.ValueType(kind),
            scope=pb.Scope.ValueType(self.scope if scope is None else scope),
            not_after=self.end if end is None else end,
        )
        link.signature = keys.sign(self.seed, signed_bytes(self.mesh_key, keys.public_key(self.seed), link))
        return link

    def sign_endless(self, subject: bytes) -> pb.Link:
        """A peer link without an end, whatever this key's own end is."""
        endless = replace(self, links=()).sign(subject, scope=self.scope)
        return endless

    def admit(self, key: bytes, *, scope: int | None = None, end: int | None = None) -> pb.Credential:
        """A credential for the peer with this key."""
        return self.show(self.sign(key, scope=scope, end=end))

    def show(self, *links: pb.Link) -> pb.Credential:
        """A credential of this chain and `links`."""
        return pb.Credential(mesh_key=self.mesh_key, links=[*self.links, *links])

    def delegate(self, *, scope: int | None = None, end: int | None = None) -> Signer:
        """An invite below this one, allowed or not."""
        seed = os.urandom(32)
        link = self.sign(keys.public_key(seed), kind=pb.LINK_KIND_INVITE, scope=scope, end=end)
        return Signer(self.mesh_key, (*self.links, link), seed)

    def revoke(self, links: Iterable[pb.Link], *, signer: int, seed: bytes | None = None) -> pb.Revocation:
        """Take back the last of `links`, signed by `seed` (this key's own by default) as number `signer`."""
        chain = list(links)
        signed = REVOCATION_CONTEXT + self.mesh_key + link_id(chain[-1])
        return pb.Revocation(
            mesh_key=self.mesh_key,
            links=chain,
            signer=signer,
            signature=keys.sign(self.seed if seed is None else seed, signed),
        )


def why_bad(credential: pb.Credential, *, mesh_key: bytes, peer_key: bytes, now_unix: float) -> str | None:
    """What is wrong with a credential that `peer_key` showed; `None` if nothing is."""
    links = credential.links
    if credential.mesh_key != mesh_key:
        return "it is for another mesh"
    if not 1 <= len(links) <= 8:
        return f"it has {len(links)} links"
    kinds = [link.kind for link in links]
    if kinds != [pb.LINK_KIND_INVITE] * (len(links) - 1) + [pb.LINK_KIND_PEER]:
        return "its links are not invites followed by one peer"
    if links[-1].subject != peer_key:
        return "it is for another peer"
    issuer, scope, end = mesh_key, int(pb.SCOPE_INVITE), NO_END
    for position, link in enumerate(links):
        if not keys.verify(issuer, signed_bytes(mesh_key, issuer, link), link.signature):
            return f"the signature of link {position + 1} is wrong"
        link_end = link.not_after if link.HasField("not_after") else NO_END
        may_invite = link.kind == pb.LINK_KIND_PEER or scope == pb.SCOPE_INVITE
        if not 1 <= link.scope <= scope or link_end > end or not may_invite:
            return f"link {position + 1} gives more than the one above it"
        issuer, scope, end = link.subject, link.scope, link_end
    return "it has expired" if now_unix > end + 60 else None


def announce(
    who: Identity, credential: pb.Credential, age: tuple[int, int], **fields: Any
) -> pb.Announcement:
    """An announcement of `who`; `age` is its incarnation and sequence."""
    return pb.Announcement(
        peer_key=who.key, credential=credential, incarnation=age[0], sequence=age[1], **fields
    )


def seal(said: pb.Announcement | bytes, seed: bytes) -> pb.Record:
    """A record of an announcement, or of any other bytes, signed with `seed`."""
    body = said if isinstance(said, bytes) else said.SerializeToString(deterministic=True)
    return pb.Record(body=body, signature=keys.sign(seed, RECORD_CONTEXT + body))


def why_not_whole(record: pb.Record, *, mesh_key: bytes, now_unix: float) -> str | None:
    """What is wrong with a record that a peer passed on; `None` if nothing is."""
    said = pb.Announcement.FromString(record.body)
    if len(said.peer_key) != 32:
        return f"a peer's key of {len(said.peer_key)} bytes"
    if not keys.verify(said.peer_key, RECORD_CONTEXT + record.body, record.signature):
        return "its signature is wrong"
    if record.ByteSize() > 60 * 1024:
        return f"it has {record.ByteSize()} bytes"
    names = [service.name for service in said.services]
    if names != sorted(set(names)) or len(names) > 256 or not all(1 <= len(n.encode()) <= 255 for n in names):
        return "its services are unsorted, repeated, misnamed or too many"
    if any(not 1 <= service.scope <= pb.SCOPE_INVITE for service in said.services):
        return "a service has no scope"
    if len(said.addresses) > 16 or any(len(address) > 255 for address in said.addresses):
        return "its addresses are too many or too long"
    if len(said.attributes) > 48 * 1024:
        return f"attributes of {len(said.attributes)} bytes"
    why = why_bad(said.credential, mesh_key=mesh_key, peer_key=said.peer_key, now_unix=now_unix)
    return why and f"its credential is bad: {why}"

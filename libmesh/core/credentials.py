"""Who may do what: signed chains from the mesh's key down to a peer.

Theory of operation
-------------------
A mesh is an Ed25519 key pair. Its holder signs a *link* that hands some authority to another key, and the holder of
that key may sign the next one::

    mesh key ──signs──▶ invite link (key A, scope, end) ──▶ invite link (key B, …) ──▶ peer link (a peer's own key)

An *invite* is a chain of invite links together with the secret seed of the last key, so whoever holds it can sign
one more link: usually the peer link that lets its own peer in. A *credential* is a chain that ends in a peer link.
Any member checks it offline, from the mesh's id alone. The rules, each with its refusal:

1. The mesh key hashes to the mesh id (`wrong_mesh`).
2. There are 1 to `MAX_LINKS` links; all but the last are invite links, the last one is a peer link for the peer that
   shows it (`malformed`, `not_yours`).
3. Each link is signed by the key before it, the first one by the mesh key (`forged`).
4. A link never has a wider scope or a later end than its parent (`widened`), and only a parent with the scope
   `INVITE` may be followed by another invite link (`widened`).
5. No link has ended, with `CLOCK_TOLERANCE` for clocks that disagree (`expired`).
6. No link was revoked by a key that stands above it (`revoked`).

What is signed is not the protobuf but the fixed layout of `Link.signed_bytes`, so that there is exactly one
encoding of it (protobuf does not promise one). The idea of chains that can only narrow is that of macaroons
(Birgisson et al., 2014) and SPKI (RFC 2693), with public-key links so that anybody can verify.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from libmesh import keys
from libmesh.errors import InviteDenied
from libmesh.peers import MeshId, PeerId, Scope

MAX_LINKS = 8
"""Longest chain accepted: seven invitations in a row, then a peer. Bounds a stranger's cost to eight signatures."""

CLOCK_TOLERANCE = 30.0
"""Seconds that a link is still taken after its end. NTP keeps clocks within 1 s, a laptop just woken needs some
seconds to catch up. A joiner checks its own invite without any tolerance."""

MAX_REVOCATIONS = 1024
"""Revocations kept. Each needs a real link of the mesh and the key of somebody above it, so that outsiders cannot fill
this; a mesh that needs more is better founded anew."""

MAX_BY_ONE_KEY = 64
"""Revocations kept of one key other than the mesh's own."""

_CONTEXT = b"libmesh link 1\0"
_REVOCATION_CONTEXT = b"libmesh revocation 1\0"
_NO_END = 2**64 - 1


Verify = Callable[[bytes, bytes, bytes], bool]
"""Checks a signature: public key, data, signature."""


class LinkKind(IntEnum):
    """What a link's subject is: a key that may sign further links, or a peer."""

    INVITE = 1
    PEER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One step of a chain. `not_after_unix` is in whole seconds since the epoch; `None` has no end."""

    subject: bytes
    kind: LinkKind
    scope: Scope
    not_after_unix: int | None
    signature: bytes

    def signed_bytes(self, mesh_key: bytes, issuer: bytes) -> bytes:
        """What the issuer signs: context, mesh key, issuer, subject, kind u8, scope u8, end u64 big-endian."""
        return _signed_bytes(mesh_key, issuer, self.subject, self.kind, self.scope, self.not_after_unix)

    @property
    def id(self) -> bytes:
        """16 bytes that name this link in revocations: it is its signature's SHA-256, cut."""
        return hashlib.sha256(self.signature).digest()[:16]


def _signed_bytes(
    mesh_key: bytes, issuer: bytes, subject: bytes, kind: LinkKind, scope: Scope, not_after_unix: int | None
) -> bytes:
    end = _NO_END if not_after_unix is None else not_after_unix
    return _CONTEXT + mesh_key + issuer + subject + struct.pack(">BBQ", kind, scope, end)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A chain that ends in a peer link: what a peer shows to be let in."""

    mesh_key: bytes
    links: tuple[Link, ...]

    @property
    def mesh_id(self) -> MeshId:
        """The mesh that this credential is for."""
        return keys.mesh_id_of(self.mesh_key)

    @property
    def scope(self) -> Scope:
        """What it allows, provided that `verify` accepted it."""
        return self.links[-1].scope

    @property
    def not_after_unix(self) -> int | None:
        """When it ends; `None` never."""
        return self.links[-1].not_after_unix

    @property
    def taken_until_unix(self) -> float:
        """Until when others take it: its end and `CLOCK_TOLERANCE`; infinite if it never ends."""
        end = self.not_after_unix
        return float("inf") if end is None else end + CLOCK_TOLERANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """A chain of invite links and the secret seed of its last key: the power to sign the next link.

    The mesh's creator has no links and the seed of the mesh key itself.
    """

    mesh_key: bytes
    links: tuple[Link, ...]
    seed: bytes

    @classmethod
    def of_mesh(cls, mesh_seed: bytes) -> Authority:
        """The authority of the mesh key's holder."""
        return cls(mesh_key=keys.public_key(mesh_seed), links=(), seed=mesh_seed)

    @property
    def mesh_id(self) -> MeshId:
        """The mesh that this authority is of."""
        return keys.mesh_id_of(self.mesh_key)

    @property
    def scope(self) -> Scope:
        """The widest scope it can give."""
        return self.links[-1].scope if self.links else Scope.INVITE

    @property
    def not_after_unix(self) -> int | None:
        """The latest end it can give; `None` for no end."""
        return self.links[-1].not_after_unix if self.links else None

    def admit(self, peer_key: bytes) -> Credential:
        """Sign `peer_key` in, with all the scope and time that there is."""
        link = self._sign(peer_key, LinkKind.PEER, self.scope, self.not_after_unix)
        return Credential(mesh_key=self.mesh_key, links=(*self.links, link))

    def delegate(self, *, scope: Scope, not_after_unix: int | None, seed: bytes) -> Authority:
        """Hand part of this authority to the fresh key of `seed` (32 random bytes).

        An end later than our own is cut to ours. Raises `InviteDenied` if this authority may not invite, has not
        that scope, or the chain would grow too long.
        """
        if not_after_unix is not None and not 0 <= not_after_unix < _NO_END:
            raise ValueError(f"{not_after_unix} is no time: seconds since the epoch, or None for no end")
        if self.links and self.scope < Scope.INVITE:
            raise InviteDenied(
                f"this node was let in with the scope '{self.scope.name.lower()}' and cannot invite others; "
                "ask for an invite with the scope 'invite', or make this invite on the node that started the mesh"
            )
        if len(self.links) + 2 > MAX_LINKS:
            raise InviteDenied(
                f"this invite would be number {len(self.links) + 1} in a row and at most {MAX_LINKS - 1} are accepted; "
                "make it on a node nearer to the one that started the mesh"
            )
        ends = [end for end in (self.not_after_unix, not_after_unix) if end is not None]
        link = self._sign(keys.public_key(seed), LinkKind.INVITE, scope, min(ends, default=None))
        return Authority(mesh_key=self.mesh_key, links=(*self.links, link), seed=seed)

    def revoke(self, links: tuple[Link, ...]) -> Revocation:
        """Take back the last of `links`, a chain of this mesh. Raises `InviteDenied` unless our key stands above it."""
        issuers = [self.mesh_key, *(link.subject for link in links[:-1])]
        own = keys.public_key(self.seed)
        if own not in issuers:
            raise InviteDenied("only those who let it in, or whoever let them in, can revoke it")
        signed = _REVOCATION_CONTEXT + self.mesh_key + links[-1].id
        return Revocation(
            mesh_key=self.mesh_key,
            links=links,
            signer=issuers.index(own),
            signature=keys.sign(self.seed, signed),
        )

    def _sign(self, subject: bytes, kind: LinkKind, scope: Scope, not_after_unix: int | None) -> Link:
        issuer = self.links[-1].subject if self.links else self.mesh_key
        body = _signed_bytes(self.mesh_key, issuer, subject, kind, scope, not_after_unix)
        return Link(
            subject=subject,
            kind=kind,
            scope=scope,
            not_after_unix=not_after_unix,
            signature=keys.sign(self.seed, body),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """The taking back of a link: the chain down to it, and the signature of a key above it.

    `signer` is 0 for the mesh key, i for the subject of the i-th link. It is good or bad by itself: `is_valid`.
    """

    mesh_key: bytes
    links: tuple[Link, ...]
    signer: int
    signature: bytes

    @property
    def link_id(self) -> bytes:
        """The id of the link that is taken back."""
        return self.links[-1].id

    @property
    def signer_key(self) -> bytes:
        """The public key of whoever takes it back."""
        return self.links[self.signer - 1].subject if self.signer else self.mesh_key

    def is_valid(self, mesh_id: MeshId, verify_signature: Verify = keys.verify) -> bool:
        """Whether the chain is one of the mesh, and the signer stands above its last link and signed."""
        if keys.mesh_id_of(self.mesh_key) != mesh_id or not 1 <= len(self.links) <= MAX_LINKS:
            return False
        if not 0 <= self.signer < len(self.links) or _narrowing_broken(self.links) is not None:
            return False
        issuers = [self.mesh_key, *(link.subject for link in self.links[:-1])]
        signed = _REVOCATION_CONTEXT + self.mesh_key + self.link_id
        return verify_signature(issuers[self.signer], signed, self.signature) and all(
            verify_signature(issuer, link.signed_bytes(self.mesh_key, issuer), link.signature)
            for issuer, link in zip(issuers, self.links, strict=True)
        )


class Revoked:
    """The revocations that a peer knows, all valid, at most `MAX_REVOCATIONS`."""

    def __init__(self) -> None:
        self._by_link: dict[bytes, dict[bytes, Revocation]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_link.values()))

    def __contains__(self, revocation: Revocation) -> bool:
        return self._by_link.get(revocation.link_id, {}).get(revocation.signer_key) == revocation

    def __iter__(self) -> Iterator[Revocation]:
        return (revocation for found in self._by_link.values() for revocation in found.values())

    def add(self, revocation: Revocation) -> bool:
        """Remember a valid revocation. Whether it is new and there was room.

        Anybody with an invite could sign links and take them back again, so each key may have `MAX_BY_ONE_KEY`, and when
        all is full a revocation from nearer to the mesh key takes the place of one from farther off.
        """
        if revocation.signer_key in self._by_link.get(revocation.link_id, {}):
            return False
        if revocation.signer and sum(r.signer_key == revocation.signer_key for r in self) >= MAX_BY_ONE_KEY:
            return False
        if len(self) >= MAX_REVOCATIONS:
            farthest = max(self, key=lambda kept: kept.signer)
            if farthest.signer <= revocation.signer:
                return False
            del self._by_link[farthest.link_id][farthest.signer_key]
        self._by_link.setdefault(revocation.link_id, {})[revocation.signer_key] = revocation
        return True

    def covers(self, credential: Credential) -> bool:
        """Whether any link of `credential` was taken back by a key above it."""
        above = {credential.mesh_key}
        for link in credential.links:
            if above & self._by_link.get(link.id, {}).keys():
                return True
            above.add(link.subject)
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    """A token's content: an authority, and where somebody of the mesh can be reached.

    `contacts` are peer ids with multiaddrs (without `/p2p/…`), best first.
    """

    authority: Authority
    contacts: tuple[tuple[PeerId, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a credential is not accepted: one word of the list in this module's docstring, and a sentence."""

    reason: str
    detail: str


def verify(
    credential: Credential,
    *,
    mesh_id: MeshId,
    peer_key: bytes,
    now_unix: float,
    revoked: Revoked | None = None,
    verify_signature: Verify = keys.verify,
) -> Refusal | None:
    """Check `credential`, shown by the holder of `peer_key`, against all rules; `None` if it is good.

    Costs at most `MAX_LINKS` signature checks, and none before the cheap rules have passed. `verify_signature` may
    be a caching one: links near the mesh key recur in every chain.
    """
    links = credential.links
    if credential.mesh_id != mesh_id:
        return Refusal("wrong_mesh", f"it is for the mesh {credential.mesh_id}, this is {mesh_id}")
    if not 1 <= len(links) <= MAX_LINKS:
        return Refusal("malformed", f"it has {len(links)} links; 1 to {MAX_LINKS} are accepted")
    if links[-1].kind is not LinkKind.PEER or any(link.kind is not LinkKind.INVITE for link in links[:-1]):
        return Refusal("malformed", "its links are not invitations followed by one peer")
    if links[-1].subject != peer_key:
        return Refusal("not_yours", "it was made for another peer")
    if (why := _narrowing_broken(links)) is not None:
        return Refusal("widened", why)
    for link in links:
        if link.not_after_unix is not None and now_unix >= link.not_after_unix + CLOCK_TOLERANCE:
            return Refusal("expired", f"it ended {_ago(now_unix - link.not_after_unix)} ago")
    if revoked is not None and revoked.covers(credential):
        return Refusal("revoked", "it, or an invite that it came from, was revoked")
    issuer = credential.mesh_key
    for position, link in enumerate(links):
        if not verify_signature(issuer, link.signed_bytes(credential.mesh_key, issuer), link.signature):
            return Refusal("forged", f"the signature of link {position + 1} of {len(links)} is wrong")
        issuer = link.subject
    return None


def _narrowing_broken(links: tuple[Link, ...]) -> str | None:
    for parent, child in itertools.pairwise(links):
        if child.scope > parent.scope:
            return "a link has a wider scope than the one above it"
        if parent.not_after_unix is not None and (
            child.not_after_unix is None or child.not_after_unix > parent.not_after_unix
        ):
            return "a link ends later than the one above it"
        if child.kind is LinkKind.INVITE and parent.scope is not Scope.INVITE:
            return "an invite without the scope 'invite' was used to make another invite"
    return None


def _ago(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{int(seconds // unit)} {name}"
    return f"{max(int(seconds), 0)} seconds"

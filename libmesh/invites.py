"""Invite tokens, as the one who got them sees them: readable, unbroken, and still valid?"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from libmesh import keys, tokens
from libmesh.core import credentials
from libmesh.core.credentials import Credential, Invite, Link
from libmesh.core.ways import is_private, to_invite
from libmesh.errors import InviteExpired, InviteMalformed
from libmesh.peers import MeshId, PeerId, PeerState, Scope, View


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteInfo:
    """What a token says, or what is known of an invite that somebody came by.

    Attributes:
        id: names the invite, in 32 hex digits; no secret.
        expires_unix: when it ends, in seconds since the epoch; `None` never.
        contacts: the peers that it names as ways in.
        chain: its public part, for `Mesh.revoke`: lets nobody in.
    """

    id: str
    mesh_id: MeshId
    scope: Scope
    expires_unix: int | None
    contacts: tuple[PeerId, ...]
    chain: bytes


def check_invite(token: str, *, now_unix: float) -> Invite:
    """Decode a token and check all that can be checked alone.

    Raises `InviteMalformed` or `InviteExpired`. The mesh has the last word: a revocation is not seen here.
    """
    invite = tokens.decode_invite(token)
    authority = invite.authority
    if (end := authority.not_after_unix) is not None and now_unix > end:
        ended = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(end))
        raise InviteExpired(f"the invite has expired ({ended}); ask for a new one", end)
    key = keys.public_key(os.urandom(keys.KEY_LENGTH))
    refusal = credentials.verify(
        authority.admit(key), mesh_id=authority.mesh_id, peer_key=key, now_unix=now_unix
    )
    if refusal is not None:
        raise InviteMalformed(f"the invite was tampered with: {refusal.detail}")
    return invite


def ways_in(
    view: View, addresses: Sequence[str], *, following: bool
) -> tuple[tuple[PeerId, tuple[str, ...]], ...]:
    """Whom an invite names as ways into the mesh, and where: its maker, at `addresses`, and two peers that it is connected to.

    Those that can be reached from anywhere are named before others. Who only follows names three of them and not itself.
    Connected for another moment may be who was revoked just now, or is leaving: those are named by nobody.
    """
    connected = (entry for entry in view.peers if entry.path is not None and entry.addresses)
    alive = [entry for entry in connected if entry.state is PeerState.ALIVE]
    alive.sort(key=lambda entry: all(map(is_private, entry.addresses)))
    if following and alive:
        return tuple((entry.peer, to_invite(entry.addresses, 4)) for entry in alive[:3])
    others = ((entry.peer, to_invite(entry.addresses, 2)) for entry in alive[:2])
    return ((view.me, to_invite(addresses, 4)), *others)


def read_invite(token: str) -> InviteInfo:
    """What a token says, expired or not. Raises `InviteMalformed`."""
    invite = tokens.decode_invite(token)
    contacts = tuple(peer for peer, _ in invite.contacts)
    return _info(invite.authority.mesh_key, invite.authority.links, contacts)


def invites_in(credential: Credential) -> tuple[InviteInfo, ...]:
    """The invites that a credential came by, from the mesh's key down; without contacts, which only tokens have."""
    links = credential.links[:-1]
    return tuple(_info(credential.mesh_key, links[: depth + 1]) for depth in range(len(links)))


def _info(mesh_key: bytes, links: tuple[Link, ...], contacts: tuple[PeerId, ...] = ()) -> InviteInfo:
    return InviteInfo(
        id=links[-1].id.hex(),
        chain=tokens.encode_chain(mesh_key, links),
        mesh_id=keys.mesh_id_of(mesh_key),
        scope=links[-1].scope,
        expires_unix=links[-1].not_after_unix,
        contacts=contacts,
    )

"""Invite tokens, as the one who got them sees them: readable, unbroken, and still valid?"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from libmesh import keys, tokens
from libmesh.core import credentials
from libmesh.core.credentials import Invite
from libmesh.errors import InviteExpired, InviteMalformed
from libmesh.peers import MeshId, PeerId, Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteInfo:
    """What a token says.

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


def read_invite(token: str) -> InviteInfo:
    """What a token says, expired or not. Raises `InviteMalformed`."""
    invite = tokens.decode_invite(token)
    links = invite.authority.links
    return InviteInfo(
        id=links[-1].id.hex(),
        chain=tokens.encode_chain(invite.authority.mesh_key, links),
        mesh_id=invite.authority.mesh_id,
        scope=invite.authority.scope,
        expires_unix=invite.authority.not_after_unix,
        contacts=tuple(peer for peer, _ in invite.contacts),
    )

"""Which mesh a node belongs to: the one that it founded, or one that it was invited to. Kept in the data folder."""

from __future__ import annotations

import json
from dataclasses import dataclass

from libmesh import InviteError, MeshError, MeshId, SecretKey, read_invite
from libmesh_node.datadir import DataDir
from libmesh_node.errors import NodeError


@dataclass(frozen=True, slots=True)
class Membership:
    """A mesh and the way in: `token` if this node was invited, `None` if the mesh is its own."""

    mesh_id: MeshId
    token: str | None = None

    @classmethod
    def invited(cls, token: str) -> Membership:
        """By the invite `token`. Raises `InviteMalformed`."""
        return cls(read_invite(token).mesh_id, token)


def load_membership(folder: DataDir) -> Membership | None:
    """The mesh that this node was last let into; `None` if it never was."""
    data = folder.read_secret(folder.membership)
    if data is None:
        return None
    try:
        return Membership.invited(str(json.loads(data)["token"]))
    except (ValueError, KeyError, TypeError, InviteError) as exc:
        raise NodeError(
            f"{folder.membership} is damaged ({exc}). Remove it, and join again with an invite."
        ) from exc


def save_membership(folder: DataDir, membership: Membership) -> None:
    """Remember the mesh that let this node in, so that the next start needs no token."""
    folder.write_secret(folder.membership, json.dumps({"token": membership.token}).encode() + b"\n")


def secret_key(folder: DataDir, which: str) -> SecretKey:
    """The `identity` or the `mesh` key of the data folder; made at first use. Raises `NodeError`."""
    file = folder.identity_key if which == "identity" else folder.mesh_key
    data = folder.read_secret(file)
    if data is None:
        key = SecretKey.generate()
        folder.write_secret(file, key.to_text())
        return key
    try:
        return SecretKey.from_text(data)
    except MeshError as exc:
        raise NodeError(
            f"{file}: {exc}. Restore it from a backup, or run `libmesh-node rotate-key` for new keys."
        ) from exc

"""What a node keeps of its mesh from one run to the next: the invites it made, what was revoked, and who was there.

One file, `mesh.json`, replaced whole. Nothing in it is a secret: the chains of invites let nobody in.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from libmesh import InviteInfo, MeshId, PeerId
from libmesh_node.datadir import DataDir
from libmesh_node.errors import NodeError
from libmesh_node.snapshot import Invite

MAX_INVITES = 1000
"""Invites remembered; then the oldest is forgotten, and can only be revoked by the mesh's founder by its id no more."""

MAX_MESHES = 16
"""Meshes remembered; then the one that was left longest ago is forgotten."""

MAX_PEERS = 64
"""Ways back into the mesh. One suffices."""


@dataclass(slots=True)
class Kept:
    """What is kept of one mesh.

    Attributes:
        invites: those that this node made, oldest first; `chains` has their public parts, by id.
        revocations: as `Mesh.revocations` tells them.
        contacts: peers and their addresses, those seen last.
    """

    mesh_id: MeshId
    invites: list[Invite] = field(default_factory=list)
    chains: dict[str, bytes] = field(default_factory=dict)
    revocations: tuple[bytes, ...] = ()
    contacts: tuple[tuple[PeerId, tuple[str, ...]], ...] = ()

    def add(self, info: InviteInfo) -> None:
        """Remember an invite that was made; those that have ended are forgotten."""
        now = time.time()
        made = Invite(
            id=info.id, scope=info.scope.name.lower(), expires_unix=info.expires_unix, created_unix=int(now)
        )
        live = [one for one in self.invites if one.expires_unix is None or one.expires_unix > now]
        self.invites = [*live, made][-MAX_INVITES:]
        ids = {one.id for one in self.invites}
        self.chains = {id: chain for id, chain in self.chains.items() if id in ids} | {info.id: info.chain}

    def find(self, text: str) -> Invite | None:
        """The invite whose id begins with `text`, if there is exactly one."""
        found = [one for one in self.invites if len(text) >= 4 and one.id.startswith(text.lower())]
        return found[0] if len(found) == 1 else None

    def mark_revoked(self, id: str) -> None:
        """Show an invite as revoked from now on."""
        self.invites = [
            Invite(**(asdict(one) | {"revoked": True})) if one.id == id else one for one in self.invites
        ]


def load_kept(folder: DataDir, mesh_id: MeshId) -> Kept:
    """What is kept of `mesh_id`. Raises `NodeError` if the file is damaged."""
    found = _read(folder).get(mesh_id)
    if found is None:
        return Kept(mesh_id)
    try:
        return Kept(
            mesh_id,
            invites=[Invite(**one) for one in found["invites"]],
            chains={id: base64.b64decode(chain) for id, chain in found["chains"].items()},
            revocations=tuple(base64.b64decode(one) for one in found["revocations"]),
            contacts=tuple((PeerId(peer), tuple(addresses)) for peer, addresses in found["contacts"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise _damaged(folder, exc) from exc


def save_kept(folder: DataDir, kept: Kept) -> None:
    """Write it down, beside what is kept of other meshes: a founder who visits one loses nothing of its own.

    Raises `NodeError`.
    """
    try:
        content = _read(folder)
    except NodeError as exc:
        raise NodeError(f"Cannot write to {folder.kept} before what is there can be read. {exc}") from exc
    content.pop(kept.mesh_id, None)
    while len(content) >= MAX_MESHES:
        del content[next(iter(content))]
    content[kept.mesh_id] = {
        "invites": [asdict(one) for one in kept.invites],
        "chains": {id: _text(chain) for id, chain in kept.chains.items()},
        "revocations": [_text(one) for one in kept.revocations],
        "contacts": [[peer, list(addresses)] for peer, addresses in kept.contacts[:MAX_PEERS]],
    }
    folder.write_secret(folder.kept, json.dumps(content, indent=1).encode() + b"\n")


def _read(folder: DataDir) -> dict[str, Any]:
    """All that is kept, by mesh; the one in use last stands last."""
    data = folder.read_secret(folder.kept)
    if data is None:
        return {}
    try:
        content = json.loads(data)
    except ValueError as exc:
        raise _damaged(folder, exc) from exc
    if not isinstance(content, dict):
        raise _damaged(folder, TypeError("no object"))
    return content


def _damaged(folder: DataDir, why: Exception) -> NodeError:
    return NodeError(
        f"{folder.kept} is damaged ({why}). Remove it: the list of invites made here, and what was revoked, is lost with it."
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def reachable(peers: Sequence[tuple[PeerId, tuple[str, ...]]]) -> tuple[tuple[PeerId, tuple[str, ...]], ...]:
    """The peers that have an address, at most `MAX_PEERS`."""
    return tuple((peer, addresses) for peer, addresses in peers if addresses)[:MAX_PEERS]

"""The invites of this node's mesh: the one that is shown, those that people ask for, and taking them back.

Also keeps, in `mesh.json`, what a later run needs: which invites were made, what was revoked, and who was there.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from libmesh import InviteDenied, InviteError, Mesh, MeshError, PeerId, Scope, read_invite
from libmesh_node.announced import decode_status
from libmesh_node.bridge import CommandFailed
from libmesh_node.datadir import DataDir, write_private
from libmesh_node.errors import NodeError
from libmesh_node.kept import Kept, load_kept, reachable, save_kept
from libmesh_node.options import NodeOptions
from libmesh_node.snapshot import Invite

log = logging.getLogger(__name__)

SHOWN_TTL = 30 * 86400.0
"""Seconds that the invite which a node shows at its start holds. It is the same one until half of that is over."""

_ID = 32
"""Characters of an invite's id."""


class Inviting:
    """The invites of one stay in a mesh.

    Args:
        mesh: the mesh, open.
        folder: where tokens and lists are kept.
        options: says where else the shown invite is wanted.
    """

    def __init__(self, mesh: Mesh, folder: DataDir, options: NodeOptions) -> None:
        self._mesh, self._folder, self._options = mesh, folder, options
        self._kept: Kept = load_kept(folder, mesh.mesh_id)
        self.token = ""
        self._shown_for: tuple[tuple[str, ...], int] | None = None

    @property
    def invites(self) -> tuple[Invite, ...]:
        """Those that this node made and that hold, oldest first."""
        now = time.time()
        return tuple(one for one in self._kept.invites if one.expires_unix is None or one.expires_unix > now)

    def show(self) -> None:
        """Make `token` a good invite with the ways in that hold now; empty if this node may not invite.

        It changes only with this node's addresses, and at most daily. Raises `NodeError` if it cannot be written where it
        is wanted.
        """
        reason = (self._mesh.addresses, int(time.time() // 86400))
        if reason != self._shown_for:
            self._show_anew()
            self._shown_for = reason

    def show_again(self) -> None:
        """As `show`, whatever was shown: what this node may do is another thing now."""
        self._shown_for = None
        self.show()

    def _show_anew(self) -> None:
        token = self._last_shown()
        try:
            token = self._mesh.readdress(token) if token else self._make(Scope.WORKER, SHOWN_TTL)
        except InviteDenied:
            self.token = ""
            return
        if self.token not in ("", token):
            log.info(
                "there are other ways to this node now; the next machine joins with:  libmesh-node --join %s",
                token,
                extra={"private": True},
            )
        self.token = token
        self._folder.write_secret(self._folder.invite, token.encode() + b"\n")
        wanted = self._options.invite_file
        if wanted is not None:
            try:
                write_private(wanted, token.encode() + b"\n")
            except OSError as exc:
                raise NodeError(f"Cannot write the invite to {wanted}: {exc.strerror}.") from exc

    def _last_shown(self) -> str:
        """The invite shown last time, if it is this mesh's, not revoked, and not near its end."""
        data = self._folder.read_secret(self._folder.invite)
        if data is None:
            return ""
        try:
            info = read_invite(data.decode("ascii", "replace"))
        except InviteError:
            return ""
        known = self._kept.find(info.id)
        ends = info.expires_unix or 0
        good = info.mesh_id == self._mesh.mesh_id and known is not None and not known.revoked
        return data.decode("ascii").strip() if good and ends > time.time() + SHOWN_TTL / 2 else ""

    def make(self, scope: Scope, ttl: float) -> str:
        """A new invite that holds for `ttl` seconds. Raises `InviteDenied`."""
        return self._make(scope, ttl)

    def _make(self, scope: Scope, ttl: float) -> str:
        token = self._mesh.invite(scope=scope, not_after_unix=time.time() + ttl)
        self._kept.add(read_invite(token))
        save_kept(self._folder, self._kept)
        return token

    def revoke(self, name: str) -> str:
        """Take back the invite or the membership that `name` names; say in words what was done.

        `name` is an invite's id or the beginning of it, or a peer's id, its end, or its host name. An invite is one that
        this node made, or one that a peer came by. Raises `CommandFailed`.
        """
        try:
            if (invite := self._invite_named(name)) is not None:
                self._mesh.revoke(invite[1])
                self._kept.mark_revoked(invite[0])
                done = f"The invite {invite[0][:8]} is revoked, and with it everybody that it let in."
            else:
                peer, called = self._peer_named(name)
                invites = self._mesh.invites_of(peer)
                self._mesh.revoke_peer(peer)
                done = f"The membership of {called} is revoked."
                if invites:
                    done += (
                        f" Its invite {invites[-1].id[:8]} still holds, for another identity of its holder, too; "
                        "`libmesh-node invite revoke` takes that back, and whomever else it let in."
                    )
        except MeshError as exc:
            raise CommandFailed("denied", f"{name}: {exc}.") from exc
        self.keep()
        self.show_again()
        return done

    def _invite_named(self, name: str) -> tuple[str, bytes] | None:
        """Id and chain: of ours first, then of those that others came by, unless a peer is called so, too."""
        if (own := self._kept.find(name)) is not None:
            return own.id, self._kept.chains[own.id]
        if len(name) < 4 or (len(name) < _ID and self._peers_named(name)):
            return None  # a whole id is nobody's name, but of one that wants to keep its invite from being taken back
        view = self._mesh.view
        known = [one for peer in (*view.peers, *view.followers) for one in self._mesh.invites_of(peer.peer)]
        found = {one.id: one.chain for one in known if one.id.startswith(name.lower())}
        return next(iter(found.items())) if len(found) == 1 else None

    def _peers_named(self, name: str) -> list[tuple[PeerId, str]]:
        return [
            (peer.peer, decode_status(peer.attributes).hostname or peer.peer)
            for peer in (*self._mesh.view.peers, *self._mesh.view.followers)
            if name == peer.peer
            or (len(name) >= 4 and peer.peer.endswith(name))
            or name == decode_status(peer.attributes).hostname
        ]

    def _peer_named(self, name: str) -> tuple[PeerId, str]:
        matches = self._peers_named(name)
        if len(matches) != 1:
            what = "Neither an invite nor a peer is" if not matches else f"{len(matches)} peers are"
            raise CommandFailed(
                "not_found",
                f"{what} called {name}; `libmesh-node invite --list` and `peers` tell their names.",
            )
        return matches[0]

    def keep(self) -> None:
        """Write down what changed: revocations, and who is there. Raises `NodeError`; the next call tries again."""
        present = [(peer.peer, peer.addresses) for peer in self._mesh.view.peers if peer.path is not None]
        contacts = reachable(present) or self._kept.contacts
        revocations = self._mesh.revocations
        if (contacts, revocations) != (self._kept.contacts, self._kept.revocations):
            changed = replace(self._kept, contacts=contacts, revocations=revocations)
            save_kept(self._folder, changed)
            self._kept = changed

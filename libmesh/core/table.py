"""What can be asked of the peer table, none of which changes it: the half of `membership` that only looks."""

from __future__ import annotations

from collections.abc import Callable

from libmesh.core.announcement import Announcement, Record, Seal, disproved
from libmesh.core.credentials import Credential, Revocation
from libmesh.core.credentials import Revoked as RevokedLinks
from libmesh.core.membership_io import MembershipConfig, Suspicion
from libmesh.core.roster import Roster, Watched
from libmesh.core.summary import Digest, Part, Summary
from libmesh.core.voice import Voice
from libmesh.peers import MeshId, Path, PeerId, PeerState, View


class Table:
    """The peer table of one mesh, as one of its peers sees it. The arguments are those of `Membership`."""

    def __init__(
        self, me: Announcement, *, mesh_id: MeshId, seal: Seal, config: MembershipConfig, following: bool
    ) -> None:
        self.mesh_id, self.config, self.following = mesh_id, config, following
        self.revoked = RevokedLinks()
        self._id = me.peer
        self._voice = Voice(me, seal, config)
        full_mesh, connections = (1, config.followed) if following else (config.full_mesh, config.connections)
        self._roster = Roster(me.peer, full_mesh=full_mesh, connections=connections)
        self._peers = self._roster.entries

    @property
    def me(self) -> Record:
        """This node's own newest record. Nobody is told of it while it follows."""
        return self._voice.record

    @property
    def watched(self) -> Watched:
        """The arguments of `liveness.Watch`."""
        return self._roster.watched

    def believes(self, peer: PeerId) -> bool:
        """Whether `peer` is a member that may be there: alive, or suspected."""
        return self._roster.believes(peer)

    def wanted(self, peer: PeerId) -> bool:
        """Whether the connection to `peer` is one that this machine wants to have."""
        return self._roster.wanted(peer)

    def is_lie(self, said: Record | Revocation | Suspicion) -> bool:
        """Whether nobody can have said this in good faith. To be asked after the machine was told: what it took is true.

        Of records only what would be news is looked at: what is ignored anyway should cost nothing.
        """
        match said:
            case Record():
                known = self.record_of(said.announcement.peer)
                news = known is None or said.announcement.age > known.announcement.age
                return news and disproved(said, mesh_id=self.mesh_id)
            case Revocation():
                return said not in self.revoked and not said.is_valid(self.mesh_id)
            case Suspicion():
                return False

    def digest(self, part: Part | None = None) -> Digest:
        """What is known of each peer, this node included unless it follows; of a part of them, if that is asked for."""
        whole = self._roster.digest(None if self.following else self.me)
        return whole if part is None else whole.of(part)

    def summary(self) -> Summary:
        """The fingerprints of all that `digest` tells, and of the revocations that are known."""
        return self._roster.summary(None if self.following else self.me, self.revoked)

    def newer_than(self, digest: Digest) -> list[Record]:
        """The records that somebody with `digest` lacks. The dead are not told of; goodbyes are."""
        return self._roster.newer_than(None if self.following else self.me, digest)

    def record_of(self, peer: PeerId) -> Record | None:
        """The newest announcement of a peer, or of this node; `None` if it is not known."""
        if peer == self._id:
            return self.me
        return self._peers[peer].record if peer in self._peers else None

    def credential_of(self, peer: PeerId) -> Credential | None:
        """What a peer has announced as its proof of membership; `None` if it is not known."""
        return self._peers[peer].announcement.credential if peer in self._peers else None

    def addresses_of(self, peer: PeerId) -> tuple[str, ...]:
        """Where a peer says that it can be reached; empty if unknown."""
        return self._peers[peer].announcement.addresses if peer in self._peers else ()

    def state_of(self, peer: PeerId) -> PeerState | None:
        """What is believed of a peer; `None` if it is not known, or forgotten."""
        return self._peers[peer].state if peer in self._peers else None

    def view(self, path_of: Callable[[PeerId], Path | None]) -> View:
        """A picture of the mesh now. The forgotten are not in it, the dead and the left are."""
        return self._roster.view(self.me, self.mesh_id, path_of)

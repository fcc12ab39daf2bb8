"""Peers that were here once, or that an invite named, and of whom nothing is known now: one of them is tried now and then.

A partition that lasts longer than tombstones do leaves two meshes that have forgotten each other. Neither would ever look
for the other again, for each has company. So the addresses of the dead outlive their tombstones here, and each peer tries
one of them every `seek` seconds: that is one dial per peer however many are lost, and a dozen peers find the others within
some seconds of the link's return. One connection suffices: the digests exchanged on it tell both sides of all.
"""

from __future__ import annotations

from libmesh.core.credentials import Credential, Revoked
from libmesh.core.membership_io import Dial, MembershipConfig
from libmesh.core.plan import lot
from libmesh.core.timers import INFINITY
from libmesh.peers import PeerId

MAX_LOST = 64
"""Peers remembered so. When full, who was lost first is forgotten: of a mesh that parted, one is enough."""

KEPT = 7 * 86400.0
"""Seconds for which one is tried, when nothing comes of it. A machine that was away for longer has its own memory."""


class Lost:
    """The lost peers of one peer.

    Args:
        me: whose they are.
        config: the times.
    """

    def __init__(self, me: PeerId, config: MembershipConfig) -> None:
        self._me, self._config = me, config
        self._peers: dict[PeerId, tuple[float, tuple[str, ...], Credential | None]] = {}
        self._next = INFINITY

    @property
    def due(self) -> float:
        """When one is to be tried; infinite if there is none."""
        return self._next if self._peers else INFINITY

    def add(
        self, peer: PeerId, addresses: tuple[str, ...], credential: Credential | None, now: float
    ) -> None:
        """From now on `peer` is lost; `credential` is what it had, if that is known."""
        if not addresses or peer == self._me:
            return
        self._peers.pop(peer, None)
        if len(self._peers) >= MAX_LOST:
            del self._peers[next(iter(self._peers))]
        if not self._peers:
            self._next = now + self._pause(peer)
        self._peers[peer] = (now + KEPT, addresses, credential)

    def found(self, peer: PeerId) -> None:
        """It is known again."""
        self._peers.pop(peer, None)

    def revoke(self, revoked: Revoked) -> None:
        """Look no more for those whose membership was taken back."""
        for peer, (_, _, credential) in list(self._peers.items()):
            if credential is not None and revoked.covers(credential):
                del self._peers[peer]

    def dial(self, now: float) -> list[Dial]:
        """Try one, if it is time; the others come before it is tried again."""
        if self.due > now:
            return []
        peer = next(iter(self._peers))
        ends, addresses, credential = self._peers.pop(peer)
        self._next = now + self._pause(peer)
        expires = None if credential is None else credential.not_after_unix
        if now >= min(ends, INFINITY if expires is None else expires):
            return []
        self._peers[peer] = (ends, addresses, credential)
        return [Dial(peer, addresses)]

    def _pause(self, peer: PeerId) -> float:
        return self._config.seek * (0.75 + 0.5 * lot(self._me, peer))

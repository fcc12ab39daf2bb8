"""Whom to dial, and when: neighbours and the doubted at once, the failed with back-off, the dead a few at a time."""

from __future__ import annotations

from libmesh.core.membership_io import Dial, MembershipConfig
from libmesh.core.plan import lot
from libmesh.core.roster import Entry, Roster
from libmesh.core.timers import INFINITY
from libmesh.peers import PeerId, PeerState

MAX_DIALS = 256
"""Dials under way, each a socket. Further ones wait until one has ended."""

DEAD_AT_ONCE = 8
"""How many of the dead are dialled within `dial_max`, however many there are."""


class Dialling:
    """The rules by which one peer dials the others of its roster. Set `stopped` to dial nobody any more.

    Args:
        me: who dials.
        roster: whom; its entries' `dialling`, `failures`, `next_dial` and `reach_by` are kept here.
        config: the times.
    """

    def __init__(self, me: PeerId, roster: Roster, config: MembershipConfig) -> None:
        self._me, self._roster, self._config = me, roster, config
        self._active = 0
        self.stopped = False

    def first(self, peer: PeerId, now: float) -> float:
        """When to dial a peer just heard of: the lower id does so at once, the higher one if that came to nothing."""
        return now + self._config.dial_first if peer < self._me else now

    def wants(self, peer: PeerId, entry: Entry) -> bool:
        """Whether `peer` is to be dialled when its `next_dial` has come, which is never if that is infinite."""
        if self.stopped or entry.connected or entry.dialling or entry.next_dial == INFINITY:
            return False
        if entry.state is PeerState.LEFT or not entry.announcement.addresses:
            return False
        needed = entry.state is not PeerState.ALIVE or entry.doubted_at < INFINITY
        return needed or self._roster.wanted(peer)

    def dial(self, peer: PeerId, entry: Entry, now: float) -> list[Dial]:
        """Dial `peer`, if it is time."""
        if entry.next_dial > now or not self.wants(peer, entry):
            return []
        if self._active >= MAX_DIALS:
            entry.next_dial = now + self._config.dial_min
            return []
        entry.dialling = True
        self._active += 1
        if entry.state is PeerState.ALIVE and entry.doubted_at < INFINITY:
            entry.reach_by = now + self._config.reach
        return [Dial(peer, entry.announcement.addresses)]

    def failed(self, peer: PeerId, entry: Entry, now: float) -> None:
        """A dial came to nothing."""
        self.ended(entry)
        entry.failures += 1
        if entry.next_dial < INFINITY:
            entry.next_dial = now + self.pause(peer, entry)

    def ended(self, entry: Entry) -> None:
        """A dial is over, whatever came of it."""
        self._active -= entry.dialling
        entry.dialling = False

    def pause(self, peer: PeerId, entry: Entry) -> float:
        """Seconds until the next dial.

        Many die at once when a mesh parts. The second dials, too, are spread over the whole round, for the first ones were
        planned before all were dead: or else all are tried at its beginning, and nobody when the link returns.
        """
        config, chance = self._config, lot(peer, self._me)
        if entry.state is PeerState.DEAD:
            around = config.dial_max * max(1.0, len(self._roster.dead) / DEAD_AT_ONCE)
            spread = chance if entry.failures < 2 else 0.75 + 0.5 * chance
            return max(config.dial_min, around * spread)
        return min(config.dial_min * 2.0 ** min(max(entry.failures, 1) - 1, 16), config.dial_max)

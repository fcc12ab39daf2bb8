"""What a peer says of itself, and when: changes close together as one, repeats seldom, and refutations in measure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from libmesh.core.announcement import Announcement, Record, Seal
from libmesh.core.credentials import Credential
from libmesh.core.membership_io import MembershipConfig
from libmesh.core.timers import INFINITY
from libmesh.peers import Service

FAR_AHEAD = 365 * 86400.0
"""Seconds. Incarnations count milliseconds since the epoch, and one for each refutation; claims that we have spoken
with one from further ahead than this are lies, and outbidding them could make us run out of numbers (2⁶⁴)."""


class Voice:
    """One peer's own announcements.

    Args:
        me: the first one; the sequence counts up from there.
        seal: signs them.
        config: the times.

    Attributes:
        record: the newest one.
        left: the goodbye was said.
        crowd: by how much repeats are rarer than `refresh`.
    """

    def __init__(self, me: Announcement, seal: Seal, config: MembershipConfig) -> None:
        self.record = seal(me)
        self.left = False
        self.crowd = 1.0
        self._seal, self._config = seal, config
        self._pending: Announcement | None = None
        self._outbid: int | None = None
        self._spoke_at = -INFINITY

    @property
    def due(self) -> float:
        """When there will be something to say; infinite after the goodbye."""
        if self.left:
            return INFINITY
        pause = self._config.refresh * self.crowd
        if self._outbid is not None:
            pause = min(pause, self._config.refute_every)
        if self._pending is not None:
            pause = min(pause, self._config.coalesce)
        return self._spoke_at + pause

    def change(self, services: Iterable[Service], addresses: tuple[str, ...], attributes: bytes) -> None:
        """Say this from now on."""
        now_said = self._pending or self.record.announcement
        wanted = replace(
            now_said,
            services=tuple(sorted(services, key=lambda service: service.name)),
            addresses=addresses,
            attributes=attributes,
        )
        if wanted != now_said:
            self._pending = wanted

    def renew(self, credential: Credential) -> None:
        """Be a member by this one from now on. Due at once, unlike other changes, and with those that wait."""
        self._pending = replace(self._pending or self.record.announcement, credential=credential)
        self.repeat()

    def repeat(self) -> None:
        """What is said was said to nobody: it is due."""
        self._spoke_at = -INFINITY

    def outbid(self, incarnation: int, now: float) -> None:
        """Speak with a higher incarnation than `incarnation`: others believe it of us, and it is wrong."""
        mine = self.record.announcement.incarnation
        if mine <= incarnation <= (now + FAR_AHEAD) * 1000:
            self._outbid = max(incarnation, self._outbid or 0)

    def speak(self, now: float) -> Record | None:
        """The next announcement, if it is due."""
        if now < self.due or self.left:
            return None
        said = self.record.announcement
        wanted = self._pending or said
        if self._outbid is not None:
            wanted = replace(wanted, incarnation=self._outbid + 1)
        self.record = self._seal(replace(wanted, sequence=said.sequence + 1))
        self._pending, self._outbid, self._spoke_at = None, None, now
        return self.record

    def leave(self) -> Record:
        """The goodbye."""
        said = self.record.announcement
        self.left = True
        self.record = self._seal(
            replace(said, sequence=said.sequence + 1, leaving=True, services=(), attributes=b"")
        )
        return self.record

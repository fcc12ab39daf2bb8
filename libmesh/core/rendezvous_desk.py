"""Who has registered where at a rendezvous point, and for how long. Decides; moves no bytes.

Source: libp2p/specs, rendezvous/README.md. A registration outlives the connection that it came over, so that a peer is
found that was here a moment ago; it ends when it is not renewed in time. Each one has a number, higher than all before,
and an answer's cookie is the highest in it: whoever shows it again hears only what is newer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from libmesh.peers import PeerId

MAX_NAMESPACE = 255
"""Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RendezvousLimits:
    """What a rendezvous point keeps at most.

    Attributes:
        registrations: in all. When full, those whose time is over go, and further ones are refused.
        per_peer: namespaces in which one peer is registered. Further ones are refused.
        lasts: seconds for which a registration holds at most; a longer time is shortened to it.
        answer: registrations in one answer; whoever wants more asks again with the cookie.
    """

    registrations: int = 4096
    per_peer: int = 4
    lasts: float = 7200.0
    answer: int = 16


@dataclass(slots=True)
class Registration:
    """A peer in a namespace: its signed record, until `ends`."""

    peer: PeerId
    record: bytes
    number: int
    ends: float


class RendezvousDesk:
    """The books of one rendezvous point. Times are seconds of any one clock."""

    def __init__(self, limits: RendezvousLimits | None = None) -> None:
        self.limits = limits or RendezvousLimits()
        self._spaces: dict[str, dict[PeerId, Registration]] = {}  # each in the order of the numbers
        self._counts: Counter[PeerId] = Counter()
        self._total = 0
        self._number = 0

    @property
    def registrations(self) -> int:
        """How many there are, those included whose time is over and whom nobody has asked for since."""
        return self._total

    def register(self, peer: PeerId, namespace: str, record: bytes, lasts: float, now: float) -> float | None:
        """Keep `record`, in place of an earlier one of the peer there. For how long, or `None` if there is no room.

        `lasts` 0 is as long as is allowed.
        """
        held = self._spaces.get(namespace, {}).get(peer)
        if held is None:
            if self._counts[peer] >= self.limits.per_peer or self._total >= self.limits.registrations:
                self._sweep(now)
            if self._counts[peer] >= self.limits.per_peer or self._total >= self.limits.registrations:
                return None
        self.unregister(peer, namespace)
        granted = min(lasts or self.limits.lasts, self.limits.lasts)
        self._number += 1
        found = Registration(peer, record, self._number, now + granted)
        self._spaces.setdefault(namespace, {})[peer] = found
        self._counts[peer] += 1
        self._total += 1
        return granted

    def unregister(self, peer: PeerId, namespace: str) -> None:
        """Forget a registration. Harmless if there is none."""
        space = self._spaces.get(namespace)
        if space is None or space.pop(peer, None) is None:
            return
        if not space:
            del self._spaces[namespace]
        self._total -= 1
        self._counts[peer] -= 1
        if not self._counts[peer]:
            del self._counts[peer]

    def discover(self, namespace: str, limit: int, after: int, now: float) -> tuple[Registration, ...]:
        """Up to `limit` registrations that hold and have a higher number than `after`, lowest first; 0 is no limit.

        Never more than `RendezvousLimits.answer`.
        """
        most = min(limit or self.limits.answer, self.limits.answer)
        found: list[Registration] = []
        for registration in self._spaces.get(namespace, {}).values():
            if registration.number > after and registration.ends > now:
                found.append(registration)
            if len(found) == most:
                break
        return tuple(found)

    def _sweep(self, now: float) -> None:
        over = [
            (registration.peer, namespace)
            for namespace, space in self._spaces.items()
            for registration in space.values()
            if registration.ends <= now
        ]
        for peer, namespace in over:
            self.unregister(peer, namespace)

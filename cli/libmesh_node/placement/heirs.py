"""Peers that were left a split and did not take it over. Nothing is left to them for a while; they may be workers still."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NO_HEIR_FOR = 3600.0
"""Seconds for which nothing is left to such a peer: with each try nothing answers for about a minute."""


@dataclass(slots=True)
class _Entry:
    """`incarnation`: in which it failed; of a later one nothing is known. `None`: it failed in two."""

    until: float
    incarnation: int | None
    restarted: bool = False


class PassedOver:
    """`in`: whether nothing is to be left to a peer. Within the time a restart earns it one more try, and no second one.

    Bounded by the peers that are added: a host adds one in half a minute at most.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def __contains__(self, peer: object) -> bool:
        return isinstance(peer, str) and peer in self._entries and not self._entries[peer].restarted

    def add(self, peer: str, incarnation: int, now: float) -> None:
        """It did not take over. `incarnation`: as it is known, 0 if it is not."""
        again = peer in self._entries
        self._entries[peer] = _Entry(now + NO_HEIR_FOR, None if again else incarnation)

    def look(self, incarnations: Mapping[str, int], now: float) -> None:
        """Take notice of the time, and of the peers that are known, with their incarnations."""
        self._entries = {peer: entry for peer, entry in self._entries.items() if entry.until > now}
        for peer, entry in self._entries.items():
            if entry.incarnation is not None and incarnations.get(peer, 0) > entry.incarnation:
                entry.restarted = True

    def deadline(self) -> float | None:
        """When the time of the next one is over; `None` if there is none."""
        return min((entry.until for entry in self._entries.values()), default=None)

"""At which relays to keep a place, when to renew it, and where to go when one is lost. No clock: times are arguments.

Theory of operation
-------------------
Of the relays that are known, best first, `wanted` are held at a time, so that the loss of one costs nobody its way to us.
A place is renewed at half of its time; it is good until that has passed, whatever becomes of the attempts to renew it.

When one is lost, the next best is asked at once, and the lost one again after a pause: it may just be restarting. Pauses
double and have jitter (a relay that comes back should not meet all its clients at once). They stay short while less is
held than wanted, so that a relay that returns is used again within seconds, and are long otherwise. A relay that takes
its time does not hold up the others: after `patience` the next one is asked beside it.

py-libp2p 0.8.1 renews 30 s before the end, and asks without a pause when that fails (29,600 times a second, measured).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from libmesh.core.timers import INFINITY
from libmesh.peers import PeerId

MAX_RELAYS = 16
"""Relays that are considered; those after the first ones are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationConfig:
    """How reservations are kept. Times in seconds.

    Attributes:
        wanted: places held at a time. Two survive the loss of either; each costs one connection.
        patience: how long one relay is waited for before the next one is asked, too.
        retry_min: first pause after a failure; doubling.
        retry_short: longest pause while less is held than wanted.
        retry_long: longest pause otherwise.
        shortest: a place that a relay grants for less than this counts as one for so long, so that a relay cannot make
            us ask without end.
    """

    wanted: int = 2
    patience: float = 1.5
    retry_min: float = 0.5
    retry_short: float = 3.0
    retry_long: float = 60.0
    shortest: float = 20.0


@dataclass(frozen=True, slots=True)
class SetRelays:
    """These relays are known from now on, best first; none to hold no place at all."""

    relays: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Reserved:
    """The relay granted a place for so many seconds, or renewed it."""

    relay: PeerId
    lasts: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The relay was not reached, or refused."""

    relay: PeerId


@dataclass(frozen=True, slots=True)
class Lost:
    """The last connection to the relay has ended, and with it any place there."""

    relay: PeerId


@dataclass(frozen=True, slots=True)
class Wake:
    """A deadline has come."""


Event = SetRelays | Reserved | Failed | Lost | Wake


@dataclass(frozen=True, slots=True)
class Ask:
    """Connect to the relay if need be and ask it for a place. Answer with `Reserved` or `Failed`, once."""

    relay: PeerId


@dataclass(frozen=True, slots=True)
class Held:
    """These are the relays at which a place is held now, best first."""

    relays: tuple[PeerId, ...]


Effect = Ask | Held


@dataclass(slots=True)
class _Relay:
    rank: int
    asked: float = -INFINITY  # when it was asked, while it has not answered
    asking: bool = False
    failures: int = 0
    next_try: float = -INFINITY
    renew: float = INFINITY
    ends: float = -INFINITY  # of the place that is held


class Reservations:
    """The places of one peer. See the module."""

    def __init__(self, config: ReservationConfig | None = None, *, rng: random.Random) -> None:
        self._config = config or ReservationConfig()
        self._rng = rng
        self._relays: dict[PeerId, _Relay] = {}
        self._told: tuple[PeerId, ...] = ()

    @property
    def held(self) -> tuple[PeerId, ...]:
        """Where a place is held, as last told by `Held`."""
        return self._told

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in an event and say what is to be done. Events of relays that are not known any more are ignored."""
        match event:
            case SetRelays(relays):
                self._set(relays)
            case Reserved(relay, lasts) if (entry := self._relays.get(relay)) is not None:
                lasts = max(lasts, self._config.shortest)
                if entry.ends > -INFINITY:  # a relay that only grants and drops us is no success
                    entry.failures = 0
                entry.asking, entry.next_try = False, -INFINITY
                entry.ends, entry.renew = now + lasts, now + lasts / 2
            case Failed(relay) if (entry := self._relays.get(relay)) is not None:
                entry.asking = False
                self._pause(entry, now)
            case Lost(relay) if (entry := self._relays.get(relay)) is not None:
                if entry.ends > -INFINITY and not entry.asking:
                    self._pause(entry, now)
                entry.ends, entry.renew = -INFINITY, INFINITY
            case _:
                pass
        return self._settle(now)

    def deadline(self) -> float | None:
        """When to send `Wake`."""
        times = [INFINITY]
        free = self._short_of()
        for entry in self._relays.values():
            if entry.ends > -INFINITY:
                times += [entry.ends] if entry.asking else [entry.ends, max(entry.renew, entry.next_try)]
            elif entry.asking:
                times.append(entry.asked + self._config.patience if entry.asked > -INFINITY else INFINITY)
            elif free:
                times.append(entry.next_try)
        earliest = min(times)
        return None if earliest == INFINITY else earliest

    def _set(self, relays: Sequence[PeerId]) -> None:
        wanted = list(dict.fromkeys(relays))[:MAX_RELAYS]
        self._relays = {relay: self._relays.get(relay) or _Relay(0) for relay in wanted}
        for rank, entry in enumerate(self._relays.values()):
            entry.rank = rank

    def _pause(self, entry: _Relay, now: float) -> None:
        config = self._config
        entry.failures += 1
        pause = min(config.retry_min * 2.0 ** min(entry.failures - 1, 16), config.retry_long)
        if self._short_of() or entry.ends > -INFINITY:
            pause = min(pause, config.retry_short)
        entry.next_try = now + pause * self._rng.uniform(0.75, 1.25)

    def _short_of(self) -> int:
        """How many relays more would have to be asked now."""
        busy = sum(
            entry.ends > -INFINITY or (entry.asking and entry.asked > -INFINITY)
            for entry in self._relays.values()
        )
        return max(0, self._config.wanted - busy)

    def _settle(self, now: float) -> list[Effect]:
        """Let what is over be over, drop what is too much, and ask whom there is reason to ask."""
        effects: list[Effect] = []
        for entry in self._relays.values():
            if entry.ends <= now:
                entry.ends, entry.renew = -INFINITY, INFINITY
            if entry.asking and entry.asked + self._config.patience <= now:
                entry.asked = -INFINITY  # does not count any more
        self._drop_spare()
        for relay, entry in self._relays.items():
            if entry.asking or entry.next_try > now:
                continue
            if entry.renew <= now or (entry.ends == -INFINITY and self._short_of()):
                entry.asking, entry.asked = True, now
                effects.append(Ask(relay))
        held = tuple(relay for relay, entry in self._relays.items() if entry.ends > -INFINITY)
        if held != self._told:
            self._told = held
            effects.append(Held(held))
        return effects

    def _drop_spare(self) -> None:
        held = [entry for entry in self._relays.values() if entry.ends > -INFINITY]
        for entry in held[self._config.wanted :]:
            entry.ends, entry.renew = -INFINITY, INFINITY

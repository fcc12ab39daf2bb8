"""Which gossip messages came already. In place of py-libp2p's cache.

That one starts a thread with each host and never ends it (measured: 300 hosts opened and closed, 300 threads left), and
keeps as many messages as come within its time.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

SEEN_TIME = 120.0
"""Seconds since it last came for which a message is known again; py-libp2p's own."""

MAX_SEEN = 65536
"""Messages remembered, some 10 MiB. When full, the one that came longest ago is forgotten."""


class SeenMessages:
    """The interface of py-libp2p's `LastSeenCache`, as far as pubsub and gossipsub use it."""

    def __init__(
        self, *, lasts: float = SEEN_TIME, most: int = MAX_SEEN, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lasts, self._most, self._clock = lasts, most, clock
        self._last: OrderedDict[bytes, float] = OrderedDict()

    def add(self, key: bytes) -> bool:
        """Remember `key`; whether it is new."""
        is_new = not self.has(key)
        if is_new:
            self._last[key] = self._clock()
            if len(self._last) > self._most:
                self._last.popitem(last=False)
        return is_new

    def has(self, key: bytes) -> bool:
        """Whether `key` came within the last seconds. If so, it is remembered for longer."""
        now = self._clock()
        while self._last and next(iter(self._last.values())) <= now - self._lasts:
            self._last.popitem(last=False)
        if key not in self._last:
            return False
        self._last[key] = now
        self._last.move_to_end(key)
        return True

    def length(self) -> int:
        """How many are remembered."""
        return len(self._last)

    def stop(self) -> None:
        """Nothing runs here."""

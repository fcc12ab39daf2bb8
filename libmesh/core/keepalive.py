"""When to ping, how far away the peer is, and when it must be taken for dead. No clock: times are arguments."""

from __future__ import annotations

_SOON = 3
"""Pings that are a second apart at first: one that meets a connection being set up measures that, not the path."""

_LATE = 1.0
"""Seconds after its time from which a call of `tick` shows that we stood still ourselves: what has come meanwhile is unread."""


class Keepalive:
    """Pings on a schedule and judges the answers.

    A peer is dead when nothing at all has come from it for `timeout` after a ping. An answer that stays out while
    other bytes come is a slow peer, or one whose answer waits behind bulk; that costs a measurement, not the
    connection.

    Attributes:
        heard_at: when the last sign of life came.
        rtt: smoothed round-trip time in seconds (RFC 6298, gain 1/8), `None` until the first answer.
        least_rtt: the shortest one seen: the path itself, without what waits in buffers.
    """

    def __init__(self, *, interval: float, timeout: float, now: float) -> None:
        self._interval = interval
        self._timeout = timeout
        self.heard_at = now
        self._opaque = 0
        self._sent: float | None = None
        self._next = now
        self._soon = _SOON
        self.rtt: float | None = None
        self.least_rtt: float | None = None

    def heard(self, now: float) -> None:
        """The peer gave a sign of life."""
        self.heard_at = now

    def check(self, now: float) -> None:
        """Let the next ping be due now, unless one is under way."""
        if self._sent is None:
            self._next = now

    def deadline(self) -> float:
        """When `tick` has something to do."""
        return self._next if self._sent is None else min(self._next, self._sent + self._timeout)

    def tick(self, now: float) -> int | None:
        """The number to ping with, if a ping is due. Afterwards `deadline` is later than `now`."""
        if self._sent is not None and now >= self._sent + self._timeout:
            if self._late(now):
                self._next = now
            self._sent = None
        if now < self._next:
            return None
        self._soon -= 1
        self._next = now + (self._interval if self._soon <= 0 else min(self._interval, 1.0))
        if self._sent is not None:
            return None
        self._opaque = (self._opaque + 1) & 0xFFFFFFFF
        self._sent = now
        return self._opaque

    def silence(self, now: float) -> float | None:
        """For how long the peer has been silent, if that is too long. To be asked before `tick`.

        Never if that is asked late: then the peer may have answered, and is pinged anew.
        """
        if self._sent is None or now < self._sent + self._timeout or self.heard_at > self._sent:
            return None
        return None if self._late(now) else now - self.heard_at

    def _late(self, now: float) -> bool:
        return self._sent is not None and now > self._sent + self._timeout + _LATE

    def answered(self, opaque: int, now: float) -> None:
        """The peer echoed a ping. Echoes of old ones, and of none, are ignored."""
        if self._sent is not None and opaque == self._opaque:
            sample = now - self._sent
            self.least_rtt = sample if self.least_rtt is None else min(self.least_rtt, sample)
            self.rtt = sample if self.rtt is None else self.rtt + (sample - self.rtt) / 8
            self._sent = None

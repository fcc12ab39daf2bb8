"""Whether a connection that is in use still gives signs of life, and when that is to be doubted.

A path may end in silence: a router forgets its flows, an address is another one now, a cable is pulled. What is sent
then is sent again and again by TCP, and pings ten seconds apart find out late. So whoever sends and hears nothing asks, and
who gets no answer soon has a reason to look for another way. It is no proof: three losses in a row look the same, so the
connection stays what it is until it is replaced.

The driver looks at each connection every `LOOK_EVERY` seconds. That costs what is sent and received nothing, and finds
a silent connection within two looks and its patience, the longer of `LEAST_PATIENCE` and `ROUND_TRIPS`. What was sent
between the last sign of life and the look that saw it is taken for answered: to count it, each side would have to ask
after the other's last word, for ever.
"""

from __future__ import annotations

from enum import Enum

LOOK_EVERY = 0.5
"""Seconds between looks."""

LEAST_PATIENCE = 0.5
"""Seconds after a question within which silence means nothing: the first retransmission comes after 0.2 s and a round trip."""

ROUND_TRIPS = 4
"""The same as round trips, where they are long."""

SILENT_FOR = 2.0
"""Seconds of silence after a question from which on a connection is given up, if there is another one; or twice
`ROUND_TRIPS`, where that is longer."""


class Seen(Enum):
    """What a look at a connection came to."""

    CALM = "nothing waits for an answer"
    ASK = "ask for a sign of life now"
    WAITING = "the question is on its way"
    DOUBTED = "there was no answer in time"


class Pulse:
    """What is known of the signs of life of one connection. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._heard_at = float("-inf")
        self._sent = 0
        self._asked_at: float | None = None
        self._waits_from = 0.0  # from when on the silence after the question counts

    def asked(self, now: float) -> None:
        """The peer is asked for a sign of life now, for whatever reason."""
        if self._asked_at is None:
            self._asked_at = self._waits_from = now

    def postpone(self, seconds: float) -> None:
        """This process did nothing for so long: what came meanwhile has not been seen yet.

        The question stays where it was: its answer may have come before that, and must not seem older than it.
        """
        self._waits_from += seconds

    def gone(self, *, rtt: float | None, now: float) -> bool:
        """Whether the silence is so long that another connection should have what goes on over this one."""
        patience = max(SILENT_FOR, 2 * ROUND_TRIPS * (rtt or 0.0))
        return self._asked_at is not None and now - self._waits_from >= patience

    def look(self, *, sent: int, heard_at: float, waiting: bool, rtt: float | None, now: float) -> Seen:
        """Look at the connection.

        Args:
            sent: how often anything was sent on it.
            heard_at: the last sign of life.
            waiting: whether the peer owes an answer, whatever was sent since.
            rtt: its round-trip time, if that is known.
            now: the time.
        """
        if heard_at > self._heard_at:
            self._heard_at, self._sent = heard_at, sent
            if self._asked_at is None or heard_at > self._asked_at:
                self._asked_at = None
                return Seen.CALM
        if self._asked_at is None:
            if sent == self._sent and not waiting:
                return Seen.CALM
            self._asked_at = self._waits_from = now
            return Seen.ASK
        patience = max(LEAST_PATIENCE, ROUND_TRIPS * (rtt or 0.0))
        return Seen.DOUBTED if now - self._waits_from >= patience else Seen.WAITING

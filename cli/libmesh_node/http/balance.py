"""Which server answers first: predicted from what each is known to do, with two random candidates compared. Pure.

Comparing two candidates drawn at random, and not all, keeps many nodes with the same picture from running to the same
server at once (M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from libmesh_node.http.wanted import Wanted
from libmesh_node.snapshot import Model, Server

SMOOTHING = 0.3
"""Weight of a new measurement."""

TYPICAL_TOKENS = 200
"""Tokens of an answer whose request says nothing; also the most that a stated limit counts for, as few are used up."""

UNKNOWN_SPEED = 20.0
"""Tokens per second of a server nobody has measured, where none has been."""

UNKNOWN_DISTANCE = 0.02
"""Seconds of a round trip to a peer that was not measured yet."""

FIRST_BYTE = 10.0
"""Seconds that any server has for the first byte of an answer, however short its line is: a model may have been paged out."""

MAX_TOLD_FIRST = 15.0
"""Seconds to a first token that are believed of a server as announced; one that tells of more is given no more time for it."""

SLOWEST = 1.0
"""Tokens per second that a server is believed to make at the least: no node announces less (`llama/load.py`)."""

MAX_TOLD_LINE = 16
"""Requests for each slot that are believed of a line as announced. Nodes take turns, so nobody waits for all of a longer one."""

UNPROVED = 600.0
"""Seconds for the first byte of a server of which nothing was measured here, whatever it announces: as long as the SDKs of
OpenAI and Anthropic wait, unless they are told otherwise."""

DOUBT = 4.0
"""A server has so many times longer than predicted before it is taken to hang: predictions are guesses."""

PROMPT_SPEED = 2.0
"""How many times faster than an answer a prompt is computed, at least: in batches, so rather 10 times on most machines."""

LONGEST_ANSWER = 4096
"""Tokens of an answer that comes as a whole and whose request says nothing, where the context is not known."""

FAILURES = 3
"""Failures in a row after which a server is left alone for a while."""

REST, MAX_REST = 2.0, 60.0
"""Seconds that a failing server is left alone, doubled with each further failure. Then one request may try."""


@dataclass(slots=True)
class _Known:
    """What is known of one server. Times in seconds."""

    first: float | None = None  # from a request to its first token, with an idle server
    speed: float | None = None  # tokens per second of one request
    failures: int = 0
    rests_until: float = 0.0
    probing: bool = False


class Seat:
    """One request's place at a server until the end of a `with` block, so that it is counted once and where it is."""

    def __init__(self, balance: Balance, server: Server) -> None:
        self._balance = balance
        self._server: Server | None = None
        self.move(server)

    def __enter__(self) -> Seat:
        return self

    def __exit__(self, *_: object) -> None:
        self.move(None)

    def move(self, server: Server | None) -> None:
        """Go on at another server, or at none for the moment."""
        if self._server is not None:
            self._balance.ends(self._server)
        self._server = server
        if server is not None:
            self._balance.begins(server)


@dataclass(slots=True)
class Balance:
    """Chooses servers and learns from how they did.

    Args:
        rng: for the draw of candidates.
    """

    rng: random.Random
    _known: dict[str, _Known] = field(default_factory=dict)
    _in_flight: Counter[str] = field(default_factory=Counter)

    def choose(
        self,
        servers: Iterable[Server],
        tried: Collection[str],
        wanted: Wanted,
        now: float,
        warm: str | None = None,
        backlog: int | None = None,
    ) -> Server | None:
        """The server for the next try; `None` when none is left that has not been `tried` (base URLs).

        `warm` is a peer that has the prompt's beginning; it is taken unless it is full and another is not. Servers
        whose context the request cannot fit are left out, unless it fits none: then the server says so best; likewise those
        not known to take its tools or pictures. So are servers that keep failing, while there are others; and so are those
        that have all slots busy and `backlog` requests waiting besides, if that is given.
        """
        left = [server for server in servers if server.base_url not in tried]
        left = [server for server in left if self._fits(server, wanted)] or left
        left = [server for server in left if can(server, wanted)] or left
        left = [server for server in left if self._is_up(server, now)] or left
        if backlog is not None:
            left = [server for server in left if not self.is_full(server, backlog)] or left
        if not left:
            return None
        favourite = next((server for server in left if server.peer == warm), None)
        if favourite is not None:
            full = self.load(favourite) >= favourite.slots
            if not full or all(self.load(server) >= server.slots for server in left):
                return favourite
        drawn = left if len(left) <= 2 else self.rng.sample(left, 2)
        costs = [self.cost(server, wanted, left) for server in drawn]
        best = min(costs)
        return self.rng.choice([server for server, cost in zip(drawn, costs, strict=True) if cost == best])

    def cost(self, server: Server, wanted: Wanted, among: Sequence[Server]) -> float:
        """Seconds until `server` would have answered, as predicted."""
        known = self._known.get(server.base_url, _Known())
        speed = known.speed or server.speed or self._usual_speed(among)
        tokens = min(wanted.max_tokens if wanted.max_tokens is not None else TYPICAL_TOKENS, TYPICAL_TOKENS)
        alone = (known.first or server.first or 0.0) + max(tokens, 1) / speed
        return alone * (1 + self.load(server) / max(server.slots, 1)) + 2 * _distance(server)

    def first_byte_limit(self, server: Server, wanted: Wanted) -> float:
        """Seconds after which a request to `server`, in flight already, would be better off at another one.

        By its line, as announced or as it is from here, the rates that are known of it, and the prompt's length. What is only
        announced counts within bounds, so that no lie keeps a server from being taken to hang.
        """
        known = self._known.get(server.base_url, _Known())
        speed, slots = known.speed or server.speed or UNKNOWN_SPEED, max(server.slots, 1)
        speed = max(speed, SLOWEST)
        told = min(server.busy, MAX_TOLD_LINE * slots)
        line = max(self.in_flight.get(server.base_url, 0), told)
        ahead = max(line - slots, 0) * TYPICAL_TOKENS / slots
        own = wanted.prompt_tokens / PROMPT_SPEED
        if not wanted.streams:
            most = wanted.max_tokens
            own += most if most is not None else server.context_length or LONGEST_ANSWER
        first = max(known.first or 0.0, min(server.first or 0.0, MAX_TOLD_FIRST))
        limit = FIRST_BYTE + DOUBT * (first + (ahead + own) / speed + 2 * _distance(server))
        is_proved = known.first is not None or known.speed is not None
        return limit if is_proved else min(limit, UNPROVED)

    def load(self, server: Server) -> int:
        """Requests under way at `server`: ours, or more if it told of more."""
        return max(self.in_flight.get(server.base_url, 0), server.busy)

    def is_full(self, server: Server, backlog: int) -> bool:
        """Whether this node has all slots of `server` busy and `backlog` requests waiting besides.

        What other nodes have there does not count: the server's node lets all have their share (`door.py`), and whoever
        held back because of the others would get nothing while they ask for more.
        """
        return self.in_flight.get(server.base_url, 0) >= server.slots + backlog

    def has_room(self, servers: Iterable[Server], backlog: int, now: float) -> bool:
        """Whether one of `servers` is not full; those that are left alone count only if there are no others."""
        present = list(servers)
        up = [server for server in present if self._is_up(server, now)] or present
        return any(not self.is_full(server, backlog) for server in up)

    @property
    def in_flight(self) -> Mapping[str, int]:
        """Requests under way from this node by base URL; servers with none are left out."""
        return self._in_flight

    # ── what happened ────────────────────────────────────────────────────────────────────────────────────────────

    def seat(self, server: Server) -> Seat:
        """Count one request at `server`, or wherever its seat moves, until the end of a `with` block."""
        return Seat(self, server)

    def begins(self, server: Server) -> None:
        """A request is sent to `server`; to be followed by one `ends`."""
        self._in_flight[server.base_url] += 1
        known = self._known.get(server.base_url)
        if known is not None and known.failures >= FAILURES:
            known.probing = True

    def ends(self, server: Server) -> None:
        """A request to `server` is over, whatever came of it: also if its client left, so another may try."""
        self._in_flight[server.base_url] -= 1
        if self._in_flight[server.base_url] <= 0:
            del self._in_flight[server.base_url]
        if (known := self._known.get(server.base_url)) is not None:
            known.probing = False

    def failed(self, server: Server, now: float) -> None:
        """`server` could not be reached, or broke off."""
        known = self._of(server)
        known.failures += 1
        known.probing = False
        if known.failures >= FAILURES:
            known.rests_until = now + min(REST * 2.0 ** min(known.failures - FAILURES, 16), MAX_REST)

    def answered(self, server: Server, *, first: float | None = None, speed: float | None = None) -> None:
        """`server` answered: seconds to its first token, and tokens per second, where they were measured."""
        known = self._of(server)
        known.failures, known.probing, known.rests_until = 0, False, 0.0
        if first is not None:
            known.first = _smooth(known.first, first)
        if speed is not None and speed > 0:
            known.speed = _smooth(known.speed, speed)

    def forget(self, present: Collection[str]) -> None:
        """Drop what is known of servers that are gone (`present`: base URLs that are there)."""
        for url in [url for url in self._known if url not in present and url not in self._in_flight]:
            del self._known[url]

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _of(self, server: Server) -> _Known:
        return self._known.setdefault(server.base_url, _Known())

    def _is_up(self, server: Server, now: float) -> bool:
        known = self._known.get(server.base_url)
        return known is None or known.failures < FAILURES or (now >= known.rests_until and not known.probing)

    @staticmethod
    def _fits(server: Server, wanted: Wanted) -> bool:
        return not server.context_length or wanted.prompt_tokens < server.context_length

    def _usual_speed(self, servers: Sequence[Server]) -> float:
        nothing = _Known()
        told = [self._known.get(server.base_url, nothing).speed or server.speed for server in servers]
        speeds = sorted(speed for speed in told if speed)
        return speeds[len(speeds) // 2] if speeds else UNKNOWN_SPEED


def can(what: Server | Model, wanted: Wanted) -> bool:
    """Whether a server, or a model that has none now, is known to take what a request brings besides text."""
    return (what.tools or not wanted.tools) and (what.vision or not wanted.vision)


def _distance(server: Server) -> float:
    """Seconds of a round trip."""
    if server.local:
        return 0.0
    return UNKNOWN_DISTANCE if server.rtt is None else server.rtt


def _smooth(before: float | None, new: float) -> float:
    return new if before is None else before + SMOOTHING * (new - before)

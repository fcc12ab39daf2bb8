"""Can others reach this node, and at which addresses? What is believed of what others saw, and whom to ask to try.

Theory of operation
-------------------
Peers that we dialled tell what address they saw us come from. One may lie or be behind the same router, so an IP is
believed once `quorum` peers have named it (or all there are, if fewer). A believed IP with our own port is a *candidate*, as
is each mapping that a router gave us, each public address of our own, and each that a person announces.

Whether a candidate works is found out by asking a peer to dial it afresh (AutoNAT v2); the driver counts only
a dial that really arrived with our nonce, so nobody can talk us into an address that does not work. A refusal to help is
no verdict. A verdict is *settled* once `quorum` peers agree (or all there are). Settled candidates are looked at again after
`recheck`; unsettled ones after a pause that doubles from `retry_min` to `retry_max`, or at once when something changed.

Peers that see us at a private address are near us and cannot tell how we look from afar: they are neither believed nor
asked. `now` is in seconds, from a clock that never jumps.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from libmesh.core.timers import INFINITY
from libmesh.core.ways import ip_of
from libmesh.peers import PeerId

MAX_OBSERVERS = 32
"""Peers whose word on our address is kept; the oldest goes first."""

MAX_CANDIDATES = 8
"""Addresses that are looked at; the last sources' are left out."""


class Standing(Enum):
    """What is known of reaching this node from afar without help."""

    UNKNOWN = "unknown"
    PUBLIC = "public"
    PRIVATE = "private"


class Nat(Enum):
    """What becomes of our source ports on the way out. `KEEPS` makes hole punching work, `CHANGES` mostly prevents it."""

    UNKNOWN = "unknown"
    NONE = "none"
    KEEPS = "keeps ports"
    CHANGES = "changes ports"


class Source(Enum):
    """Why an address is a candidate, in the order in which they are told to others."""

    ANNOUNCED = "announced"
    OWN = "own"
    MAPPED = "mapped"
    SEEN = "seen"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachConfig:
    """Times in seconds.

    Attributes:
        quorum: peers that must agree, where there are as many.
        recheck: between looks at a settled candidate. Mappings and leases rarely last under an hour.
        retry_min, retry_max: between looks at one that is not settled.
        answer_limit: after which a peer that was asked is taken not to answer.
    """

    quorum: int = 2
    recheck: float = 900.0
    retry_min: float = 2.0
    retry_max: float = 300.0
    answer_limit: float = 30.0


@dataclass(frozen=True, slots=True)
class HereIs:
    """This node listens at `port`, has the addresses `own`, and was told to announce `announced`: multiaddrs."""

    port: int
    own: tuple[str, ...]
    announced: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MappedAre:
    """Routers forward these multiaddrs to us now, as far as they say."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """`peer` saw us as `ip`, `port`. `local_port`: where that connection leaves from; `None` if the peer made it."""

    peer: PeerId
    ip: str
    port: int
    local_port: int | None


@dataclass(frozen=True, slots=True)
class Gone:
    """There is no direct connection to `peer` any more."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Answered:
    """`peer` was asked to dial `address`: it arrived, it could not, or (`None`) it would not."""

    peer: PeerId
    address: str
    reached: bool | None


@dataclass(frozen=True, slots=True)
class Moved:
    """The network may be another one: whatever was settled is not any more, and old observations count no longer."""


@dataclass(frozen=True, slots=True)
class Wake:
    """`deadline()` has come."""


Event = HereIs | MappedAre | Seen | Gone | Answered | Moved | Wake


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask `peer` to dial `address`, and report with `Answered`."""

    peer: PeerId
    address: str


@dataclass(frozen=True, slots=True)
class Changed:
    """`addresses()` or `standing` are others now."""


Effect = Ask | Changed


@dataclass(slots=True)
class _Candidate:
    address: str
    source: Source
    verdicts: dict[PeerId, bool] = field(default_factory=dict)  # since the last that disagreed; newest last
    settled: bool | None = None
    next: float = 0.0
    pause: float = 0.0
    asking: PeerId | None = None
    give_up: float = INFINITY


class Reachability:
    """What one node knows of how others reach it.

    Args:
        config: numbers and times.
        rng: draws pauses and whom to ask.
    """

    def __init__(self, config: ReachConfig, *, rng: random.Random) -> None:
        self._config, self._rng = config, rng
        self._here = HereIs(0, ())
        self._mapped: tuple[str, ...] = ()
        self._seen: dict[PeerId, Seen] = {}
        self._candidates: dict[str, _Candidate] = {}
        self._told: tuple[tuple[str, ...], Standing] = ((), Standing.UNKNOWN)

    # ── what is known ────────────────────────────────────────────────────────────────────────────────────────────

    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs to tell others, besides our interfaces' own: mapped ones unless disproved, seen ones once proved."""
        return tuple(
            c.address
            for c in self._candidates.values()
            if c.settled or (c.source in (Source.MAPPED, Source.ANNOUNCED) and c.settled is None)
        )

    def guesses(self) -> tuple[str, ...]:
        """Where a hole punch may meet us: our port at each IP that anybody far away saw, whether it is open or not."""
        ips = dict.fromkeys(seen.ip for seen in reversed(self._seen.values()))
        return tuple(self._at_port(ip) for ip in ips)

    def verdicts(self) -> tuple[tuple[str, Source, bool | None], ...]:
        """Each candidate, why it is one, and whether it can be reached; `None`: not known yet."""
        return tuple((c.address, c.source, c.settled) for c in self._candidates.values())

    @property
    def standing(self) -> Standing:
        """Whether others reach us from afar."""
        settled = [candidate.settled for candidate in self._candidates.values()]
        if any(settled):
            return Standing.PUBLIC
        if self._seen and settled and None not in settled:
            return Standing.PRIVATE
        return Standing.UNKNOWN

    @property
    def nat(self) -> Nat:
        """What becomes of our ports."""
        own = {ip_of(address) for address in self._here.own}
        if any(ip_of(self._at_port(seen.ip)) in own for seen in self._seen.values()):
            return Nat.NONE
        outgoing = [seen for seen in self._seen.values() if seen.local_port is not None]
        if not outgoing:
            return Nat.UNKNOWN
        return Nat.KEEPS if all(seen.port == seen.local_port for seen in outgoing) else Nat.CHANGES

    @property
    def observed(self) -> tuple[str, ...]:
        """IPs that others saw us come from, the most often named first."""
        ips = [seen.ip for seen in self._seen.values()]
        return tuple(sorted(set(ips), key=lambda ip: (-ips.count(ip), ip)))

    def deadline(self) -> float | None:
        """When `handle` wants to hear `Wake`; `None`: not before something else happens."""
        waiting = [c.give_up if c.asking else c.next for c in self._candidates.values()]
        at = min(waiting, default=INFINITY) if self._seen else INFINITY
        return None if at == INFINITY else at

    # ── what happens ─────────────────────────────────────────────────────────────────────────────────────────────

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in what happened; return what to do."""
        match event:
            case HereIs():
                self._here = event
            case MappedAre(addresses):
                self._mapped = addresses
            case Seen():
                self._see(event, now)
            case Gone(peer):
                self._gone(peer)
            case Answered(peer, address, reached):
                self._answered(peer, address, reached, now)
            case Moved():
                self._seen.clear()
                for candidate in self._candidates.values():
                    candidate.verdicts.clear()
                    candidate.settled = None
                    self._hurry(candidate, now)
            case Wake():
                for candidate in self._candidates.values():
                    if candidate.asking is not None and candidate.give_up <= now:
                        self._answered(candidate.asking, candidate.address, None, now)
        self._refresh(now)
        asks = self._ask(now)
        told = (self.addresses(), self.standing)
        if told == self._told:
            return asks
        self._told = told
        return [Changed(), *asks]

    def _see(self, event: Seen, now: float) -> None:
        ip = ip_of(self._at_port(event.ip))
        if ip is None or not ip.is_global:
            return
        if event.peer not in self._seen:
            for candidate in self._candidates.values():
                if candidate.settled is None:  # somebody new to ask
                    self._hurry(candidate, now)
        self._seen.pop(event.peer, None)
        self._seen[event.peer] = event
        if len(self._seen) > MAX_OBSERVERS:
            self._gone(next(iter(self._seen)))

    def _gone(self, peer: PeerId) -> None:
        self._seen.pop(peer, None)
        for candidate in self._candidates.values():
            if candidate.asking == peer:
                candidate.asking, candidate.give_up = None, INFINITY

    def _answered(self, peer: PeerId, address: str, reached: bool | None, now: float) -> None:
        candidate = self._candidates.get(address)
        if candidate is None or candidate.asking != peer:
            return
        candidate.asking, candidate.give_up = None, INFINITY
        if reached is not None:
            if reached not in candidate.verdicts.values():
                candidate.verdicts.clear()
            candidate.verdicts.pop(peer, None)
            candidate.verdicts[peer] = reached
            if len(candidate.verdicts) >= self._needed:
                candidate.settled = reached
                candidate.pause = 0.0
                candidate.next = now + self._config.recheck * self._rng.uniform(0.75, 1.25)
                candidate.verdicts = {peer: reached}
                return
            if any(other not in candidate.verdicts for other in self._seen):
                candidate.next = now
                return
        config = self._config
        candidate.pause = min(max(candidate.pause * 2, config.retry_min), config.retry_max)
        candidate.next = now + candidate.pause * self._rng.uniform(0.75, 1.25)

    # ── what is done ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _needed(self) -> int:
        return max(1, min(self._config.quorum, len(self._seen)))

    @staticmethod
    def _hurry(candidate: _Candidate, now: float) -> None:
        candidate.next, candidate.pause = min(candidate.next, now), 0.0

    def _refresh(self, now: float) -> None:
        """Make the candidates those that they should be now; what is known of those that stay is kept."""
        wanted: dict[str, Source] = {}
        for address, source in self._sources():
            wanted.setdefault(address, source)
        known = self._candidates
        self._candidates = {}
        for address, source in list(wanted.items())[:MAX_CANDIDATES]:
            candidate = known.get(address) or _Candidate(address, source, next=now)
            candidate.source = source
            self._candidates[address] = candidate

    def _sources(self) -> Iterable[tuple[str, Source]]:
        if not self._here.port:
            return
        for address in self._here.announced:
            yield address, Source.ANNOUNCED
        for address in self._here.own:
            ip = ip_of(address)
            if ip is not None and ip.is_global:
                yield address, Source.OWN
        for address in self._mapped:
            yield address, Source.MAPPED
        for ip_text in self.observed:
            if sum(seen.ip == ip_text for seen in self._seen.values()) >= self._needed:
                yield self._at_port(ip_text), Source.SEEN

    def _at_port(self, ip: str) -> str:
        return f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{self._here.port}"

    def _ask(self, now: float) -> list[Effect]:
        asks: list[Effect] = []
        busy = {candidate.asking for candidate in self._candidates.values()}
        for candidate in self._candidates.values():
            if candidate.asking is not None or candidate.next > now:
                continue
            free = [peer for peer in self._seen if peer not in busy]
            fresh = [peer for peer in free if peer not in candidate.verdicts]
            if not free:
                candidate.next = now + self._config.retry_min
                continue
            candidate.asking = self._rng.choice(fresh or free)
            candidate.give_up = now + self._config.answer_limit
            busy.add(candidate.asking)
            asks.append(Ask(candidate.asking, candidate.address))
        return asks

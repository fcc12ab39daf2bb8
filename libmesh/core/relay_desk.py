"""What a relay grants: places for peers to be reached at, and circuits between peers. Decides; moves no bytes.

Theory of operation
-------------------
A peer that cannot be dialled asks for a *reservation*; then others may ask for *circuits* to it. A reservation ends when
it is not renewed in time, or with the peer's last connection to the relay.

Whoever has no reservation and whoever may not be reached look the same to the one who asks, so a relay cannot be used to
find out who is behind it. Each circuit is a thing of its own: that one ends means nothing for another one, also between
the same two peers (py-libp2p 0.8.1 keys them by peer, and the first one that ends takes the rest along).

When all circuits are taken, the peer that asked for most of them gives up its newest one to somebody who has at least two
fewer. So one peer that opens all it can is left with what the others do not want. Refusing it at a fixed share instead
would waste the relay while nobody else is there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum

from libmesh.core.ranges import check_counts, check_numbers
from libmesh.peers import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """What a relay gives at most. The defaults suit a machine of two cores that relays for one mesh.

    Attributes:
        reservations: peers that can be reached through the relay at a time. When full, further ones are refused.
        reservation_time: seconds that a reservation holds without being renewed. Clients renew at half of it.
        circuits: at a time, in all. When full, fair shares; see the module.
        circuits_per_peer: from one peer, and to one peer. Further ones are refused.
        pending_per_peer: circuits that one peer has asked for and that are not answered yet. Further ones are refused.
        duration: seconds that a circuit may last; 0 for ever. Then it is reset.
        data: bytes that a circuit may carry in each direction; 0 without limit. Then it is reset.
        bandwidth: bytes a second, all circuits together, both directions counted; 0 without limit. When spent, those
            who have something to send take turns, peer by peer.
        bandwidth_per_peer: the same for all circuits that one peer asked for.
    """

    reservations: int = 1024
    reservation_time: float = 3600.0
    circuits: int = 1024
    circuits_per_peer: int = 256
    pending_per_peer: int = 16
    duration: int = 0
    data: int = 0
    bandwidth: float = 0.0
    bandwidth_per_peer: float = 0.0

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the field, when a value cannot work."""
        check_counts(self, "reservations", "circuits", "circuits_per_peer", "pending_per_peer")
        check_numbers(self, "duration", "data", "bandwidth", "bandwidth_per_peer", zero=True)
        check_numbers(self, "reservation_time")
        if self.reservation_time < 10:
            raise ValueError(f"reservation_time must be at least 10, not {self.reservation_time}")


class Refusal(Enum):
    """Why something was not granted."""

    NOT_REACHABLE = "there is no reservation, or none that the asker may know of"
    FULL = "there is no room"


@dataclass(frozen=True, slots=True)
class Circuit:
    """A way through the relay, from `source`, who asked for it, to `target`, who has a reservation."""

    number: int
    source: PeerId
    target: PeerId


@dataclass(frozen=True, slots=True)
class Granted:
    """The circuit that was asked for, and one that has to end to make room for it."""

    circuit: Circuit
    evicted: Circuit | None = None


class RelayDesk:
    """The books of one relay. Times are seconds of any one clock."""

    def __init__(self, limits: RelayLimits) -> None:
        self._limits = limits
        self._reservations: dict[PeerId, float] = {}
        self._circuits: dict[int, Circuit] = {}
        self._pending: Counter[PeerId] = Counter()
        self._from: Counter[PeerId] = Counter()
        self._to: Counter[PeerId] = Counter()
        self._next_number = 0

    @property
    def reservations(self) -> int:
        """How many peers have a place, those included whose time has passed and who were not asked for since."""
        return len(self._reservations)

    @property
    def circuits(self) -> tuple[Circuit, ...]:
        """All that stand, oldest first."""
        return tuple(self._circuits.values())

    def reserve(self, peer: PeerId, now: float) -> float | Refusal:
        """Keep a place for `peer`, or renew it. When it will end."""
        held = self._reservations
        if peer not in held and len(held) >= self._limits.reservations:
            for other in [other for other, ends in held.items() if ends <= now]:
                del held[other]
            if len(held) >= self._limits.reservations:
                return Refusal.FULL
        held[peer] = now + self._limits.reservation_time
        return held[peer]

    def gone(self, peer: PeerId) -> None:
        """The last connection to `peer` has ended, and its reservation with it."""
        self._reservations.pop(peer, None)

    def ask(self, source: PeerId, target: PeerId, now: float) -> Refusal | None:
        """Whether the target may be asked for a circuit from `source`. If so (`None`), say `settle` or `grant` next."""
        if self._reservations.get(target, now) <= now or source == target:
            self._reservations.pop(target, None)
            return Refusal.NOT_REACHABLE
        limits = self._limits
        if (
            self._pending[source] >= limits.pending_per_peer
            or self._from[source] >= limits.circuits_per_peer
            or self._to[target] >= limits.circuits_per_peer
            or (len(self._circuits) >= limits.circuits and self._greedy(source) is None)
        ):
            return Refusal.FULL
        self._pending[source] += 1
        return None

    def settle(self, source: PeerId) -> None:
        """What `source` had asked for came to nothing."""
        self._pending[source] -= 1
        if not self._pending[source]:
            del self._pending[source]

    def grant(self, source: PeerId, target: PeerId) -> Granted | Refusal:
        """The target agreed: book the circuit, or refuse it after all if others were faster. Ends the asking."""
        self.settle(source)
        evicted = None
        if len(self._circuits) >= self._limits.circuits:
            evicted = self._greedy(source)
            if evicted is None:
                return Refusal.FULL
            self.end(evicted)
        self._next_number += 1
        circuit = self._circuits[self._next_number] = Circuit(self._next_number, source, target)
        self._from[source] += 1
        self._to[target] += 1
        return Granted(circuit, evicted)

    def end(self, circuit: Circuit) -> None:
        """The circuit is over. Harmless to repeat."""
        if self._circuits.pop(circuit.number, None) is None:
            return
        for counts, peer in ((self._from, circuit.source), (self._to, circuit.target)):
            counts[peer] -= 1
            if not counts[peer]:
                del counts[peer]

    def _greedy(self, source: PeerId) -> Circuit | None:
        """The circuit that has to make room for one from `source`, if there is one in fairness."""
        most, count = max(self._from.items(), key=lambda item: item[1])
        if count < self._from[source] + 2:
            return None
        return next(c for c in reversed(self._circuits.values()) if c.source == most)

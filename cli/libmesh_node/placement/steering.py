"""When to change a placement that works: rarely.

Every change costs a load, so a better placement must be better by a margin and stay so for a while. One that has broken is
replaced at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from libmesh_node.placement.splitting import Placement, Shortage


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringConfig:
    """How rarely.

    Attributes:
        margin: part by which a placement must be predicted faster than the running one. Predictions are that good.
        patience: seconds for which it must be, the same one or another. Longer than a peer's restart.
        settle: seconds for which a placement must be the same, so that it is not made in the middle of a join. Two that are
            alike may take turns at being the best for ever.
    """

    margin: float = 0.2
    patience: float = 30.0
    settle: float = 1.0

    def __post_init__(self) -> None:
        if self.margin < 0 or self.patience < 0 or self.settle < 0:
            raise ValueError("margin, patience and settle must not be negative")


@dataclass(frozen=True, slots=True)
class Looked:
    """The view was looked at: `best` is what an election gives, `running` the running placement's speed now.

    `running` is `None` when it is broken, or when there is none. `lives`: broken as it seems, it has not ended, and may go
    on: one of its members is silent, but what was said to it waits. It ends by itself if that lasts.
    """

    best: Placement | Shortage
    running: float | None
    lives: bool = False


@dataclass(frozen=True, slots=True)
class Broken:
    """The running placement has ended by itself."""


@dataclass(frozen=True, slots=True)
class Adopt:
    """Make this one the running placement."""

    placement: Placement


@dataclass(frozen=True, slots=True)
class Abandon:
    """There is none any more. `why` says what is missing."""

    why: str


Event = Looked | Broken
Effect = Adopt | Abandon


class Steering:
    """Decides for one model. After `Adopt` the placement counts as running until `Broken` or the next effect."""

    def __init__(self, config: SteeringConfig | None = None) -> None:
        self._config = config or SteeringConfig()
        self.current: Placement | None = None
        self._wanted: Placement | None = None
        self._since = self._better_since = 0.0

    def deadline(self) -> float | None:
        """When to look again at the latest; `None` if only news matter."""
        if self._wanted is None:
            return None
        return self._due()

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take notice. A `Looked` is due whenever the view changed, and at the deadline."""
        match event:
            case Broken():
                self.current = self._wanted = None
                return []
            case Looked(best=Shortage() as shortage, running=running, lives=lives):
                self._wanted = None
                if self.current is None or running is not None or lives:
                    return []
                self.current = None
                return [Abandon(str(shortage))]
            case Looked(best=Placement() as best, running=running):
                return self._weigh(best, running, now)
        return []

    def _weigh(self, best: Placement, running: float | None, now: float) -> list[Effect]:
        if self.current is not None and running is None:  # broken: whatever is best now, at once
            return self._adopt(best)
        enough = (running or 0.0) * (1 + self._config.margin)
        if self.current is not None and (same(best, self.current) or best.tokens_per_second < enough):
            self._wanted = None
            return []
        if self._wanted is None:
            self._better_since = now
        if self._wanted is None or not same(best, self._wanted):
            self._wanted, self._since = best, now
        return self._adopt(best) if now >= self._due() else []

    def _due(self) -> float:
        same_for = self._since + self._config.settle
        return same_for if self.current is None else max(same_for, self._better_since + self._config.patience)

    def _adopt(self, best: Placement) -> list[Effect]:
        self.current, self._wanted = best, None
        return [Adopt(best)]


def same(one: Placement, other: Placement) -> bool:
    """Whether two placements put the same layers on the same machines."""

    def layers(placed: Placement) -> list[tuple[str, int]]:
        return [(share.peer, share.layers) for share in (*placed.workers, placed.home)]

    return layers(one) == layers(other)

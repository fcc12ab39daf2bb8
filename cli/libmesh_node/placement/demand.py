"""Which standby takes which model: what the mesh asks for, and the same choice on every node that knows the same. Pure.

Each node counts the requests that came in at itself and tells of them in its own row. What the mesh asks for is the sum over
the rows of the living: nothing is merged and nothing counted for ever, so the demand of a node that is gone goes with it.
A row is whatever its announcement says, which may be old or a lie: it can misplace models, never raise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b

MAX_MODELS = 64
"""Models whose requests a node counts. When full, the least asked for is forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandConfig:
    """When models move. Seconds, unless said otherwise.

    Attributes:
        window: time in which the count of a request falls to 1/e. Longer is calmer, shorter follows faster.
        busy: requests per server, in the window, from which on a model may get one more.
        contrast: times that this must be what the coldest model has per server, of those that are asked for.
        queue: requests that wait, per server, from which on it may get one more whatever the others have.
        idle: requests in the window below which a model counts as not asked for.
        settle: how long a model must be seen unserved before it is taken, so that no restart or join is mistaken for it.
        patience: how long a served one must be seen too busy. A crowd that leaves sooner is not worth a load.
        rest: after a node has taken a model it takes no other for so long, unless nobody serves that and it has room;
            and for as long a model that it could not load is not its concern.
    """

    window: float = 60.0
    busy: float = 10.0
    contrast: float = 3.0
    queue: float = 4.0
    idle: float = 0.5
    settle: float = 1.0
    patience: float = 15.0
    rest: float = 120.0

    def __post_init__(self) -> None:
        for name in ("window", "busy", "contrast", "queue", "idle", "settle", "patience", "rest"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, not {value}")
        if self.window == 0:
            raise ValueError("window must be greater than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One node, as it announces itself. Models are named by their digests.

    Attributes:
        asked: its own requests in its window. queued: those of them that wait.
        wants: models that its operator named: the mesh wants them always, and it never drops them itself.
        serves: models that it serves or is loading.
        has: models on its disk, and the bytes of memory that each takes.
        spare: bytes of memory that no model takes.
        standby: whether it takes what is wanted.
        rests: whether it has just taken something.
        refused: models that it could not load lately.
    """

    peer: str
    asked: Mapping[str, float] = field(default_factory=dict)
    queued: Mapping[str, int] = field(default_factory=dict)
    wants: frozenset[str] = frozenset()
    serves: frozenset[str] = frozenset()
    has: Mapping[str, int] = field(default_factory=dict)
    spare: int = 0
    standby: bool = True
    rests: bool = False
    refused: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Take:
    """Serve `model`, after dropping `drops`. `urgent`: nobody serves it."""

    model: str
    drops: tuple[str, ...] = ()
    urgent: bool = False


class Window:
    """Counts a node's own requests, each of which weighs less with time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._counts: dict[str, tuple[float, float]] = {}

    def add(self, model: str, now: float, requests: int = 1) -> None:
        """Requests came."""
        self._counts[model] = (self._count(model, now) + requests, now)
        if len(self._counts) > MAX_MODELS:
            others = (name for name in self._counts if name != model)
            del self._counts[min(others, key=lambda name: (self._count(name, now), name))]

    def forget(self, model: str) -> None:
        """As if none had ever come for it."""
        self._counts.pop(model, None)

    def told(self, now: float) -> dict[str, float]:
        """What to announce: in steps of 1, 1.5, 2, 3, 4, 6 and so on, so that it seldom changes; without the idle."""
        steps = {model: _step(self._count(model, now)) for model in sorted(self._counts)}
        return {model: step for model, step in steps.items() if step}

    def _count(self, model: str, now: float) -> float:
        count, since = self._counts.get(model, (0.0, now))
        return count * math.exp(-max(now - since, 0.0) / self._seconds)


def _step(count: float) -> float:
    if count < 0.5:
        return 0.0
    power = 2.0 ** math.floor(math.log2(max(count, 1.0)))
    return power * (1.0 if count < power * 1.25 else 1.5 if count < power * 1.75 else 2.0)


class _Mesh:
    """The rows added up."""

    def __init__(self, rows: Iterable[Row], config: DemandConfig) -> None:
        self.rows = sorted(rows, key=lambda row: row.peer)
        self.config = config
        self.asked: Counter[str] = Counter()
        self.queued: Counter[str] = Counter()
        self.servers: Counter[str] = Counter()
        self.named: set[str] = set()
        for row in self.rows:
            for model, count in row.asked.items():
                self.asked[model] += max(count, 0.0) if math.isfinite(count) else 0.0  # type: ignore[assignment]
            for model, waiting in row.queued.items():
                self.queued[model] += max(waiting, 0)
            self.servers.update(row.serves)
            self.named |= row.wants

    def per_server(self, model: str, change: int = 0) -> float:
        """Requests for each server of a model, if it had so many more."""
        servers = self.servers[model] + change
        return self.asked[model] / servers if servers > 0 else math.inf

    def is_idle(self, model: str) -> bool:
        return self.asked[model] < self.config.idle and model not in self.named

    def unserved(self) -> list[str]:
        """Models that are wanted and that nobody serves, the most asked for first."""
        models = {*self.asked, *self.named}
        found = [model for model in models if not self.servers[model] and not self.is_idle(model)]
        return sorted(found, key=lambda model: (-self.asked[model], model))

    def busy(self) -> list[str]:
        """Models that need one more server, the busiest first."""
        served = [model for model in sorted(self.servers) if self.servers[model]]
        found = [model for model in served if self._is_busy(model, served)]
        return sorted(found, key=lambda model: (-self.per_server(model), model))

    def _is_busy(self, model: str, served: list[str]) -> bool:
        if self.queued[model] >= self.config.queue * self.servers[model]:
            return True
        each = self.per_server(model)
        # One that nobody asks for would make all others look hot, until every standby is taken.
        others = [other for other in served if other != model and self.asked[other] >= self.config.idle]
        coldest = min(map(self.per_server, others), default=0.0)
        return each >= self.config.busy and each >= self.config.contrast * coldest


def choose_moves(rows: Iterable[Row], config: DemandConfig) -> dict[str, Take]:
    """Who takes what, by peer: at most one model each, and one more server for each model that needs one.

    Nodes with room go before those that must drop something; among equals those with fewer other wanted models on their
    disks, so that these find somebody, too; then a hash of model and peer, so that not all models go to one node.
    """
    mesh = _Mesh(rows, config)
    moves: dict[str, Take] = {}
    unserved = mesh.unserved()
    for model in [*unserved, *mesh.busy()]:
        urgent = mesh.servers[model] == 0
        offers: list[tuple[bool, float, int, bytes, str, tuple[str, ...]]] = []
        for row in mesh.rows:
            drops = None if row.peer in moves else _drops(mesh, row, model, urgent)
            if drops is not None:
                lost = sum(mesh.asked[dropped] for dropped in drops)
                others = sum(other in row.has for other in unserved if other != model)
                offers.append((bool(drops), lost, others, _rank(model, row.peer), row.peer, drops))
        if offers:
            *_, peer, drops = min(offers)
            moves[peer] = Take(model, drops, urgent)
            mesh.servers[model] += 1
            mesh.servers.subtract(drops)
    return moves


def _rank(model: str, peer: str) -> bytes:
    return blake2b(f"{model}\0{peer}".encode(errors="replace"), digest_size=8).digest()


def _drops(mesh: _Mesh, row: Row, model: str, urgent: bool) -> tuple[str, ...] | None:
    """What a node would have to drop to serve `model`; `None` if it cannot, or had better not."""
    need = row.has.get(model)
    if need is None or not row.standby or model in row.serves or model in row.refused:
        return None
    if need <= row.spare:
        return () if urgent or not row.rests else None
    if row.rests:
        return None
    free, drops = row.spare, []
    can_go = [held for held in row.serves if held not in row.wants and held in row.has]
    for held in sorted(can_go, key=lambda held: (mesh.per_server(held), held)):
        if not _can_spare(mesh, held, model, urgent):
            continue
        drops.append(held)
        free += row.has[held]
        if need <= free:
            return tuple(drops)
    return None


def _can_spare(mesh: _Mesh, held: str, model: str, urgent: bool) -> bool:
    """Whether one server of `held` may become one of `model`. If so, the reverse would not be wanted afterwards."""
    if mesh.is_idle(held):
        return True
    if mesh.servers[held] < 2:
        return False
    return urgent or mesh.per_server(held, -1) < mesh.per_server(model, +1)


@dataclass(frozen=True, slots=True)
class Asked:
    """Requests for `model` came in at this node, from clients of its own."""

    model: str
    requests: int = 1


@dataclass(frozen=True, slots=True)
class Looked:
    """The rows of this node and of all that are alive. Due whenever one changed, and at the deadline."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Settled:
    """What a `Take` asked for is done, or was not possible."""

    model: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """What was served here after a `Take` cannot be kept running."""

    model: str


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The requests for `model` shall count no more."""

    model: str


Event = Asked | Looked | Settled | Failed | Forgotten


class Demand:
    """One node's part: counts, and takes what falls to it. After `Take` nothing more until `Settled`."""

    def __init__(self, me: str, config: DemandConfig | None = None) -> None:
        self._me = me
        self._config = config or DemandConfig()
        self._window = Window(self._config.window)
        self._pending: Take | None = None
        self._since = 0.0
        self._taking = ""
        self._rests_until = -math.inf
        self._refused: dict[str, float] = {}

    def announced(self, row: Row, now: float) -> Row:
        """This node's row with what it is to tell of demand: its counts, whether it rests, what it could not load."""
        refused = frozenset(model for model, until in self._refused.items() if now < until)
        return replace(row, asked=self._window.told(now), rests=now < self._rests_until, refused=refused)

    def deadline(self) -> float | None:
        """When to look again at the latest; `None` if only news matter."""
        if self._taking:
            return None
        due = [] if self._pending is None else [self._due(self._pending)]
        if math.isfinite(self._rests_until):
            due.append(self._rests_until)
        return min([*due, *self._refused.values()], default=None)

    def handle(self, event: Event, now: float) -> list[Take]:
        """Take notice; at most one `Take`."""
        match event:
            case Asked(model, requests):
                self._window.add(model, now, requests)
            case Forgotten(model):
                self._window.forget(model)
            case Settled(model, failed):
                self._taking = ""
                if failed:
                    self._refuse(model, now)
            case Failed(model):
                self._refuse(model, now)
            case Looked(rows):
                return self._look(rows, now)
        return []

    def _refuse(self, model: str, now: float) -> None:
        self._refused[model] = now + self._config.rest
        if len(self._refused) > MAX_MODELS:
            del self._refused[min(self._refused, key=lambda name: (self._refused[name], name))]

    def _look(self, rows: tuple[Row, ...], now: float) -> list[Take]:
        if self._taking:
            return []
        self._refused = {model: until for model, until in self._refused.items() if now < until}
        if now >= self._rests_until:
            self._rests_until = -math.inf
        present = [self.announced(row, now) if row.peer == self._me else row for row in rows]
        move = choose_moves(present, self._config).get(self._me)
        if move != self._pending:
            self._pending, self._since = move, now
        if move is None or now < self._due(move):
            return []
        self._pending, self._taking = None, move.model
        self._rests_until = now + self._config.rest
        return [move]

    def _due(self, move: Take) -> float:
        return self._since + (self._config.settle if move.urgent else self._config.patience)

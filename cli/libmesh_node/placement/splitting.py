"""One host and the workers that it takes: nearest first, until there is enough.

A token passes through all layers in order, so its time is the sum of the machines' times, each the bytes of its weights by
its bandwidth, and of one round trip for each worker. More workers never make a model faster; they make it fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from libmesh_node.placement.machine import Machine, relayed_between, rtt_between, short, unique
from libmesh_node.placement.shape import ModelShape

OVERHEAD = 1.1
"""Memory for weights over their size, for what llama.cpp needs besides: the first mesh's rule."""

COMPUTE_BYTES = 96 << 20
"""Memory for a machine's compute buffers, on top of its share; batches of 512 in common models stay below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRules:
    """What the operator may change.

    Attributes:
        max_rtt: seconds; workers farther away are not taken. 80 ms is the first mesh's limit: a token waits that long
            for each worker.
        ratios: shares of the weights in the order of `Placement.members`; `None` follows memory.
        force: split although one machine would do.
        min_peers: wait for as many other nodes with the model.
    """

    max_rtt: float = 0.08
    ratios: tuple[float, ...] | None = None
    force: bool = False
    min_peers: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a peer was taken, and why or why not, in words."""

    peer: str
    taken: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one machine holds.

    Attributes:
        layers: how many, the last worker's or an accelerated host's including the output as one more.
        weights: bytes; `granted`: bytes of memory that go with them, cache and compute buffers included.
        rtt: seconds to the host; 0 for the host itself.
    """

    peer: str
    layers: int
    weights: int
    granted: int
    rtt: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A host alone, or with workers.

    Attributes:
        host: its peer id.
        home: the host's share. On a processor its layers are the first ones, on a GPU the last and the output.
        workers: in the order in which a token passes through them.
        tokens_per_second: predicted, for one request at a time.
        verdicts: of all machines but the host, by peer.
    """

    host: str
    home: Share
    workers: tuple[Share, ...]
    tokens_per_second: float
    verdicts: tuple[Verdict, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """The workers, then the host: the order of llama.cpp's devices, and of `--tensor-split`."""
        return (*(share.peer for share in self.workers), self.host)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Nobody can serve it now. `str` says what is missing."""

    needed: int
    have: int
    peers: int
    verdicts: tuple[Verdict, ...] = ()
    waiting: str = ""

    def __str__(self) -> str:
        if self.waiting:
            return self.waiting
        what = (
            f"need {_gb(self.needed)}, have {_gb(self.have)} from {self.peers} peer{'s' * (self.peers != 1)}"
        )
        refused = [
            f"peer {short(entry.peer)} refused: {entry.why}" for entry in self.verdicts if not entry.taken
        ]
        return "; ".join([what, *refused])


def needed(shape: ModelShape) -> int:
    """Bytes that the model takes, wherever it lies."""
    return int(shape.size * OVERHEAD) + shape.kv


def fits_alone(shape: ModelShape, machine: Machine) -> bool:
    """Whether one machine can hold all of it."""
    return not machine.excluded and machine.memory >= needed(shape)


def split_from(
    shape: ModelShape, host: Machine, others: Sequence[Machine], rules: SplitRules
) -> Placement | Shortage:
    """What `host` would do with `others`, who all have the same file. Alone if that is enough, and not forbidden."""
    ranked, verdicts = _rank(host, others, rules)
    need = needed(shape)
    taken: list[tuple[float, Machine]] = []
    memory = host.memory
    for rtt, machine in ranked:
        wanted = rules.ratios is not None and len(taken) < len(rules.ratios) - 1
        if memory >= need and not wanted and (taken or not rules.force):
            verdicts[machine.peer] = Verdict(machine.peer, False, f"not needed ({_ms(rtt)})")
            continue
        taken.append((rtt, machine))
        memory += machine.memory
        verdicts[machine.peer] = Verdict(machine.peer, True, f"{_ms(rtt)}, {_gb(machine.memory)}")
    told = tuple(verdict for _, verdict in sorted(verdicts.items()))
    if memory < need or (rules.force and not taken):
        return Shortage(needed=need, have=memory, peers=len(taken), verdicts=told)
    return replace(_share(shape, host, taken, rules), verdicts=told)


def _rank(
    host: Machine, others: Sequence[Machine], rules: SplitRules
) -> tuple[list[tuple[float, Machine]], dict[str, Verdict]]:
    """Who may be taken, nearest first, and why the others may not."""
    ranked: list[tuple[float, Machine]] = []
    verdicts: dict[str, Verdict] = {}
    for machine in unique(others).values():
        rtt = rtt_between(host, machine)
        if machine.excluded or not machine.lends:
            why = machine.excluded or "it lends nothing"
        elif relayed_between(host, machine):
            why = "reached over a relay only"
        elif rtt is None:
            why = "its distance is not known yet"
        elif rtt > rules.max_rtt:
            why = _ms(rtt)
        else:
            ranked.append((rtt, machine))
            continue
        verdicts[machine.peer] = Verdict(machine.peer, False, why)
    ranked.sort(key=lambda entry: (entry[0], entry[1].peer))
    return ranked, verdicts


def _share(
    shape: ModelShape, host: Machine, taken: Sequence[tuple[float, Machine]], rules: SplitRules
) -> Placement:
    """Hand out whole layers, in proportion to memory or as the operator said."""
    machines = [machine for _, machine in taken] + [host]
    if rules.ratios is not None and len(rules.ratios) == len(machines):
        weights = list(rules.ratios)
    else:
        weights = [float(machine.memory) for machine in machines]
    if not host.accelerated:  # the embeddings are in the host's memory already
        weights[-1] = max(0.0, weights[-1] - shape.input * OVERHEAD) if rules.ratios is None else weights[-1]
    order = [*range(len(machines))] if host.accelerated else [len(machines) - 1, *range(len(machines) - 1)]
    pieces = _pieces(shape)
    cut = cut_layers(
        [memory for memory, _, _ in pieces],
        [weights[at] for at in order],
        [machines[at].memory for at in order] if rules.ratios is None else None,
    )
    counts = [cut[order.index(at)] for at in range(len(machines))]
    shares, seconds = _filled(pieces, machines, counts, order)
    rtts = {machine.peer: rtt for rtt, machine in taken}
    seconds += sum(rtts.values())
    placed = [
        Share(
            peer=machine.peer,
            layers=count,
            weights=weights_bytes,
            granted=granted,
            rtt=rtts.get(machine.peer, 0.0),
        )
        for machine, count, (weights_bytes, granted) in zip(machines, counts, shares, strict=True)
    ]
    workers = tuple(share for share in placed[:-1] if share.layers)
    return Placement(
        host=host.peer, home=placed[-1], workers=workers, tokens_per_second=1 / seconds if seconds else 0.0
    )


_Piece = tuple[int, int, int]
"""A layer, or the output: bytes of memory, of weights, and of weights that a token touches."""


def _pieces(shape: ModelShape) -> list[_Piece]:
    layers = zip(shape.layers, shape.read, shape.kv_per_token, strict=True)
    pieces = [(int(size * OVERHEAD) + kv * shape.context, size, read) for size, read, kv in layers]
    return [*pieces, (int(shape.output * OVERHEAD), shape.output, shape.output)]


def cut_layers(sizes: Sequence[int], weights: Sequence[float], limits: Sequence[int] | None) -> list[int]:
    """How many of the pieces, in order, each machine gets, in order: sizes in proportion to `weights`.

    Each piece goes where its middle falls. With `limits`, bytes per machine, one that got too much gives pieces on to its
    neighbours, towards whoever has the most room; if it does not come out even so, the cut stays as it was.
    """
    whole, total, reached = sum(sizes) or 1, sum(weights) or 1.0, 0.0
    ends = []
    for weight in weights:
        reached += weight / total
        ends.append(reached)
    counts, position = [0] * len(weights), 0
    for size in sizes:
        middle = (position + size / 2) / whole
        counts[next((at for at, end in enumerate(ends) if middle < end), len(ends) - 1)] += 1
        position += size
    return counts if limits is None else _relieved(sizes, counts, limits)


def _relieved(sizes: Sequence[int], counts: list[int], limits: Sequence[int]) -> list[int]:
    changed = list(counts)
    for _ in range(len(sizes) * len(counts)):
        room = [limit - sum(sizes[a:b]) for limit, (a, b) in zip(limits, _spans(changed), strict=True)]
        full = next((at for at, left in enumerate(room) if left < 0 and changed[at]), None)
        if full is None:
            return changed
        below, above = sum(room[:full]), sum(room[full + 1 :])
        to = full - 1 if full and (below >= above or full == len(changed) - 1) else full + 1
        if not 0 <= to < len(changed):
            return counts
        changed[full] -= 1
        changed[to] += 1
    return counts


def _spans(counts: Sequence[int]) -> list[tuple[int, int]]:
    spans, at = [], 0
    for count in counts:
        spans.append((at, at + count))
        at += count
    return spans


def _filled(
    pieces: Sequence[_Piece], machines: Sequence[Machine], counts: Sequence[int], order: Sequence[int]
) -> tuple[list[tuple[int, int]], float]:
    """Weights and memory of each machine, and the seconds that all of them compute on one token."""
    result: dict[int, tuple[int, int]] = {}
    seconds = 0.0
    spans = _spans([counts[number] for number in order])
    for number, (start, end) in zip(order, spans, strict=True):
        mine = pieces[start:end]
        seconds += sum(read for _, _, read in mine) / machines[number].speed
        granted = sum(memory for memory, _, _ in mine) + (COMPUTE_BYTES if mine else 0)
        result[number] = sum(size for _, size, _ in mine), min(granted, machines[number].memory)
    return [result[number] for number in range(len(machines))], seconds


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e9:.2f} GB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"

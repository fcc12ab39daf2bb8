"""One host and the workers that it takes: nearest first, until there is enough.

A token passes through all layers in order, so its time is the sum of the machines' times, each the bytes of its weights by
its bandwidth, and of one round trip for each worker. More workers never make a model faster; they make it fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from libmesh_node.placement.machine import (
    Machine,
    memory_of,
    relayed_between,
    rtt_between,
    short,
    understands,
    unique,
)
from libmesh_node.placement.shape import ModelShape

OVERHEAD = 1.1
"""Memory for weights over their size, for what llama.cpp needs besides: the first mesh's rule."""

LINK_BANDWIDTH = 12.5e6
"""Bytes per second that a worker's answers are reckoned with: 100 Mbit/s, since nobody measures it."""

NAMED = 8
"""Peers that are named when something is missing, with what is wrong with each; `plan` names all."""


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
        kv_per_token: bytes of its part of the cache for one token.
        rtt: seconds to the host; 0 for the host itself.
    """

    peer: str
    layers: int
    weights: int
    granted: int
    kv_per_token: int = 0
    rtt: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A host alone, or with workers.

    Attributes:
        host: its peer id.
        home: the host's share. On a processor its layers are the first ones, on a GPU the last and the output.
        workers: in the order in which a token passes through them.
        logits_home: the output lies with the host, so that a worker sends an activation instead of a whole vocabulary.
        tokens_per_second: predicted, for one request at a time.
        verdicts: of all machines but the host, by peer.
    """

    host: str
    home: Share
    workers: tuple[Share, ...]
    tokens_per_second: float
    logits_home: bool = False
    verdicts: tuple[Verdict, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """The workers, then the host: the order of llama.cpp's devices, and of `--tensor-split`."""
        return (*(share.peer for share in self.workers), self.host)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Nobody can serve it now. `str` says what is missing. `given`: bytes that these have, but for splits of other models."""

    needed: int
    have: int
    peers: int
    verdicts: tuple[Verdict, ...] = ()
    waiting: str = ""
    given: int = 0

    def __str__(self) -> str:
        if self.waiting:
            return self.waiting
        what = (
            f"need {_gb(self.needed)}, have {_gb(self.have)} from {self.peers} peer{'s' * (self.peers != 1)}"
        )
        if self.given:
            what += f", where splits of other models have {_gb(self.given)}"
        refused = [
            f"peer {short(entry.peer)} refused: {entry.why}" for entry in self.verdicts if not entry.taken
        ]
        more = [f"and {len(refused) - NAMED} more"] if len(refused) > NAMED else []
        return "; ".join([what, *refused[:NAMED], *more])


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
    if ranked and (memory < need or rules.force or rules.ratios):
        memory -= min(shape.compute, memory)
    for rtt, machine in ranked:
        wanted = rules.ratios is not None and len(taken) < len(rules.ratios) - 1
        if memory >= need and not wanted and (taken or not rules.force):
            verdicts[machine.peer] = Verdict(machine.peer, False, f"not needed ({_ms(rtt)})")
            continue
        taken.append((rtt, machine))
        memory += max(0, machine.memory - shape.compute)
        verdicts[machine.peer] = Verdict(machine.peer, True, f"{_ms(rtt)}, {_gb(machine.memory)}")
    told = tuple(verdict for _, verdict in sorted(verdicts.items()))
    if memory < need or (rules.force and not taken):
        given = host.given + sum(machine.given for _, machine in taken)
        return Shortage(needed=need, have=memory, peers=len(taken), verdicts=told, given=given)
    placed = _share(shape, host, taken, rules)
    if heeds(rules, len(taken) + 1) and (full := _overfull(shape, placed, memory_of([host, *others]))):
        return Shortage(needed=need, have=memory, peers=len(taken), verdicts=told, waiting=full)
    return replace(placed, verdicts=told)


def heeds(rules: SplitRules, machines: int) -> bool:
    """Whether the operator's shares are for so many machines. With more or fewer, shares follow memory, rather than that nobody serves."""
    return rules.ratios is not None and len(rules.ratios) == machines


def _overfull(shape: ModelShape, placed: Placement, memory: Mapping[str, int]) -> str:
    """Who is given more than it has, in words; empty if nobody is. What llama.cpp needs besides is not reckoned."""
    for share in (*placed.workers, placed.home):
        least = share.weights + share.kv_per_token * shape.context
        if least > memory[share.peer]:
            given, has = _gb(least), _gb(memory[share.peer])
            return f"--tensor-split gives peer {short(share.peer)} {given} of the model, and it has {has}"
    return ""


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
        elif not understands(host, machine):
            ours = host.protocol or "none"
            why = f"it speaks llama.cpp's RPC protocol {machine.protocol}, its host would speak {ours}"
        elif rtt is None:
            why = "its distance is not known yet"
        elif rtt > rules.max_rtt:
            why = f"{_ms(rtt)}, over the limit of {_ms(rules.max_rtt)}"
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
    last = len(machines) - 1
    pieces, kept = _pieces(shape), _Piece(0, 0, 0, 0)
    logits_home = bool(taken) and not host.accelerated and _saves_time(shape, host, machines[last - 1])
    if logits_home:
        pieces[-1], kept = kept, pieces[-1]
    heeded = heeds(rules, len(machines))
    if heeded:
        weights = [*(rules.ratios or ())]
    else:
        weights = [float(machine.memory) for machine in machines]
        if not host.accelerated:  # what lies in its main memory anyway
            weights[last] = max(0.0, weights[last] - shape.input * OVERHEAD - kept.memory)
    order = [*range(len(machines))] if host.accelerated else [last, *range(last)]
    cut = cut_layers(
        [piece.memory for piece in pieces],
        [weights[at] for at in order],
        None if heeded else [machines[at].memory - shape.compute for at in order],
    )
    rtts = [*(rtt for rtt, _ in taken), 0.0]
    shares: dict[int, Share] = {}
    seconds = 0.0
    for at, (start, end) in zip(order, _spans(cut), strict=True):
        mine = [*pieces[start:end], *([kept] if at == last else ())]
        seconds += sum(piece.read for piece in mine) / machines[at].speed + (rtts[at] if end > start else 0.0)
        shares[at] = _share_of(machines[at], end - start, mine, shape.compute, rtts[at])
    workers = tuple(shares[at] for at in range(last) if shares[at].layers)
    return Placement(
        host=host.peer,
        home=shares[last],
        workers=workers,
        tokens_per_second=1 / seconds if seconds else 0.0,
        logits_home=logits_home and bool(workers),
    )


class _Piece(NamedTuple):
    """A layer, or the output: bytes of memory, of weights, of weights that a token touches, and of cache per token."""

    memory: int
    weights: int
    read: int
    kv_per_token: int


def _pieces(shape: ModelShape) -> list[_Piece]:
    layers = zip(shape.layers, shape.read, shape.kv_per_token, strict=True)
    pieces = [_Piece(int(size * OVERHEAD) + kv * shape.context, size, read, kv) for size, read, kv in layers]
    return [*pieces, _Piece(int(shape.output * OVERHEAD), shape.output, shape.output, 0)]


def _share_of(machine: Machine, layers: int, pieces: Sequence[_Piece], compute: int, rtt: float) -> Share:
    memory = sum(piece.memory for piece in pieces) + (compute if layers else 0)
    return Share(
        peer=machine.peer,
        layers=layers,
        weights=sum(piece.weights for piece in pieces),
        granted=min(memory, machine.memory),
        kv_per_token=sum(piece.kv_per_token for piece in pieces),
        rtt=rtt,
    )


def _saves_time(shape: ModelShape, host: Machine, worker: Machine) -> bool:
    """Whether the output is better computed by the host than its result fetched: f32 logits against one activation."""
    fetched = 4 * max(0, shape.vocabulary - shape.embedding_length) / LINK_BANDWIDTH
    return shape.output / host.speed < shape.output / worker.speed + fetched


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


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e9:.2f} GB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"

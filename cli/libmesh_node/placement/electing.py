"""The best placement among all who have the file: the same on every node that knows the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from libmesh_node.placement.machine import Machine, unique
from libmesh_node.placement.shape import ModelShape
from libmesh_node.placement.splitting import (
    Placement,
    Shortage,
    SplitRules,
    fits_alone,
    needed,
    split_from,
)


def elect(
    shape: ModelShape, machines: Iterable[Machine], rules: SplitRules | None = None
) -> Placement | Shortage:
    """The host that is predicted to be fastest, ties by peer id; or what is missing.

    A machine that fits the model alone wins over every split, as long as splitting is not forced: no round trips, and
    nothing that can break. Machines that are excluded are nobody's host and nobody's worker.
    """
    rules = rules or SplitRules()
    present = unique(machines)
    able = [machine for machine in present.values() if not machine.excluded]
    if len(able) - 1 < rules.min_peers:
        others = max(0, len(able) - 1)
        few = f"waiting for {rules.min_peers} peer{'s' * (rules.min_peers != 1)} with the model, there are {others}"
        return Shortage(
            needed=needed(shape),
            have=sum(machine.memory for machine in able),
            peers=others,
            waiting=few if rules.min_peers else "no node of the mesh has it, or may serve it",
        )
    alone = [machine for machine in able if fits_alone(shape, machine)]
    hosts = alone if alone and not rules.force else able
    outcomes = [
        split_from(shape, host, [m for m in present.values() if m is not host], rules) for host in hosts
    ]
    placements = [outcome for outcome in outcomes if isinstance(outcome, Placement)]
    if placements:
        return min(placements, key=lambda placed: (-placed.tokens_per_second, placed.host))
    shortages = [outcome for outcome in outcomes if isinstance(outcome, Shortage)]
    if not shortages:
        return Shortage(needed=needed(shape), have=0, peers=0)
    return max(shortages, key=lambda short: short.have)


def elect_at(
    me: str, shape: ModelShape, machines: Iterable[Machine], rules: SplitRules | None = None
) -> Placement | Shortage:
    """The election as it is held at the node `me`, which may know of refusals that nobody else knows.

    Whom all the others elect must do it: if it left it to another one because of what it knows alone, both would wait.
    """
    present = list(machines)
    if any(machine.private for machine in present):
        known = [replace(machine, excluded="") if machine.private else machine for machine in present]
        common = elect(shape, known, rules)
        if isinstance(common, Placement) and common.host == me:
            own = hosted_by(me, shape, present, rules)
            if own is not None:
                return own
    return elect(shape, present, rules)


def hosted_by(
    peer: str, shape: ModelShape, machines: Iterable[Machine], rules: SplitRules | None = None
) -> Placement | None:
    """What a node would host, elected or not; `None` if it cannot."""
    present = unique(machines)
    host = present.pop(peer, None)
    own = split_from(shape, host, list(present.values()), rules or SplitRules()) if host is not None else None
    return own if isinstance(own, Placement) else None


def predict(shape: ModelShape, placed: Placement, machines: Iterable[Machine]) -> float | None:
    """Tokens per second that a placement would have now; `None` if it cannot hold any more.

    A worker that has become slow or relayed is still a member while its stream lives; only the number changes.
    """
    present = unique(machines)
    if any(present.get(peer) is None or present[peer].excluded for peer in placed.members):
        return None
    host = present[placed.host]
    others = [present[share.peer] for share in placed.workers]
    lenient = SplitRules(max_rtt=float("inf"), force=bool(others))
    enough = [replace(machine, relayed=frozenset()) for machine in others]
    outcome = split_from(shape, replace(host, relayed=frozenset()), enough, lenient)
    return outcome.tokens_per_second if isinstance(outcome, Placement) else None

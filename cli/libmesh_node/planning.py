"""What `libmesh-node plan` answers: the placement of a model as it would be now, without doing it."""

from __future__ import annotations

from collections.abc import Sequence

from libmesh import PeerState, Scope, View
from libmesh_node.announced import decode_status
from libmesh_node.options import NodeOptions
from libmesh_node.placement.electing import elect
from libmesh_node.placement.machine import Machine, short
from libmesh_node.placement.shape import ModelShape
from libmesh_node.placement.splitting import Placement, SplitRules, heeds, needed

MAX_PROTOCOLS = 4
"""Versions of llama.cpp's RPC that a bystander makes a plan for, the most spoken ones; a mesh has one, or two in a change."""


def plan_json(
    name: str, shape: ModelShape, machines: Sequence[Machine], rules: SplitRules, me: str
) -> dict[str, object]:
    """The plan as the console answers it.

    `possible` tells whether there is a placement. `members` are in the order in which a token passes through them on a
    GPU host, the host last; on a processor the host's layers come first. Bytes and seconds, unless a name says otherwise.
    """
    outcome = elect(shape, machines, rules)
    plan: dict[str, object] = {
        "model": name,
        "digest": shape.digest,
        "size_bytes": shape.size,
        "needed_bytes": needed(shape),
        "possible": isinstance(outcome, Placement),
        "this_node": me,
        "peers": [
            {"peer": verdict.peer, "taken": verdict.taken, "why": verdict.why} for verdict in outcome.verdicts
        ],
    }
    if not isinstance(outcome, Placement):
        return {
            **plan,
            "missing": str(outcome),
            "members": [],
            "tokens_per_second": None,
            "host": None,
            "note": "",
        }
    members = [
        {
            "peer": share.peer,
            "role": "host" if share is outcome.home else "worker",
            "layers": share.layers,
            "weights_bytes": share.weights,
            "memory_bytes": share.granted,
            "rtt_ms": round(share.rtt * 1000, 2),
        }
        for share in (*outcome.workers, outcome.home)
    ]
    return {
        **plan,
        "missing": "",
        "members": members,
        "tokens_per_second": round(outcome.tokens_per_second, 2),
        "host": outcome.host,
        "note": unheeded(outcome, rules),
    }


def in_words(placement: Placement, rules: SplitRules) -> str:
    """For the log of the placement's host."""
    told = ", ".join(f"{short(share.peer)} ({share.layers} layers)" for share in placement.workers)
    what = f"split over this node ({placement.home.layers} layers) and {told}" if told else "alone"
    note = unheeded(placement, rules)
    return f"{what}; about {placement.tokens_per_second:.1f} tokens per second" + (
        f"; {note}" if note else ""
    )


def unheeded(placement: Placement, rules: SplitRules) -> str:
    """That the operator's shares do not count, and why; empty if they do, or none were given."""
    machines = 1 + sum(verdict.taken for verdict in placement.verdicts)
    if rules.ratios is None or heeds(rules, machines):
        return ""
    return f"--tensor-split has {len(rules.ratios)} shares for {machines} machines, so shares follow memory"


def protocols_of(digest: str, view: View) -> list[str]:
    """What those who may serve a model speak of llama.cpp's RPC, one of each major version, the most spoken first; `""` if none.

    For a node that has no llama.cpp itself: peers that are gone, or have not the file, say nothing about those that do.
    """
    spoken: dict[str, list[str]] = {}
    for peer in view.peers:
        status = decode_status(peer.attributes)
        there = peer.state in (PeerState.ALIVE, PeerState.SUSPECT) and peer.scope >= Scope.WORKER
        if there and status.rpc_protocol and any(model.digest == digest for model in status.models):
            spoken.setdefault(status.rpc_protocol.partition(".")[0], []).append(status.rpc_protocol)
    by_number = sorted(spoken.values(), key=len, reverse=True)
    return [max(versions) for versions in by_number[:MAX_PROTOCOLS]] or [""]


def likeliest(plans: Sequence[dict[str, object]]) -> dict[str, object]:
    """The fastest of several plans, each of those who can work together; the first if none is possible."""
    return max(plans, key=_speed)


def _speed(plan: dict[str, object]) -> float:
    speed = plan["tokens_per_second"]
    return speed if isinstance(speed, float) else 0.0


def rules_of(options: NodeOptions) -> SplitRules:
    """What the command line says of splits."""
    return SplitRules(
        max_rtt=options.max_rtt_ms / 1000,
        ratios=options.tensor_split or None,
        force=options.split,
        min_peers=options.min_peers,
    )

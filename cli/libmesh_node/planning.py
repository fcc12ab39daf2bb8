"""What `libmesh-node plan` answers: the placement of a model as it would be now, without doing it."""

from __future__ import annotations

from collections.abc import Sequence

from libmesh_node.options import NodeOptions
from libmesh_node.placement.electing import elect
from libmesh_node.placement.machine import Machine
from libmesh_node.placement.shape import ModelShape
from libmesh_node.placement.splitting import Placement, SplitRules, needed


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
        return {**plan, "missing": str(outcome), "members": [], "tokens_per_second": None, "host": None}
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
    }


def rules_of(options: NodeOptions) -> SplitRules:
    """What the command line says of splits."""
    return SplitRules(
        max_rtt=options.max_rtt_ms / 1000,
        ratios=options.tensor_split or None,
        force=options.split,
        min_peers=options.min_peers,
    )

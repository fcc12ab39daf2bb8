"""Machines and models for tables."""

from __future__ import annotations

from libmesh_node.placement.machine import Machine
from libmesh_node.placement.shape import ModelShape

GB = 10**9


def shape(
    layers: int = 40, layer: int = GB, *, output: int = 0, kv: int = 0, context: int = 4096
) -> ModelShape:
    return ModelShape(
        digest="ab" * 32,
        layers=(layer,) * layers,
        read=(layer,) * layers,
        kv_per_token=(kv,) * layers,
        input=0,
        output=output,
        embedding_length=4096,
        vocabulary=32000,
        context=context,
    )


def machine(peer: str, gb: float, rtt: float | None = 0.01, **others: object) -> Machine:
    """A machine that has measured the same time to everybody in a b c d e."""
    rtts = {} if rtt is None else {name: rtt for name in "abcde" if name != peer}
    return Machine(peer=peer, memory=int(gb * GB), rtts=rtts, **others)  # type: ignore[arg-type]

"""A node as placement sees it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

DEFAULT_BANDWIDTH = 20e9
"""Bytes per second of a machine that does not say: two channels of DDR4, less what is lost."""

DEFAULT_GPU_BANDWIDTH = 300e9
"""The same for a GPU whose driver does not tell, as AMD's: what a card of the middle class has."""

_VERSION = re.compile(r"(\d{1,3})\.(\d{1,3})\.", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One node that has the model's file.

    Attributes:
        peer: its id.
        memory: bytes that it offers for the model: what splits of other models have of it is not there.
        given: bytes that those have. held: bytes of `memory` that splits of this very model have now.
        bandwidth: of that memory, in bytes per second; 0 if it does not say.
        accelerated: that memory is a GPU's. A processor's is no device to llama-server when it is the host.
        lends: it may be a worker: it has the scope and a working rpc-server.
        rtts: seconds to other peers, as it measured them.
        relayed: peers that it reaches over a relay only.
        protocol: `major.minor.patch` that its llama.cpp speaks between host and worker; empty if it does not say.
        excluded: why it cannot take part, in words; empty if it can.
        private: only this node knows that it cannot, as it was refused; the others still reckon with it.
    """

    peer: str
    memory: int
    given: int = 0
    held: int = 0
    bandwidth: float = 0.0
    accelerated: bool = False
    lends: bool = True
    rtts: Mapping[str, float] = field(default_factory=dict)
    relayed: frozenset[str] = frozenset()
    protocol: str = ""
    excluded: str = ""
    private: bool = False

    @property
    def speed(self) -> float:
        """Bytes of weights per second."""
        return self.bandwidth or (DEFAULT_GPU_BANDWIDTH if self.accelerated else DEFAULT_BANDWIDTH)


def rtt_between(one: Machine, other: Machine) -> float | None:
    """Seconds: the mean of what both measured, or what one did; `None` if neither."""
    known = [rtt for rtt in (one.rtts.get(other.peer), other.rtts.get(one.peer)) if rtt is not None]
    return sum(known) / len(known) if known else None


def relayed_between(one: Machine, other: Machine) -> bool:
    """Whether either says that only a relay joins them."""
    return other.peer in one.relayed or one.peer in other.relayed


def understands(host: Machine, worker: Machine) -> bool:
    """Whether the host's llama.cpp takes the worker's: the same major version, and no newer minor one (ggml-rpc.cpp).

    One that speaks none, as a llama-server without an rpc-server beside it, takes nobody's.
    """
    ours, theirs = (_VERSION.match(machine.protocol) for machine in (host, worker))
    if theirs is None:
        return True
    return ours is not None and ours[1] == theirs[1] and int(theirs[2]) <= int(ours[2])


def memory_of(machines: Iterable[Machine]) -> dict[str, int]:
    """Bytes that each offers, by peer."""
    return {machine.peer: machine.memory for machine in machines}


def held_of(me: str, machines: Iterable[Machine], known: Mapping[str, int]) -> dict[str, int]:
    """Bytes that splits of the model have, by peer: those that the node `me` knows of, or what the others tell, if it is more."""
    told = {machine.peer: machine.held for machine in machines if machine.peer != me}
    return {peer: max(known.get(peer, 0), told.get(peer, 0)) for peer in {*known, *told}}


def short(peer: str) -> str:
    """A peer id's end, as people tell peers apart."""
    return peer[-8:]


def unique(machines: Iterable[Machine]) -> dict[str, Machine]:
    """By peer, sorted, so that the order of the view changes nothing."""
    return {machine.peer: machine for machine in sorted(machines, key=lambda machine: machine.peer)}

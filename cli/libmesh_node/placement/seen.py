"""From announcements to machines: what the view of the mesh means for placement. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from libmesh import PathKind, PeerState, PeerView, Scope, View
from libmesh_node.announced import MAX_DISTANCES, AnnouncedModel, Distance, NodeStatus, decode_status
from libmesh_node.placement.machine import Machine
from libmesh_node.placement.splitting import Placement, Share

SERVICE = "rpc"
"""The service of a node that lends its rpc-server, scope WORKER."""

_NOTABLE = 0.25  # part by which a distance must change to be told anew: everybody hears of it
_NOTABLE_SECONDS = 0.001
_BELIEVED = (PeerState.ALIVE, PeerState.SUSPECT)


def machines_with(
    digest: str, view: View, mine: NodeStatus, *, name: str, protocol: str, refused: Mapping[str, str]
) -> list[Machine]:
    """All nodes that announce the model, this one included, sorted by peer. Excluded are those with another file of its name.

    Args:
        digest: of the model.
        view: of the mesh.
        mine: what this node announces itself, so that it reckons with the same numbers as everybody else.
        name: what the model is called here.
        protocol: of this node's own llama.cpp, to tell who speaks another.
        refused: peers that have refused this node lately, and why.
    """
    lends = view.scope >= Scope.WORKER and bool(mine.rpc_protocol)
    own = _machine(view.me, mine, digest, lends=lends, why="")
    found = {view.me: own} if _has(mine, digest) else {}
    for peer in view.peers:
        if peer.state not in _BELIEVED:
            continue
        status = decode_status(peer.attributes)
        if _has(status, digest):
            why, known = _why_not(peer, status, protocol), refused.get(peer.peer, "")
            machine = _machine(peer.peer, status, digest, lends=_lends(peer, status), why=known or why)
            found[peer.peer] = replace(machine, private=bool(known) and not why)
        elif other := next((model for model in status.models if model.name == name), None):
            why = (
                f"it has another file named {name}" if other.digest else "its file is still being identified"
            )
            found[peer.peer] = _machine(peer.peer, status, digest, lends=False, why=why)
    return [found[peer] for peer in sorted(found)]


def host_elsewhere(digest: str, view: View) -> tuple[str, AnnouncedModel] | None:
    """The peer that serves the model now, the first by id if several do, and what it says of it."""
    for peer in view.peers:
        if peer.state in _BELIEVED and peer.scope >= Scope.WORKER:
            for model in decode_status(peer.attributes).models:
                if model.digest == digest and model.ready:
                    return peer.peer, model
    return None


def context_now(digest: str, view: View, mine: NodeStatus) -> int:
    """Tokens that a request for the model may have now, wherever it is served; 0 if it is not."""
    statuses = [mine] + [decode_status(peer.attributes) for peer in view.peers if peer.state in _BELIEVED]
    models = (model for status in statuses for model in status.models)
    return max(
        (model.context_length for model in models if model.digest == digest and model.ready), default=0
    )


def is_coming(host: str, digest: str, view: View) -> bool:
    """Whether a peer says that it will answer for the model soon."""
    return any(
        model.digest == digest and (model.coming or model.ready)
        for peer in view.peers
        if peer.peer == host and peer.state in _BELIEVED
        for model in decode_status(peer.attributes).models
    )


def is_there(peer: str, view: View) -> bool:
    """Whether it is this node, or a peer that is believed to be alive."""
    return peer == view.me or any(other.peer == peer and other.state in _BELIEVED for other in view.peers)


def placement_elsewhere(host: str, model: AnnouncedModel) -> Placement:
    """What another node says of its own split, as far as its members go."""

    def share(peer: str) -> Share:
        return Share(peer=peer, layers=0, weights=0, granted=0)

    return Placement(
        host=host, home=share(host), workers=tuple(map(share, model.workers)), tokens_per_second=0.0
    )


def distances(view: View, digests: Iterable[str], told: tuple[Distance, ...]) -> tuple[Distance, ...]:
    """How far the peers with one of these models are. What was told before stays until it is notably wrong.

    Also of a peer whose connection was lost and is being made again: nothing shall be placed anew for that. Sorted by peer;
    those whose time was never measured are left out.
    """
    wanted, before = frozenset(digests), {far.peer: far for far in told}
    found: list[Distance] = []
    for peer in view.peers:
        if peer.state not in _BELIEVED:
            continue
        if not any(model.digest in wanted for model in decode_status(peer.attributes).models if model.digest):
            continue
        old = before.get(peer.peer)
        if peer.path is None or peer.path.rtt is None:
            found += [] if old is None else [old]
            continue
        now = Distance(peer.peer, float(f"{peer.path.rtt:.2g}"), peer.path.kind is PathKind.RELAYED)
        found.append(old if old is not None and not _notable(old, now) else now)
    return tuple(found[:MAX_DISTANCES])


def _notable(old: Distance, now: Distance) -> bool:
    change = abs(now.rtt - old.rtt)
    return old.relayed != now.relayed or (change > _NOTABLE_SECONDS and change > _NOTABLE * old.rtt)


def _has(status: NodeStatus, digest: str) -> bool:
    return any(model.digest == digest for model in status.models)


def _lends(peer: PeerView, status: NodeStatus) -> bool:
    offered = any(service.name == SERVICE for service in peer.services)
    return peer.scope >= Scope.WORKER and offered and bool(status.rpc_protocol)


def _why_not(peer: PeerView, status: NodeStatus, protocol: str) -> str:
    if peer.scope < Scope.WORKER:
        return "its invite does not let it work for others"
    if status.rpc_protocol and status.rpc_protocol.split(".")[0] != protocol.split(".")[0]:
        return f"it speaks llama.cpp's RPC protocol {status.rpc_protocol}, this node {protocol or 'none'}"
    return ""


def _machine(peer: str, status: NodeStatus, digest: str, *, lends: bool, why: str) -> Machine:
    given = min(status.given(digest), status.spare_bytes)
    return Machine(
        peer=peer,
        memory=status.spare_bytes - given,
        given=given,
        held=sum(model.split_bytes for model in status.models if model.digest == digest),
        bandwidth=float(status.bandwidth),
        accelerated=status.accelerated,
        lends=lends,
        rtts={far.peer: far.rtt for far in status.distances},
        relayed=frozenset(far.peer for far in status.distances if far.relayed),
        protocol=status.rpc_protocol,
        excluded=why,
    )

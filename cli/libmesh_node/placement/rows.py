"""From announcements to rows: what the view of the mesh means for demand. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from libmesh import PeerState, Scope, View
from libmesh_node.announced import NodeStatus, OnDisk, decode_status
from libmesh_node.placement.demand import Row

_BELIEVED = (PeerState.ALIVE, PeerState.SUSPECT)


def rows_of(view: View, mine: NodeStatus) -> tuple[Row, ...]:
    """A row for this node, by `mine`, which is what it announces, and for each peer that is believed to be alive.

    Everybody may ask. What a peer serves and could serve counts only if its scope lets it work for others, as this node's
    does: nobody would send it a request.
    """
    return tuple(row_of(peer, status, works=works) for peer, status, works in _living(view, mine))


def _living(view: View, mine: NodeStatus) -> Iterator[tuple[str, NodeStatus, bool]]:
    """Peer, what it announces, and whether it may work for others; this node first."""
    yield view.me, mine, view.scope >= Scope.WORKER
    for peer in view.peers:
        if peer.state in _BELIEVED:
            yield peer.peer, decode_status(peer.attributes), peer.scope >= Scope.WORKER


def row_of(peer: str, status: NodeStatus, *, works: bool) -> Row:
    """What one node's announcement says of demand."""
    wishes = [wish for wish in status.wishes if wish.named or wish.requests or wish.waiting]
    served = (model for model in status.models if model.digest and (model.ready or model.coming))
    on_disk = status.on_disk if works else ()
    return Row(
        peer=peer,
        asked={wish.digest: wish.requests for wish in wishes if wish.requests},
        queued={wish.digest: wish.waiting for wish in wishes if wish.waiting},
        wants=frozenset(wish.digest for wish in wishes if wish.named),
        serves=frozenset(model.digest for model in served) if works else frozenset(),
        has={held.digest: held.needed_bytes for held in on_disk},
        spare=max(0, status.spare_bytes - status.given()) if works else 0,
        standby=bool(on_disk),
        rests=status.rests,
        refused=frozenset(held.digest for held in on_disk if held.refused),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asks:
    """What the mesh asks for one model; see `snapshot.Model` for the fields."""

    asked: float = 0.0
    waiting: int = 0
    wanted: bool = False
    coming: bool = False
    standbys: int = 0


def asks_of(view: View, mine: NodeStatus) -> dict[str, Asks]:
    """What the mesh asks for, by digest, as status shows it: the sum over the living."""
    found: dict[str, Asks] = {}
    for _, status, works in _living(view, mine):
        for wish in status.wishes:
            known = found.get(wish.digest, NOTHING)
            found[wish.digest] = replace(
                known,
                asked=known.asked + wish.requests,
                waiting=known.waiting + wish.waiting,
                wanted=known.wanted or wish.named,
            )
        for model in status.models:
            if model.coming and works:
                found[model.digest] = replace(found.get(model.digest, NOTHING), coming=True)
        for held in status.on_disk:
            if works and not held.refused:
                known = found.get(held.digest, NOTHING)
                found[held.digest] = replace(known, standbys=known.standbys + 1)
    return found


NOTHING = Asks()


def on_disks(view: View, mine: NodeStatus) -> tuple[OnDisk, ...]:
    """What this node and its peers would serve if it were asked for."""
    living = (status for _, status, works in _living(view, mine) if works)
    return tuple(held for status in living for held in status.on_disk if held.name and not held.refused)

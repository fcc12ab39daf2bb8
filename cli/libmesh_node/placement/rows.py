"""From announcements to rows: what the view of the mesh means for demand. Pure."""

from __future__ import annotations

from libmesh import PeerState, Scope, View
from libmesh_node.announced import NodeStatus, OnDisk, decode_status
from libmesh_node.placement.demand import Row

_BELIEVED = (PeerState.ALIVE, PeerState.SUSPECT)


def rows_of(view: View, mine: NodeStatus) -> tuple[Row, ...]:
    """A row for this node, by `mine`, which is what it announces, and for each peer that is believed to be alive.

    Everybody may ask. What a peer serves and could serve counts only if its scope lets it work for others, as this node's
    does: nobody would send it a request.
    """
    rows = [row_of(view.me, mine, works=view.scope >= Scope.WORKER)]
    for peer in view.peers:
        if peer.state in _BELIEVED:
            status = decode_status(peer.attributes)
            rows.append(row_of(peer.peer, status, works=peer.scope >= Scope.WORKER))
    return tuple(rows)


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
        spare=status.spare_bytes if works else 0,
        standby=bool(on_disk),
        rests=status.rests,
        refused=frozenset(held.digest for held in on_disk if held.refused),
    )


def kept_by(view: View) -> dict[str, OnDisk]:
    """What peers would serve if it were asked for, by name; the first peer by id wins where two disagree."""
    found: dict[str, OnDisk] = {}
    for peer in view.peers:
        if peer.state in _BELIEVED and peer.scope >= Scope.WORKER:
            for held in decode_status(peer.attributes).on_disk:
                if held.name and not held.refused:
                    found.setdefault(held.name, held)
    return found

"""From what the parts know to one `NodeSnapshot`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from libmesh import PeerId, PeerView, Reaching, View
from libmesh_node.announced import AnnouncedModel, NodeStatus, OnDisk, decode_status
from libmesh_node.placement.rows import NOTHING, Asks
from libmesh_node.snapshot import Address, Model, Peer, Reachability, Relay, Server

ModelsByName = Mapping[str, Sequence[tuple[AnnouncedModel, Server | None]]]


def node_status(*, client: bool, own: Sequence[AnnouncedModel], alone: bool, lends: bool = False) -> str:
    """The first mesh's word for what this node is doing."""
    if client:
        return "Client"
    if any(model.ready for model in own):
        return "Serving (split)" if all(model.workers for model in own if model.ready) else "Serving"
    if lends:
        return "Worker (split)"
    return "Idle" if alone or own else "Standby"


def server(
    model: AnnouncedModel, peer: PeerId, base_url: str, *, local: bool = False, rtt: float | None = None
) -> Server:
    """The server of a model that `peer` announces, answering at `base_url`."""
    return Server(
        peer=peer,
        base_url=base_url,
        local=local,
        slots=model.slots,
        rtt=rtt,
        digest=model.digest,
        context_length=model.context_length,
        speed=model.speed or None,
        busy=model.busy,
        first=model.first or None,
        tools=model.tools,
        vision=model.vision,
    )


Admissions = Callable[[PeerId], tuple[tuple[str, ...], int | None] | None]
"""`Mesh.admission_of`."""


def peers(view: View, admission_of: Admissions) -> tuple[Peer, ...]:
    """The other nodes, as status shows them, sorted by id: those that only follow us, too, but not the forgotten."""
    known = sorted((*view.peers, *view.followers), key=lambda entry: entry.peer)
    return tuple(_peer(entry, *(admission_of(entry.peer) or ((), None))) for entry in known)


def models(
    own: Sequence[tuple[AnnouncedModel, Server | None]],
    others: ModelsByName,
    on_disk: Iterable[OnDisk] = (),
    asks: Mapping[str, Asks] | None = None,
) -> tuple[Model, ...]:
    """All models that somebody serves, is about to serve, served a moment ago or could serve, sorted by name.

    A model that somebody could serve is left out where another one of the same name is served.
    """
    found: dict[str, list[tuple[AnnouncedModel, Server | None]]] = {}
    for model, server in own:
        found.setdefault(model.name, []).append((model, server))
    for name, entries in others.items():
        found.setdefault(name, []).extend(entries)
    present = frozenset(found)
    for held in on_disk:
        if held.name not in present:
            model = AnnouncedModel(
                name=held.name,
                digest=held.digest,
                size_bytes=held.size_bytes,
                context_length=held.context_length,
            )
            found.setdefault(held.name, []).append((model, None))
    return tuple(_model(name, entries, asks or {}) for name, entries in sorted(found.items()))


def _model(
    name: str, entries: Iterable[tuple[AnnouncedModel, Server | None]], asks: Mapping[str, Asks]
) -> Model:
    entries = sorted(entries, key=lambda entry: entry[1] is None)  # what is served is what the name means
    servers = sorted((server for _, server in entries if server is not None), key=lambda server: server.peer)
    digest = next((model.digest for model, _ in entries if model.digest), "")
    asked = asks.get(digest, NOTHING)
    return Model(
        name=name,
        digest=digest,
        size_bytes=max(model.size_bytes for model, _ in entries),
        context_length=max(model.context_length for model, _ in entries),
        servers=tuple(servers),
        asked=asked.asked,
        waiting=asked.waiting,
        wanted=asked.wanted,
        coming=asked.coming,
        standbys=asked.standbys,
        tools=any(model.tools for model, _ in entries),
        vision=any(model.vision for model, _ in entries),
    )


def _peer(entry: PeerView, invites: tuple[str, ...], expires_unix: int | None) -> Peer:
    status = decode_status(entry.attributes)
    serving = tuple(model.name for model in status.models if model.ready)
    return Peer(
        id=entry.peer,
        hostname=status.hostname,
        role=_role(status, bool(serving)),
        scope=entry.scope.name.lower(),
        state=entry.state.value,
        since_unix=round(entry.since_unix, 1),
        version=status.version,
        vram_gb=status.memory_bytes / 1e9,
        models=tuple(model.name for model in status.models),
        serving=serving,
        path=entry.path.kind.value if entry.path is not None else None,
        address=entry.path.address if entry.path is not None else "",
        rtt_ms=_milliseconds(entry.path.rtt if entry.path is not None else None),
        invites=invites,
        expires_unix=expires_unix,
        path_since_unix=round(entry.path.since_unix, 1) or None if entry.path is not None else None,
        why_not_direct=tuple(f"{attempt.way}: {attempt.reason}" for attempt in entry.path.attempts)
        if entry.path is not None
        else (),
    )


def reachability(reaching: Reaching | None) -> Reachability:
    """How others reach this node; `None`: it is in no mesh."""
    if reaching is None:
        return Reachability()
    return Reachability(
        standing=reaching.standing,
        nat=reaching.nat,
        observed=reaching.observed,
        addresses=tuple(
            Address(address=address, source=source, reachable=reachable)
            for address, source, reachable in reaching.addresses
        ),
        mapping=reaching.mapping,
        mapping_failure=reaching.mapping_failure,
        relays=tuple(
            Relay(
                id=relay.relay,
                address=relay.address,
                held=relay.held,
                rtt_ms=_milliseconds(relay.rtt),
                failure=relay.failure,
            )
            for relay in reaching.relays
        ),
    )


def _role(status: NodeStatus, serving: bool) -> str:
    if status.client:
        return "Client"
    return "Host" if serving else "Worker"


def _milliseconds(seconds: float | None) -> float | None:
    """To two digits: more would make every measurement a new snapshot."""
    return None if seconds is None else float(f"{seconds * 1000:.2g}")

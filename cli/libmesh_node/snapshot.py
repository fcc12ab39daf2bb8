"""What the HTTP side sees of the node: frozen values, swapped in whole by `bridge.py`.

The trio side builds a new `NodeSnapshot` whenever something changes; handlers in the HTTP thread read the newest one
and never wait for it. Everything here is immutable, so no lock is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One llama-server that this node can send requests to.

    Attributes:
        peer: peer id of the node that runs it; this node's own id if local.
        base_url: `http://127.0.0.1:PORT` of the server itself or of the local end of a tunnel to it. No slash.
        local: it runs on this machine's node, without a tunnel.
        slots: requests it answers at once.
        rtt: seconds to the peer, `None` if local or not yet measured.
        digest: of the weights that it has; empty while unknown.
        context_length: tokens that one request may use there; 0 if unknown.
        speed: tokens per second of one request, as its node announces; `None` if unknown.
        busy: requests that it answers or makes wait, as announced a moment ago, ours among them.
        first: seconds from a request's turn there to its first token, as its node announces; `None` if unknown.
        tools, vision: whether it takes tools, and pictures, as far as is known.
    """

    peer: str
    base_url: str
    local: bool
    slots: int = 1
    rtt: float | None = None
    digest: str = ""
    context_length: int = 0
    speed: float | None = None
    busy: int = 0
    first: float | None = None
    tools: bool = False
    vision: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that somebody in the mesh serves, wants or could serve.

    Attributes:
        name: what requests say in `model`.
        size_bytes: of the file.
        context_length: the largest among the servers, in tokens; 0 if unknown.
        servers: sorted by peer id; empty while nobody serves it.
        asked: requests of the last while, of the whole mesh; each weighs less with time.
        waiting: those of them that no server has yet; coarse.
        wanted: somebody's operator named it.
        coming: a server is being started, or will be as soon as a request waits.
        standbys: nodes that have it and would serve it if it were asked for.
        tools, vision: whether it takes tools, and pictures, as far as is known; also while it sleeps.
    """

    name: str
    digest: str
    size_bytes: int
    context_length: int
    servers: tuple[Server, ...] = ()
    asked: float = 0.0
    waiting: int = 0
    wanted: bool = False
    coming: bool = False
    standbys: int = 0
    tools: bool = False
    vision: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another node, as status shows it. Names follow `/api/status`; see `http/console.py` for their meaning."""

    id: str
    hostname: str
    role: str
    scope: str
    state: str
    since_unix: float
    version: str
    vram_gb: float
    models: tuple[str, ...]
    serving: tuple[str, ...]
    path: str | None
    address: str
    rtt_ms: float | None
    inflight: int = 0
    invites: tuple[str, ...] = ()  # ids of the invites that it came in by, from the mesh's key down
    expires_unix: int | None = None  # when its membership ends
    path_since_unix: float | None = None
    why_not_direct: tuple[str, ...] = ()  # of a relayed or punched path: each better way, and why it failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A llama.cpp process of this node. `status`: starting, loading, ready, restarting, failed or stopping.

    `failure` is the reason of the last exit, in words, while the process is not ready; empty otherwise.
    """

    name: str
    pid: int | None
    port: int
    model: str
    status: str
    restarts: int = 0
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A model that this node has a part in, or that lies in its folders.

    `status`: starting, loading, ready, restarting, failed or stopping, as its server's; unloading, while that finishes
    what it is answering; asleep, until it is asked for; waiting, for the nodes that it takes to serve it; on disk.
    `named`: the operator did, so the mesh wants it.
    """

    name: str
    digest: str
    size_bytes: int
    status: str
    named: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunnel:
    """A TCP forward that a person asked for. `direction`: `expose` or `connect`; `target` is HOST:PORT."""

    direction: str
    name: str
    target: str
    peer: str = ""
    port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    """An invite that this node made; not the token itself. Times in seconds since the epoch; `None` never ends."""

    id: str
    scope: str
    expires_unix: int | None
    created_unix: int
    revoked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A multiaddr at which this node may be reached. `source`: announced, own, mapped or seen; `None`: not known."""

    address: str
    source: str
    reachable: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """A relay that this node may be reached through. The words are those of `libmesh.RelayView`."""

    id: str
    address: str
    held: bool
    rtt_ms: float | None
    failure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reachability:
    """How others reach this node, as far as it knows. The words are those of `libmesh.Reaching`."""

    standing: str = "unknown"
    nat: str = "unknown"
    observed: tuple[str, ...] = ()
    addresses: tuple[Address, ...] = ()
    mapping: str = ""
    mapping_failure: str = ""
    relays: tuple[Relay, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSnapshot:
    """Everything that the API and the console can show, at one instant."""

    node_id: str
    mesh_id: str
    version: str
    hostname: str
    node_status: str  # Client, Serving, Serving (split), Worker (split), Standby, Idle
    is_client: bool
    scope: str
    token: str  # an invite to this mesh, or empty if this node may not invite
    api_port: int
    console_port: int
    my_vram_gb: float
    addresses: tuple[str, ...] = ()
    reachability: Reachability = Reachability()
    models: tuple[Model, ...] = ()
    peers: tuple[Peer, ...] = ()
    local_models: tuple[LocalModel, ...] = ()
    processes: tuple[Process, ...] = ()
    tunnels: tuple[Tunnel, ...] = ()
    invites: tuple[Invite, ...] = ()
    notices: tuple[str, ...] = field(default=())  # what the operator should know now, in words

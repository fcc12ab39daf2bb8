"""`/api/status`: a snapshot as JSON. Pure. The schema is `docs/status.schema.json`; `tests/http` holds both together.

The first names are those of the first mesh and mean what they meant there, so that its tools work here. Added fields
may come with any release; a field that goes or changes its meaning raises `SCHEMA_VERSION`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from libmesh_node.snapshot import LocalModel, Model, NodeSnapshot, Peer, Process, Server, Tunnel

SCHEMA_VERSION = 1

_GB = 1e9


def status_json(
    snapshot: NodeSnapshot, in_flight: Mapping[str, int], *, with_token: bool = True
) -> dict[str, object]:
    """The status document. `in_flight` counts this node's requests per server's base URL.

    Without `with_token` the invite is left out, for readers who may look but not let others in.
    """
    local = [model for model in snapshot.models if any(server.local for server in model.servers)]
    return {
        "schema_version": SCHEMA_VERSION,
        "version": snapshot.version,
        "node_id": snapshot.node_id,
        "token": snapshot.token if with_token else "",
        "node_status": snapshot.node_status,
        "is_host": bool(local),
        "is_client": snapshot.is_client,
        "llama_ready": bool(local),
        "model_name": local[0].name if local else _first_process_model(snapshot),
        "model_size_gb": _gb(local[0].size_bytes) if local else 0.0,
        "serving_models": [model.name for model in local],
        "api_port": snapshot.api_port,
        "console_port": snapshot.console_port,
        "my_vram_gb": round(snapshot.my_vram_gb, 3),
        "my_hostname": snapshot.hostname,
        "mesh_id": snapshot.mesh_id,
        "scope": snapshot.scope,
        "addresses": list(snapshot.addresses),
        "reachability": asdict(snapshot.reachability),
        "inflight_requests": sum(in_flight.values()),
        "peers": [_peer(peer) for peer in snapshot.peers],
        "mesh_models": [_mesh_model(model) for model in snapshot.models],
        "models": [_model(model, in_flight) for model in snapshot.models],
        "local_models": local_models_json(snapshot.local_models),
        "processes": [_process(process) for process in snapshot.processes],
        "tunnels": tunnels_json(snapshot.tunnels),
        "invites": [asdict(invite) for invite in snapshot.invites] if with_token else [],
        "notices": list(snapshot.notices),
    }


def local_models_json(models: tuple[LocalModel, ...]) -> list[dict[str, object]]:
    """This node's models, as `/api/runtime/models` lists them."""
    return [asdict(model) for model in models]


def tunnels_json(tunnels: tuple[Tunnel, ...]) -> list[dict[str, object]]:
    """The forwards that people asked for, as `/api/tunnels` lists them."""
    return [
        {
            "direction": tunnel.direction,
            "name": tunnel.name,
            "target": tunnel.target,
            "peer": tunnel.peer,
            "port": tunnel.port,
        }
        for tunnel in tunnels
    ]


def _first_process_model(snapshot: NodeSnapshot) -> str:
    return snapshot.processes[0].model if snapshot.processes else ""


def _peer(peer: Peer) -> dict[str, object]:
    return {
        "id": peer.id,
        "role": peer.role,
        "models": list(peer.models),
        "vram_gb": round(peer.vram_gb, 3),
        "serving": peer.serving[0] if peer.serving else None,
        "serving_models": list(peer.serving),
        "version": peer.version,
        "hostname": peer.hostname,
        "scope": peer.scope,
        "state": peer.state,
        "since": peer.since_unix,
        "path": peer.path,
        "address": peer.address,
        "rtt_ms": None if peer.rtt_ms is None else round(peer.rtt_ms, 2),
        "inflight_requests": peer.inflight,
        "invites": list(peer.invites),
        "expires_unix": peer.expires_unix,
        "path_since": peer.path_since_unix,
        "why_not_direct": list(peer.why_not_direct),
    }


def _mesh_model(model: Model) -> dict[str, object]:
    return {
        "name": model.name,
        "status": "warm" if model.servers else "cold",
        "node_count": len({server.peer for server in model.servers}),
        "size_gb": _gb(model.size_bytes),
    }


def _model(model: Model, in_flight: Mapping[str, int]) -> dict[str, object]:
    return {
        "digest": model.digest,
        "name": model.name,
        "size_bytes": model.size_bytes,
        "context_length": model.context_length,
        "servers": [_server(server, in_flight) for server in model.servers],
        "asked": round(model.asked, 2),
        "waiting": model.waiting,
        "wanted": model.wanted,
        "coming": model.coming,
        "standbys": model.standbys,
    }


def _server(server: Server, in_flight: Mapping[str, int]) -> dict[str, object]:
    return {
        "peer": server.peer,
        "local": server.local,
        "slots": server.slots,
        "rtt_ms": None if server.rtt is None else round(server.rtt * 1000, 2),
        "in_flight": in_flight.get(server.base_url, 0),
    }


def _process(process: Process) -> dict[str, object]:
    return {
        "name": process.name,
        "pid": process.pid,
        "port": process.port,
        "model": process.model,
        "status": process.status,
        "restarts": process.restarts,
        "failure": process.failure,
    }


def _gb(size: int) -> float:
    return round(size / _GB, 3)

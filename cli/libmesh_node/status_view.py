"""A node's status as a person reads it: `/api/status` in, rich tables out. Pure but for the clock it is given.

Fields that are missing (an older node) or new (a newer one) are left out; nothing here raises because of what a node said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from libmesh_node.terminal import harmless

Json = Mapping[str, Any]

_STATE_STYLES = {
    "alive": "green", "ready": "green", "warm": "green", "direct": "green", "punched": "green",
    "suspect": "yellow", "starting": "yellow", "loading": "yellow", "restarting": "yellow", "relayed": "yellow",
    "dead": "red", "failed": "red", "left": "dim", "cold": "dim", "stopping": "dim",
}  # fmt: skip


def status_tables(status: Json, now_unix: float) -> RenderableType:
    """Everything in `status`: this node, then peers, models and processes, each as a table that is there if needed."""
    parts: list[RenderableType] = [_this_node(status)]
    peers = _objects(status, "peers")
    names = {_text(peer, "id"): _peer_name(peer) for peer in peers}
    names[_text(status, "node_id")] = "this node"
    sections = (
        ("peers", _peers(peers, now_unix), bool(peers)),
        ("models", _models(_objects(status, "models"), names), bool(_objects(status, "models"))),
        ("processes", _processes(_objects(status, "processes")), bool(_objects(status, "processes"))),
    )
    for title, table, wanted in sections:
        parts.append(Text(f"\n{title}" if wanted else f"\n{title}: none", style="bold" if wanted else "dim"))
        if wanted:
            parts.append(table)
    return Group(*parts)


def short_id(peer: str) -> str:
    """The last eight characters of a peer id, which tell peers apart; the first eight are the same for all."""
    return f"…{peer[-8:]}" if len(peer) > 8 else peer


def size(gigabytes: object) -> str:
    """Units of 1e9 bytes, in three digits at most: `17 GB`, `1.2 GB`, `820 MB`, `4.1 MB`."""
    if not isinstance(gigabytes, (int, float)) or gigabytes <= 0:
        return "–"
    value, unit = (float(gigabytes), "GB") if gigabytes >= 1 else (gigabytes * 1000, "MB")
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def age(since_unix: object, now_unix: float) -> str:
    """How long ago, in its largest unit: `4 s`, `12 min`, `3 h`, `5 d`."""
    if not isinstance(since_unix, (int, float)) or since_unix <= 0:
        return "–"
    seconds = max(0.0, now_unix - since_unix)
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{seconds // unit:.0f} {name}"
    return f"{seconds // 86400:.0f} d"


def _this_node(status: Json) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    state = _text(status, "node_status") or "?"
    where = _text(status, "my_hostname")
    version = _text(status, "version")
    _add(table, "node", f"{_text(status, 'node_id') or '?'}")
    _add(
        table,
        "state",
        state + (f" on {where}" if where else "") + (f", version {version}" if version else ""),
    )
    scope = _text(status, "scope")
    _add(table, "mesh", f"{_text(status, 'mesh_id') or '?'}" + (f", scope {scope}" if scope else ""))
    if status.get("api_port"):
        _add(table, "API", f"http://localhost:{status['api_port']}/v1")
    if status.get("console_port"):
        _add(table, "console", f"http://localhost:{status['console_port']}")
    if status.get("my_vram_gb"):
        _add(table, "memory", size(status["my_vram_gb"]))
    for number, address in enumerate(_strings(status, "addresses")):
        _add(table, "" if number else "addresses", address)
    for notice in _strings(status, "notices"):
        _add(table, Text("notice", style="yellow"), Text(notice, style="yellow"))
    return table


def _peers(peers: Iterable[Json], now_unix: float) -> Table:
    table = _table(
        "peer", "host", "role", "scope", "state", "path", ">rtt", ">memory", "models", ">in flight", ">since"
    )
    for peer in peers:
        rtt = peer.get("rtt_ms")
        _add(
            table,
            short_id(_text(peer, "id")),
            _text(peer, "hostname") or "–",
            _text(peer, "role"),
            _text(peer, "scope"),
            _state(_text(peer, "state")),
            _state(_text(peer, "path") or "–"),
            f"{rtt:.1f} ms" if isinstance(rtt, (int, float)) else "–",
            size(peer.get("vram_gb")),
            ", ".join(_strings(peer, "serving_models") or _strings(peer, "models"))
            or _text(peer, "serving")
            or "–",
            str(peer.get("inflight_requests", 0)),
            age(peer.get("since"), now_unix),
        )
    return table


def _models(models: Iterable[Json], names: Mapping[str, str]) -> Table:
    table = _table("model", "state", ">size", ">context", ">in flight", "served by", "digest")
    for model in models:
        servers = _objects(model, "servers")
        context = model.get("context_length")
        bytes_ = model.get("size_bytes")
        where = [names.get(_text(server, "peer")) or short_id(_text(server, "peer")) for server in servers]
        _add(
            table,
            _text(model, "name"),
            _state("warm" if servers else "cold"),
            size(bytes_ / 1e9 if isinstance(bytes_, (int, float)) else None),
            f"{context:,}" if isinstance(context, int) and context > 0 else "–",
            str(sum(count for server in servers if isinstance(count := server.get("in_flight"), int))),
            ", ".join(dict.fromkeys(where)) or "nobody",
            _text(model, "digest")[:12] or "–",
        )
    return table


def _processes(processes: Iterable[Json]) -> Table:
    table = _table("process", "model", "state", ">pid", ">port", ">restarts", "why")
    for process in processes:
        _add(
            table,
            _text(process, "name"),
            _text(process, "model"),
            _state(_text(process, "status")),
            str(process.get("pid") or "–"),
            str(process.get("port") or "–"),
            str(process.get("restarts", 0)),
            _text(process, "failure"),
        )
    return table


def _table(*columns: str) -> Table:
    """Left-aligned columns; those that start with `>` are numbers and go to the right."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def _add(table: Table, *cells: str | Text) -> None:
    """Add a row of plain text: rich would take `[…]` in a string for markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _state(word: str) -> Text:
    return Text(word, style=_STATE_STYLES.get(word, ""))


def _peer_name(peer: Json) -> str:
    return _text(peer, "hostname") or short_id(_text(peer, "id"))


def _text(source: Json, key: str) -> str:
    value = source.get(key)
    return harmless(value) if isinstance(value, str) else ""


def _strings(source: Json, key: str) -> list[str]:
    value = source.get(key)
    return [harmless(item) for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _objects(source: Json, key: str) -> list[Json]:
    value = source.get(key)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []

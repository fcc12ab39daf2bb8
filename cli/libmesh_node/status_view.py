"""A node's status as a person reads it: `/api/status` in, rich tables out. Pure but for the clock it is given.

Fields that are missing (an older node) or new (a newer one) are left out; nothing here raises because of what a node said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import compress
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from libmesh_node.doctor import why_not_direct
from libmesh_node.terminal import harmless

NARROW = 112
"""Columns that the table of peers needs with short names."""

Json = Mapping[str, Any]

_WHOLE = {"peer", "state", "rtt", "pid", "port", "size"}
"""Columns that are never cut or broken, however narrow it gets."""

_STATE_STYLES = {
    "alive": "green", "ready": "green", "warm": "green", "direct": "green", "punched": "green",
    "suspect": "yellow", "starting": "yellow", "loading": "yellow", "restarting": "yellow", "relayed": "yellow",
    "dead": "red", "failed": "red", "left": "dim", "cold": "dim", "stopping": "dim",
}  # fmt: skip


def status_tables(status: Json, now_unix: float, width: int) -> RenderableType:
    """Everything in `status`: this node, then peers, models and processes, each as a table that is there if needed.

    Below `NARROW` columns of `width`, the tables leave out what matters least.
    """
    narrow = width < NARROW
    parts: list[RenderableType] = [_this_node(status)]
    peers = _objects(status, "peers")
    relayed = [peer for peer in peers if peer.get("path") == "relayed"]
    names = _names(status, peers)
    sections = (
        ("peers", _peers(peers, now_unix, narrow), bool(peers)),
        *([("not direct", _relayed(relayed, now_unix), True)] if relayed else []),
        ("models", _models(_objects(status, "models"), names, narrow), bool(_objects(status, "models"))),
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
    _row(table, "node", f"{_text(status, 'node_id') or '?'}")
    _row(
        table,
        "state",
        state + (f" on {where}" if where else "") + (f", version {version}" if version else ""),
    )
    scope = _text(status, "scope")
    _row(table, "mesh", f"{_text(status, 'mesh_id') or '?'}" + (f", scope {scope}" if scope else ""))
    if status.get("api_port"):
        _row(table, "API", f"http://localhost:{status['api_port']}/v1")
    if status.get("console_port"):
        _row(table, "console", f"http://localhost:{status['console_port']}")
    if status.get("my_vram_gb"):
        _row(table, "memory", size(status["my_vram_gb"]))
    for number, address in enumerate(_strings(status, "addresses")):
        _row(table, "" if number else "addresses", address)
    for notice in _strings(status, "notices"):
        _row(table, Text("notice", style="yellow"), Text(notice, style="yellow"))
    return table


def _peers(peers: Iterable[Json], now_unix: float, narrow: bool) -> Table:
    table = _Columns(
        "peer",
        "host",
        "role",
        "?scope",
        "state",
        "path",
        "?>for",
        ">rtt",
        "?>memory",
        "models",
        ">in flight",
        "?>since",
        narrow=narrow,
    )
    for peer in peers:
        rtt = peer.get("rtt_ms")
        table.add(
            short_id(_text(peer, "id")),
            _text(peer, "hostname") or "–",
            _text(peer, "role"),
            _text(peer, "scope"),
            _state(_text(peer, "state")),
            _state(_text(peer, "path") or "–"),
            age(peer.get("path_since"), now_unix),
            f"{rtt:.1f} ms" if isinstance(rtt, (int, float)) else "–",
            size(peer.get("vram_gb")),
            ", ".join(_strings(peer, "serving_models") or _strings(peer, "models"))
            or _text(peer, "serving")
            or "–",
            str(peer.get("inflight_requests", 0)),
            age(peer.get("since"), now_unix),
        )
    return table.rich


def _relayed(peers: Iterable[Json], now_unix: float) -> Table:
    """Those that are reached through a relay, since when, and why."""
    table = _Columns("peer", "host", ">relayed for", "because")
    for peer in peers:
        table.add(
            short_id(_text(peer, "id")),
            _text(peer, "hostname") or "–",
            age(peer.get("path_since"), now_unix),
            harmless(why_not_direct(peer)),
        )
    return table.rich


def _models(models: Iterable[Json], names: Mapping[str, str], narrow: bool) -> Table:
    table = _Columns(
        "model",
        "state",
        ">size",
        ">context",
        ">in flight",
        "?>asked",
        "served by",
        "?digest",
        narrow=narrow,
    )
    for model in models:
        servers = _objects(model, "servers")
        context = model.get("context_length")
        bytes_ = model.get("size_bytes")
        where = [names.get(_text(server, "peer")) or short_id(_text(server, "peer")) for server in servers]
        table.add(
            _text(model, "name"),
            _state("warm" if servers else "loading" if model.get("coming") else "cold"),
            size(bytes_ / 1e9 if isinstance(bytes_, (int, float)) else None),
            f"{context:,}" if isinstance(context, int) and context > 0 else "–",
            str(sum(count for server in servers if isinstance(count := server.get("in_flight"), int))),
            f"{asked:g}" if isinstance(asked := model.get("asked"), (int, float)) and asked else "–",
            ", ".join(dict.fromkeys(where)) or _nobody(model),
            _text(model, "digest")[:12] or "–",
        )
    return table.rich


def _nobody(model: Json) -> str:
    standbys = model.get("standbys")
    if model.get("coming"):
        return "nobody yet"
    if isinstance(standbys, int) and standbys > 0:
        return f"nobody; {standbys} would" if standbys > 1 else "nobody; 1 node would"
    return "nobody, but it is wanted" if model.get("wanted") else "nobody"


def _processes(processes: Iterable[Json]) -> Table:
    table = _Columns("process", "model", "state", ">pid", ">port", ">restarts", "why")
    for process in processes:
        table.add(
            _text(process, "name"),
            _text(process, "model"),
            _state(_text(process, "status")),
            str(process.get("pid") or "–"),
            str(process.get("port") or "–"),
            str(process.get("restarts", 0)),
            _text(process, "failure"),
        )
    return table.rich


class _Columns:
    """A table of plain text: rich would take `[…]` in a string for markup.

    A column's name starts with `?` if a narrow table leaves it out, and with `>` if it holds numbers, which go to the
    right.
    """

    def __init__(self, *columns: str, narrow: bool = False) -> None:
        self.rich = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
        self._shown = [not (narrow and column.startswith("?")) for column in columns]
        for column in compress(columns, self._shown):
            name = column.lstrip("?>")
            self.rich.add_column(name, justify="right" if ">" in column else "left", no_wrap=name in _WHOLE)

    def add(self, *cells: str | Text) -> None:
        """Add a row; one cell for each column, shown or not."""
        self.rich.add_row(*map(_plain, compress(cells, self._shown)))


def _row(table: Table, *cells: str | Text) -> None:
    table.add_row(*map(_plain, cells))


def _plain(cell: str | Text) -> Text:
    return Text(cell) if isinstance(cell, str) else cell


def _state(word: str) -> Text:
    return Text(word, style=_STATE_STYLES.get(word, ""))


def _names(status: Json, peers: Iterable[Json]) -> dict[str, str]:
    """What to call each peer where there is little room: its host name if no other has the same, else its short id."""
    hosts = Counter([_text(status, "my_hostname"), *(_text(peer, "hostname") for peer in peers)])
    names = {
        _text(peer, "id"): host
        if (host := _text(peer, "hostname")) and hosts[host] == 1
        else short_id(_text(peer, "id"))
        for peer in peers
    }
    return names | {_text(status, "node_id"): "this node"}


def _text(source: Json, key: str) -> str:
    value = source.get(key)
    return harmless(value) if isinstance(value, str) else ""


def _strings(source: Json, key: str) -> list[str]:
    value = source.get(key)
    return [harmless(item) for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _objects(source: Json, key: str) -> list[Json]:
    value = source.get(key)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []

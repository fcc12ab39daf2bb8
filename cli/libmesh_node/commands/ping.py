"""`libmesh-node ping`: by which path a peer is reached, how far it is, and each change of that, while it happens."""

from __future__ import annotations

import argparse
import time
from typing import Any

from libmesh_node.client import NodeClient, find_node
from libmesh_node.commands.tunnel import find_peer
from libmesh_node.datadir import DataDir
from libmesh_node.options import add_node_choice, data_dir
from libmesh_node.status_view import age, short_id
from libmesh_node.terminal import harmless, remark, say, say_json

PAUSE = 1.0
"""Seconds between two looks. The node measures the round trip itself, every ten seconds or so."""

_FIELDS = ("id", "hostname", "state", "path", "address", "rtt_ms", "path_since", "why_not_direct")


def add_parser(subparsers: Any) -> None:
    """Add `ping` to the commands."""
    parser = subparsers.add_parser(
        "ping",
        help="show the path to a peer, its round-trip time, and each change",
        description=(
            "Shows once a second by which path the running node reaches a peer (direct, punched or relayed), the "
            "round-trip time, and, of a relayed path, why each better way failed. Goes on until Ctrl-C. Exits with 1 if "
            "there was no path at the end."
        ),
    )
    parser.add_argument("peer", metavar="PEER", help="the peer's host name, its id, or the end of its id")
    parser.add_argument("--count", type=_count, metavar="N", help="end after N lines")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    add_node_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Look until Ctrl-C or as often as asked."""
    node = find_node(DataDir(data_dir(args)), args.console)
    peer = find_peer(node.get("/api/status"), args.peer)
    seen: list[dict[str, Any]] = []
    try:
        while args.count is None or len(seen) < args.count:
            if seen:
                time.sleep(PAUSE)
            entry = _entry(node, peer)
            if args.json:
                say_json(entry, lines=True)
            else:
                for line in lines_of(entry, seen[-1] if seen else None, time.time()):
                    say(line)
            seen.append(entry)
    except KeyboardInterrupt:
        remark("")
    return 0 if seen and seen[-1]["path"] else 1


def _entry(node: NodeClient, peer: str) -> dict[str, Any]:
    peers = node.get("/api/status").get("peers", [])
    found: dict[str, Any] = next((entry for entry in peers if entry.get("id") == peer), {"id": peer})
    return {field: found.get(field) for field in _FIELDS}


def lines_of(entry: dict[str, Any], before: dict[str, Any] | None, now_unix: float) -> list[str]:
    """What is told of a peer: one line, and under it the reasons why the path is no better that `before` did not tell."""
    who = harmless(str(entry.get("hostname") or short_id(str(entry["id"]))))
    clock = time.strftime("%H:%M:%S", time.localtime(now_unix))
    path, rtt, since = entry.get("path"), entry.get("rtt_ms"), entry.get("path_since")
    if not path:
        state = entry.get("state") or "not known"
        return [f"{clock}  {who}: no connection ({harmless(str(state))})"]
    distance = f"{rtt:.1f} ms" if isinstance(rtt, int | float) else "not measured yet"
    line = f"{clock}  {who}: {harmless(str(path))}, {distance}"
    if entry.get("state") == "suspect":
        line += ", and does not answer now"
    same = before is not None and (path, entry.get("address")) == (before.get("path"), before.get("address"))
    told = (before.get("why_not_direct") or []) if before is not None and same else []
    if not same:
        line += f", {harmless(str(entry.get('address') or 'address unknown'))}"
        line += f", since {age(since, now_unix)}" if isinstance(since, int | float) else ""
    if before is not None and not same:
        line += f"  (was {harmless(str(before.get('path') or 'not connected'))})"
    news = [reason for reason in entry.get("why_not_direct") or [] if reason not in told]
    return [line, *(f"          not better, because {harmless(str(reason))}" for reason in news)]


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines: a whole number from 1")
    return int(text)

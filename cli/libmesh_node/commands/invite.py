"""`libmesh-node invite`: makes, lists and takes back invites to the running node's mesh."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from rich.table import Table

from libmesh_node.client import NodeClient, find_node
from libmesh_node.datadir import DataDir
from libmesh_node.errors import UsageError
from libmesh_node.options import add_node_choice, data_dir, duration
from libmesh_node.terminal import remark, say, say_json, show

SCOPES = {
    "client": "use the mesh's models and services",
    "worker": "use the mesh, and be lent work",
    "invite": "all that, and invite others",
}


def add_parser(subparsers: Any) -> None:
    """Add `invite` to the commands."""
    parser = subparsers.add_parser(
        "invite",
        help="make an invite for the next machine",
        description="Prints an invite to the running node's mesh: on stdout the token alone, what it is on stderr.",
    )
    parser.add_argument(
        "--scope",
        choices=tuple(SCOPES),
        default="worker",
        help="what it allows: "
        + "; ".join(f"{name}: {what}" for name, what in SCOPES.items())
        + " (default: worker)",
    )
    parser.add_argument(
        "--ttl",
        type=duration,
        default=duration("7d"),
        metavar="TIME",
        help="how long its holder may join, and stay, such as 30s, 12h, 7d or 52w (default: 7d)",
    )
    parser.add_argument("--json", action="store_true", help="print token, scope and expires_unix as JSON")
    parser.add_argument("--qr", action="store_true", help="also show the token as a QR code")
    parser.add_argument(
        "--list", action="store_true", help="show the invites that this node made and that hold"
    )
    parser.add_argument(
        "action", nargs="?", choices=("revoke",), metavar="revoke", help="take back an invite or a membership"
    )
    parser.add_argument(
        "name",
        nargs="?",
        metavar="ID",
        help="an invite's id, as --list or `peers` shows it, or a peer, as `peers` shows it",
    )
    add_node_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Print the token. Raises `NodeRefused` if this node may not invite with that scope."""
    if (args.action is None) != (args.name is None):
        raise UsageError("What shall be revoked? `libmesh-node invite --list` shows the ids of invites.")
    node = find_node(DataDir(data_dir(args)), args.console)
    if args.action == "revoke":
        say(str(node.post("/api/revoke", {"name": args.name}).get("done", "Done.")))
        return 0
    if args.list:
        return _list(node, as_json=args.json)
    answer = node.post("/api/invite", {"scope": args.scope, "ttl_s": args.ttl})
    if args.json:
        say_json({key: answer.get(key) for key in ("token", "scope", "expires_unix")})
        return 0
    say(str(answer.get("token", "")))
    if args.qr:
        _show_qr(str(answer.get("token", "")))
    scope = str(answer.get("scope", args.scope))
    remark(f"Lets its holder {SCOPES.get(scope, scope)}{_until(answer.get('expires_unix'))}.")
    flags = "--client " if scope == "client" else ""
    remark(f"On the next machine: libmesh-node {flags}--join TOKEN")
    return 0


def _list(node: NodeClient, *, as_json: bool) -> int:
    invites = node.get("/api/status").get("invites", [])
    if as_json:
        say_json(invites)
        return 0
    if not invites:
        say("This node made no invites that still hold.")
        return 0
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("id", "scope", "made", "holds until", ""):
        table.add_column(heading)
    for one in invites:
        ends = _when(one.get("expires_unix")) or "for ever"
        state = "revoked" if one.get("revoked") else ""
        table.add_row(
            str(one.get("id"))[:12], str(one.get("scope")), _when(one.get("created_unix")), ends, state
        )
    show(lambda width: table)
    return 0


def _show_qr(token: str) -> None:
    import segno

    segno.make(token, error="l", micro=False).terminal(out=sys.stdout, compact=True, border=2)


def _when(unix: object) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix)) if isinstance(unix, int | float) else ""


def _until(expires_unix: object) -> str:
    when = _when(expires_unix)
    return f", until {when}" if when else ""

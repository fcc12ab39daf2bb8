"""`libmesh-node invite`: makes an invite to the running node's mesh."""

from __future__ import annotations

import argparse
import time
from typing import Any

from libmesh_node.client import find_node
from libmesh_node.datadir import DataDir
from libmesh_node.options import add_node_choice, data_dir, duration
from libmesh_node.terminal import remark, say, say_json

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
        help="how long it lets new peers in, such as 30s, 12h, 7d or 52w (default: 7d)",
    )
    parser.add_argument("--json", action="store_true", help="print token, scope and expires_unix as JSON")
    add_node_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Print the token. Raises `NodeRefused` if this node may not invite with that scope."""
    node = find_node(DataDir(data_dir(args)), args.console)
    answer = node.post("/api/invite", {"scope": args.scope, "ttl_s": args.ttl})
    if args.json:
        say_json({key: answer.get(key) for key in ("token", "scope", "expires_unix")})
        return 0
    say(str(answer.get("token", "")))
    scope = str(answer.get("scope", args.scope))
    remark(f"Lets its holder {SCOPES.get(scope, scope)}{_until(answer.get('expires_unix'))}.")
    flags = "--client " if scope == "client" else ""
    remark(f"On the next machine: libmesh-node {flags}--join TOKEN")
    return 0


def _until(expires_unix: object) -> str:
    if not isinstance(expires_unix, (int, float)):
        return ""
    return time.strftime(", until %Y-%m-%d %H:%M", time.localtime(expires_unix))

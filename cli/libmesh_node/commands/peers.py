"""`libmesh-node peers`: who is in the mesh, and who let whom in."""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.table import Table

from libmesh_node.client import find_node
from libmesh_node.datadir import DataDir
from libmesh_node.options import add_node_choice, data_dir
from libmesh_node.status_view import short_id
from libmesh_node.terminal import harmless, say, say_json, show

_SHORT = 8


def add_parser(subparsers: Any) -> None:
    """Add `peers` to the commands."""
    parser = subparsers.add_parser(
        "peers",
        help="show who is in the mesh, and who let whom in",
        description=(
            "Shows the peers that the running node knows, what each may do and until when, and the invite that let it "
            "in: made with the mesh's own key, or by somebody who came in by another invite."
        ),
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_node_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Print the peers."""
    node = find_node(DataDir(data_dir(args)), args.console)
    peers = node.get("/api/status").get("peers", [])
    if args.json:
        fields = ("id", "hostname", "scope", "state", "since", "invites", "expires_unix")
        say_json([{field: peer.get(field) for field in fields} for peer in peers])
        return 0
    if not peers:
        say("This node knows no other peers.")
        return 0
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("peer", "host", "scope", "state", "let in by", "holds until"):
        table.add_column(heading)
    for peer in peers:
        ends = peer.get("expires_unix")
        table.add_row(
            short_id(str(peer.get("id", ""))),
            harmless(str(peer.get("hostname") or "–")),
            str(peer.get("scope", "")),
            str(peer.get("state", "")),
            admission(peer.get("invites") or [], peers),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(ends))
            if isinstance(ends, int | float)
            else "for ever",
        )
    show(lambda width: table)
    return 0


def admission(invites: list[str], peers: list[dict[str, Any]]) -> str:
    """In words, how somebody with this chain of invites came in; `peers` are those whose names may be told.

    An invite is made by somebody who came in by the one above it. If several did, each may have been it.
    """
    if not invites:
        return "the mesh's key"
    last = invites[-1][:_SHORT]
    if len(invites) == 1:
        return f"invite {last} of the mesh's key"
    makers = [
        harmless(str(peer.get("hostname") or short_id(str(peer.get("id", "")))))
        for peer in peers
        if peer.get("invites") == invites[:-1]
    ]
    return f"invite {last} of {' or '.join(makers) or f'a holder of {invites[-2][:_SHORT]}'}"

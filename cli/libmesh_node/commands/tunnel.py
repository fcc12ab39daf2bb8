"""`libmesh-node tunnel`: forwards TCP ports through the mesh, for as long as the running node lives."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from libmesh_node import options
from libmesh_node.client import NodeClient, find_node
from libmesh_node.commands.invite import SCOPES
from libmesh_node.datadir import DataDir
from libmesh_node.errors import NodeError
from libmesh_node.options import add_node_choice, data_dir
from libmesh_node.status_view import short_id
from libmesh_node.terminal import remark, say, say_json, show


def add_parser(subparsers: Any) -> None:
    """Add `tunnel expose`, `tunnel connect` and `tunnel list` to the commands."""
    parser = subparsers.add_parser(
        "tunnel",
        help="forward TCP ports through the mesh",
        description="Forwards TCP ports through the mesh. A tunnel lasts until the node that was told of it ends.",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True, parser_class=type(parser))

    expose = actions.add_parser(
        "expose",
        help="offer a TCP port of this machine to the mesh",
        description="Offers what listens at HOST:PORT to the mesh under NAME.",
    )
    expose.add_argument("name", metavar="NAME", help="what peers call it")
    expose.add_argument("target", metavar="HOST:PORT", type=options.target, help="what to forward to")
    expose.add_argument(
        "--scope",
        choices=tuple(SCOPES),
        default="client",
        help="what a peer must be allowed to use it (default: client)",
    )
    add_node_choice(expose)

    connect = actions.add_parser(
        "connect",
        help="open a local port that leads to what a peer offers",
        description="Opens a port on this machine's loopback that leads to NAME at PEER, and prints HOST:PORT.",
    )
    connect.add_argument(
        "peer", metavar="PEER", help="peer id, its last characters, or its host name, as status shows"
    )
    connect.add_argument("name", metavar="NAME", help="what the peer calls it")
    connect.add_argument(
        "--port",
        dest="local_port",
        type=options.port,
        default=0,
        metavar="PORT",
        help="local port (default: a free one)",
    )
    add_node_choice(connect)

    listing = actions.add_parser(
        "list", help="show the tunnels of this node", description="Shows the tunnels in use."
    )
    listing.add_argument("--json", action="store_true", help="as JSON")
    add_node_choice(listing)


def run(args: argparse.Namespace) -> int:
    """Carry out the action on the running node."""
    node = find_node(DataDir(data_dir(args)), args.console)
    return {"expose": _expose, "connect": _connect, "list": _list}[args.action](node, args)


def _expose(node: NodeClient, args: argparse.Namespace) -> int:
    body = {"direction": "expose", "name": args.name, "target": args.target, "scope": args.scope}
    node.post("/api/tunnels", body)
    me = str(node.get("/api/status").get("node_id", ""))
    say(f"{args.name} leads to {args.target} until this node ends.")
    remark(f"On another machine of the mesh: libmesh-node tunnel connect {short_id(me)} {args.name}")
    return 0


def _connect(node: NodeClient, args: argparse.Namespace) -> int:
    peer = find_peer(node.get("/api/status"), args.peer)
    body = {"direction": "connect", "peer": peer, "name": args.name, "port": args.local_port}
    answer = node.post("/api/tunnels", body)
    say(f"127.0.0.1:{answer.get('port', args.local_port)}")
    remark(f"leads to {args.name} at {short_id(peer)} until this node ends.")
    return 0


def _list(node: NodeClient, args: argparse.Namespace) -> int:
    tunnels = node.get("/api/tunnels").get("tunnels", [])
    if args.json:
        say_json(tunnels)
        return 0
    if not tunnels:
        say("No tunnels.")
        return 0
    table = Table("name", "from", "to", box=None, header_style="dim", pad_edge=False)
    for tunnel in tunnels:
        peer = short_id(str(tunnel.get("peer", "")))
        here, there = f"127.0.0.1:{tunnel.get('port', 0)}", str(tunnel.get("target", ""))
        way = ("the mesh", there) if tunnel.get("direction") == "expose" else (here, f"peer {peer}")
        table.add_row(str(tunnel.get("name", "")), *way)
    show(lambda width: table)
    return 0


def find_peer(status: dict[str, Any], wanted: str) -> str:
    """The id of the one peer in `status` that `wanted` means: its id, its last characters, or its host name.

    A text that is nobody's name, and long enough for an id, is taken as one, so a peer that status does not show yet can
    be named in full. Raises `NodeError` if none or several are meant.
    """
    peers = [peer for peer in status.get("peers", []) if isinstance(peer, dict)]
    ends = wanted.lstrip("….")
    found = {
        str(peer.get("id"))
        for peer in peers
        if wanted == peer.get("id")
        or (len(ends) >= 4 and str(peer.get("id")).endswith(ends))
        or wanted.lower() == str(peer.get("hostname", "")).lower()
    }
    if len(found) == 1:
        return found.pop()
    if found:
        raise NodeError(
            f"{wanted!r} could be {' or '.join(sorted(map(short_id, found)))}. Give the peer's id."
        )
    if len(ends) >= 4 and str(status.get("node_id", "")).endswith(ends):
        raise NodeError(f"{wanted!r} is this node itself.")
    if len(wanted) >= 40:
        return wanted
    known = ", ".join(
        f"{short_id(str(peer.get('id')))} ({peer.get('hostname') or '?'})" for peer in peers[:8]
    )
    raise NodeError(f"No peer is called {wanted!r}. Known: {known or 'none yet'}.")

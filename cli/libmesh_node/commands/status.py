"""`libmesh-node status`: shows the running node, its peers, and what is served."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import Any

from rich.console import RenderableType
from rich.live import Live

from libmesh_node.client import NodeClient, find_node
from libmesh_node.datadir import DataDir
from libmesh_node.options import add_node_choice, data_dir
from libmesh_node.status_view import status_tables
from libmesh_node.terminal import remark, say, say_json, show, stdout_console

_REDRAWS_PER_SECOND = 2
"""Ages are in seconds, so twice that; each change is drawn at once besides."""


def add_parser(subparsers: Any) -> None:
    """Add `status` to the commands."""
    parser = subparsers.add_parser(
        "status",
        help="show peers, paths, models and processes",
        description="Shows the running node, its peers and paths, the mesh's models, and this node's processes.",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the status as JSON, as GET /api/status gives it"
    )
    parser.add_argument(
        "--watch", action="store_true", help="go on showing it, on every change, until Ctrl-C"
    )
    add_node_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Show the status once, or with `--watch` until Ctrl-C (0) or until the node ends (1)."""
    node = find_node(DataDir(data_dir(args)), args.console)
    if not args.watch:
        status = node.get("/api/status")
        if args.json:
            say_json(status)
        else:
            show(partial(status_tables, status, time.time()))
        return 0
    try:
        _watch(node, as_json=args.json)
    except KeyboardInterrupt:
        return 0
    remark("The node has ended.")
    return 1


def _watch(node: NodeClient, *, as_json: bool) -> None:
    if as_json:
        for status in node.events():
            say_json(status, lines=True)
    elif not sys.stdout.isatty():
        for status in node.events():
            show(partial(status_tables, status, time.time()))
            say()
    else:
        _watch_live(node)


def _watch_live(node: NodeClient) -> None:
    """Redraw in place, in the terminal's other screen, so that what was there before comes back at the end."""
    newest: dict[str, Any] = {}

    def draw() -> RenderableType:
        return status_tables(newest, time.time(), console.width) if newest else ""

    console = stdout_console()
    with Live(
        console=console, screen=True, get_renderable=draw, refresh_per_second=_REDRAWS_PER_SECOND
    ) as live:
        for status in node.events():
            newest = status
            live.refresh()
    if newest:
        console.print(draw())

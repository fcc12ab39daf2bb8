"""`libmesh-node unload`: frees a model's memory on the running node."""

from __future__ import annotations

import argparse
from typing import Any

from libmesh_node.client import find_node
from libmesh_node.commands.load import PATH
from libmesh_node.datadir import DataDir
from libmesh_node.options import add_node_choice, data_dir
from libmesh_node.terminal import harmless, say

DRAINING = 150.0
"""Seconds that the answers under way may take, and a little more."""


def add_parser(subparsers: Any) -> None:
    """Add `unload` to the commands."""
    parser = subparsers.add_parser(
        "unload",
        help="serve a model no more on this node",
        description=(
            "Has the running node serve a model no more, and not take it again by itself. Answers under way are finished "
            "first, within two minutes. What --model or `load` named stays wanted: another node may serve it. See `drop`."
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="its name, as in `libmesh-node status`")
    add_node_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Unload a model."""
    return unload(args, forget=False)


def unload(args: argparse.Namespace, *, forget: bool) -> int:
    """Unload a model, and with `forget` no longer want it."""
    node = find_node(DataDir(data_dir(args)), args.console)
    answer = node.delete(PATH, {"model": args.model, "forget": forget}, DRAINING)
    wanted = "; the mesh is still asked to serve it" if answer.get("wanted") else ""
    say(f"{harmless(str(answer.get('model')))} is not served by this node any more{wanted}.")
    return 0

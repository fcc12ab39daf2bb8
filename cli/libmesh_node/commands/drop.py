"""`libmesh-node drop`: gives a model up."""

from __future__ import annotations

import argparse
from typing import Any

from libmesh_node.commands.unload import unload
from libmesh_node.options import add_node_choice


def add_parser(subparsers: Any) -> None:
    """Add `drop` to the commands."""
    parser = subparsers.add_parser(
        "drop",
        help="serve a model no more, and want it no more",
        description=(
            "As `unload`; and the running node wants the model of the mesh no more, nor do the requests count that it had "
            "for it. What other nodes' operators and requests want, the mesh goes on serving."
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="its name, as in `libmesh-node status`")
    add_node_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Unload a model and forget it."""
    return unload(args, forget=True)

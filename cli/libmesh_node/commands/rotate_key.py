"""`libmesh-node rotate-key`: gives up a stopped node's identity and mesh, for new ones at its next start."""

from __future__ import annotations

import argparse
from typing import Any

from libmesh_node.datadir import held_data_dir
from libmesh_node.errors import NodeError
from libmesh_node.options import add_node_choice, data_dir
from libmesh_node.terminal import say


def add_parser(subparsers: Any) -> None:
    """Add `rotate-key` to the commands."""
    parser = subparsers.add_parser(
        "rotate-key",
        help="give up this node's identity and mesh for new ones",
        description=(
            "Removes the identity key, the mesh key, the membership and the invites from the data folder of a stopped "
            "node. At its "
            "next start it is a new peer in a new mesh of its own: invites that it made stop working for newcomers, "
            "and to return to a mesh it needs a new invite. This cannot be undone."
        ),
    )
    add_node_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Remove the keys. Raises `DataDirBusy` while a node runs on the folder."""
    path = data_dir(args)
    if not path.is_dir():
        raise NodeError(f"There is no data folder {path}, so there is no key to rotate.")
    with held_data_dir(path) as folder:
        # In this order, so that what is left after a crash half-way is a node that must be invited, never one that
        # shows a membership which is not its own.
        secrets = (folder.membership, folder.invite, folder.kept, folder.mesh_key, folder.identity_key)
        removed = [file.name for file in secrets if file.exists()]
        for file in secrets:
            file.unlink(missing_ok=True)
    if not removed:
        say(f"{path} holds no keys yet; the node's first start makes them.")
    else:
        say(f"Removed {', '.join(removed)} from {path}.")
        say("The next start makes a new identity and a new mesh.")
    return 0

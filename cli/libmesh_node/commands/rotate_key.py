"""`libmesh-node rotate-key`: gives up a stopped node's identity, for a new one at its next start, and its own mesh."""

from __future__ import annotations

import argparse
import time
from typing import Any

from libmesh_node.datadir import DataDir, held_data_dir
from libmesh_node.errors import NodeError
from libmesh_node.options import add_node_choice, data_dir
from libmesh_node.terminal import say


def add_parser(subparsers: Any) -> None:
    """Add `rotate-key` to the commands."""
    parser = subparsers.add_parser(
        "rotate-key",
        help="give up this node's identity, and its own mesh, for new ones",
        description=(
            "Removes the identity key and the key of this node's own mesh from the data folder of a stopped node. At its "
            "next start it is a new peer. It comes back into the mesh that it was invited to, as long as that invite holds; "
            "else it is in a new mesh of its own, and invites that it made stop working for newcomers. This cannot be undone."
        ),
    )
    parser.add_argument(
        "--leave", action="store_true", help="give up the mesh that this node was invited to, too"
    )
    add_node_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Remove the keys. Raises `DataDirBusy` while a node runs on the folder."""
    path = data_dir(args)
    if not path.is_dir():
        raise NodeError(f"There is no data folder {path}, so there is no key to rotate.")
    with held_data_dir(path) as folder:
        mesh_id = None if args.leave else _still_invited_to(folder)
        # In this order, so that what is left after a crash half-way is a node that must be invited.
        guest = () if mesh_id is not None else (folder.membership, folder.invite, folder.kept)
        secrets = (*guest, folder.mesh_key, folder.identity_key)
        removed = [file.name for file in secrets if file.exists()]
        for file in secrets:
            file.unlink(missing_ok=True)
    if not removed:
        say(f"{path} holds no keys yet; the node's first start makes them.")
    else:
        say(f"Removed {', '.join(removed)} from {path}.")
        if mesh_id is None:
            say("The next start makes a new identity and a new mesh.")
        else:
            say(
                f"The next start makes a new identity, and comes back into the mesh {mesh_id} by the same invite."
            )
    return 0


def _still_invited_to(folder: DataDir) -> str | None:
    """The mesh that the invite in the data folder lets any identity into; `None` if there is none, or it has ended."""
    # Late, so that --help and the other commands need not wait for libp2p to load.
    from libmesh import read_invite
    from libmesh_node.membership import load_membership

    try:
        membership = load_membership(folder)
    except NodeError:  # damaged, and of no use to anybody
        return None
    if membership is None or membership.token is None:
        return None
    end = read_invite(membership.token).expires_unix
    return membership.mesh_id if end is None or end > time.time() else None

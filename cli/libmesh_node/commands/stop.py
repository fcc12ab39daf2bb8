"""`libmesh-node stop`: ends the running node and waits until it has gone."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from libmesh_node.client import NodeClient, find_node
from libmesh_node.datadir import DataDir
from libmesh_node.errors import NodeError, NodeNotRunning, NodeRefused
from libmesh_node.options import add_node_choice, data_dir
from libmesh_node.terminal import say

PATIENCE = 15.0
"""Seconds for a node to end. It says goodbye to its peers and gives its servers 2.5 s; then it is gone."""


def add_parser(subparsers: Any) -> None:
    """Add `stop` to the commands."""
    parser = subparsers.add_parser(
        "stop",
        help="end the running node",
        description="Ends the running node: it tells its peers, stops its servers, and is gone when this returns.",
    )
    add_node_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Stop the node and wait for its end. Raises `NodeNotRunning` if none runs, `NodeError` if it does not end."""
    if args.console is not None:
        node = find_node(DataDir(data_dir(args)), args.console)
        node.post("/api/stop", {})
        _wait(lambda: not _answers(node), f"The node at console port {args.console}")
    else:
        _stop_holder(DataDir(data_dir(args)))
    say("The node has ended.")
    return 0


def _stop_holder(folder: DataDir) -> None:
    pid = folder.holder()
    try:
        find_node(folder, None).post("/api/stop", {})
    except (NodeError, OSError) as error:
        # Its console is busy, broken or not up yet. The lock tells the pid for certain, and a signal always arrives.
        if pid is None or isinstance(error, NodeRefused) or folder.holder() != pid:
            raise
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    _wait(lambda: not folder.in_use(), f"The node on {folder.path}" + (f" (pid {pid})" if pid else ""))


def _answers(node: NodeClient) -> bool:
    try:
        node.get("/api/status")
    except NodeNotRunning:
        return False
    except (NodeError, OSError):
        return True
    return True


def _wait(ended: Callable[[], bool], who: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ended():
        if time.monotonic() > deadline:
            raise NodeError(
                f"{who} was told to end and still runs after {PATIENCE:g} s. Its log may say why."
            )
        time.sleep(0.05)

"""`libmesh-node load`: serves a model on the running node."""

from __future__ import annotations

import argparse
import time
from typing import Any

from libmesh_node.client import NodeClient, find_node
from libmesh_node.datadir import DataDir
from libmesh_node.errors import NodeError
from libmesh_node.options import add_node_choice, data_dir, model
from libmesh_node.terminal import harmless, remark, say

PATH = "/api/runtime/models"

MAKING_ROOM = 150.0
"""Seconds that the answer may take: models that the node took by itself may have to finish their answers first."""

_LOOK = 0.2  # seconds between two looks at how far it is


def add_parser(subparsers: Any) -> None:
    """Add `load` to the commands."""
    parser = subparsers.add_parser(
        "load",
        help="serve a model from now on, on the running node",
        description=(
            "Has the running node serve a model, as if it had been started with --model, until `unload`, `drop` or its "
            "end. Returns when the model answers. One that does not fit is served by others, or together with them."
        ),
    )
    parser.add_argument(
        "model", type=model, metavar="MODEL", help="a .gguf file, or the name of one, as for --model"
    )
    parser.add_argument("--no-wait", action="store_true", help="return as soon as it is being loaded")
    add_node_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Load a model; 1 if it could not be loaded."""
    node = find_node(DataDir(data_dir(args)), args.console)
    answer = node.post(PATH, {"model": args.model}, MAKING_ROOM)
    name = str(answer.get("model"))
    if not answer.get("alone"):
        say(f"{harmless(name)} does not fit this machine alone; the mesh is asked to serve it.")
    elif args.no_wait:
        say(f"{harmless(name)} is being loaded.")
    else:
        _wait(node, name)
        say(f"{harmless(name)} is ready.")
    return 0


def _wait(node: NodeClient, name: str) -> None:
    told = ""
    while (status := _status(node, name)) != "ready":
        if status in ("failed", "unloading", ""):
            raise NodeError(_why_not(node, name, status))
        if told != (told := status):
            remark(f"{harmless(name)}: {status} ...")
        time.sleep(_LOOK)


def _status(node: NodeClient, name: str) -> str:
    models = node.get(PATH).get("models") or []
    return next((str(model.get("status")) for model in models if model.get("name") == name), "")


def _why_not(node: NodeClient, name: str, status: str) -> str:
    if status != "failed":
        return f"{name} was unloaded while it was being loaded."
    processes = node.get("/api/status").get("processes") or []
    failures = [str(process.get("failure")) for process in processes if process.get("model") == name]
    return f"{name} could not be loaded: {' '.join(failures) or 'its log says why'}"

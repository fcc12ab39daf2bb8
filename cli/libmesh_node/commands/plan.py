"""`libmesh-node plan`: who would serve a model, and how fast, without doing it."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from libmesh_node.client import find_node
from libmesh_node.datadir import DataDir
from libmesh_node.options import add_node_choice, data_dir, model
from libmesh_node.status_view import short_id
from libmesh_node.terminal import harmless, say, say_json, show


def add_parser(subparsers: Any) -> None:
    """Add `plan` to the commands."""
    parser = subparsers.add_parser(
        "plan",
        help="show who would serve a model, and how fast",
        description=(
            "Asks the running node how a model would be served in its mesh as it is now: by one machine or split over "
            "several, with the speed to expect and why each peer was taken or not. Only peers that run with the same "
            "file (--model) count. Nothing is started."
        ),
    )
    parser.add_argument(
        "model", type=model, metavar="MODEL", help="a .gguf file, or the name of one, as for --model"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_node_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan; 1 if the model cannot be served."""
    node = find_node(DataDir(data_dir(args)), args.console)
    plan = node.post("/api/plan", {"model": args.model})
    if args.json:
        say_json(plan)
    elif plan.get("possible"):
        _show(plan)
    else:
        say(f"{harmless(str(plan.get('model')))} cannot be served now: {harmless(str(plan.get('missing')))}.")
        _show_peers(plan)
    return 0 if plan.get("possible") else 1


def _show(plan: dict[str, Any]) -> None:
    members = plan.get("members") or []
    how = "alone" if len(members) == 1 else f"split over {len(members)} machines"
    speed = plan.get("tokens_per_second")
    say(f"{harmless(str(plan.get('model')))}: {how}, about {speed} tokens per second")
    if note := plan.get("note"):
        say(f"{harmless(str(note))}.")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("peer", "role", "layers", "weights", "memory", "round trip"):
        table.add_column(heading)
    for member in members:
        table.add_row(
            _who(plan, member.get("peer")),
            str(member.get("role")),
            str(member.get("layers")),
            _gb(member.get("weights_bytes")),
            _gb(member.get("memory_bytes")),
            f"{member.get('rtt_ms')} ms" if member.get("role") == "worker" else "–",
        )
    show(lambda width: table)
    _show_peers(plan)


def _show_peers(plan: dict[str, Any]) -> None:
    for peer in plan.get("peers") or []:
        if not peer.get("taken"):
            say(f"{_who(plan, peer.get('peer'))} is not taken: {harmless(str(peer.get('why')))}")


def _who(plan: dict[str, Any], peer: object) -> str:
    return "this node" if peer == plan.get("this_node") else short_id(str(peer))


def _gb(size: object) -> str:
    return f"{size / 1e9:.2f} GB" if isinstance(size, int | float) else "–"

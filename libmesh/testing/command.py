"""The command `libmesh`: tools for those who build on the library or implement its wire.

libmesh conformance MULTIADDR --invite TOKEN [--json] [--only PREFIX] [--echo SERVICE] [--leave-nothing]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

import trio

from libmesh.errors import InviteError
from libmesh.testing.conformance import Report, Verdict, chosen, read_target, report, run_conformance
from libmesh.testing.conformance.runner import is_reachable

KEPT, BROKEN, UNUSABLE = 0, 1, 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="libmesh", description="Tools for libmesh's wire.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    conformance = commands.add_parser(
        "conformance",
        help="hold a live peer of any implementation to the specification",
        description="Hold a live peer of any implementation to the rules of mesh.proto, and print a table of them.",
        epilog="Exit code: 0 if no rule failed, 1 if one did, 2 if the peer cannot be reached or the call is wrong.",
    )
    add = conformance.add_argument
    add("multiaddr", metavar="MULTIADDR", help="where it listens: /ip4/HOST/tcp/PORT/p2p/PEER-ID")
    add("--invite", metavar="TOKEN", required=True, help="into its mesh; scope 'invite' checks the most")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add(
        "--only",
        metavar="PREFIX",
        action="append",
        default=[],
        help="only rules whose id starts so; repeatable",
    )
    add(
        "--echo",
        metavar="SERVICE",
        default="echo",
        help="its service that returns what is sent (default: echo)",
    )
    add(
        "--patience", type=float, default=5.0, metavar="S", help="seconds that it gets to answer (default: 5)"
    )
    add(
        "--leave-nothing", action="store_true", help="leave out the rules that put a revocation into the mesh"
    )
    add("--verbose", action="store_true", help="show the log of the suite's own peers")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code. `arguments` are those after the program's name."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.CRITICAL)
    rules = chosen(options.only, lasting=not options.leave_nothing)
    if not rules:
        return _unusable(f"no rule's id starts with {' or '.join(options.only)}")
    try:
        target = read_target(options.multiaddr, options.invite, echo=options.echo, patience=options.patience)
    except (ValueError, InviteError) as exc:
        return _unusable(str(exc))

    def tell(verdict: Verdict) -> None:
        if not options.json:
            sys.stdout.write(report.row(verdict) + "\n")
            sys.stdout.flush()

    async def run() -> Report | str:
        if (why := await is_reachable(target)) is not None:
            return why
        if not options.json:
            sys.stdout.write(report.heading() + "\n")
        return await run_conformance(target, rules=rules, tell=tell)

    result = trio.run(run, restrict_keyboard_interrupt_to_checkpoints=True)
    if isinstance(result, str):
        return _unusable(result)
    text = json.dumps(report.as_json(result), indent=1) if options.json else "\n" + report.summary(result)
    sys.stdout.write(text + "\n")
    return KEPT if result.kept else BROKEN


def _unusable(why: str) -> int:
    sys.stderr.write(f"libmesh: {why}\n")
    return UNUSABLE

"""`libmesh-node doctor`: how this node reaches others and they it, and what to do about it."""

from __future__ import annotations

import argparse
import ctypes
from typing import Any

from libmesh_node.client import find_node
from libmesh_node.datadir import DataDir
from libmesh_node.doctor import Finding, Grade, examine, healthy
from libmesh_node.options import add_node_choice, data_dir
from libmesh_node.terminal import harmless, say, say_json

_TIMEX_BYTES = 512  # more than `struct timex` has anywhere; zeros only ask
_TIME_ERROR = 5  # what is returned while the clock is not synchronised

_MARKS = {Grade.GOOD: "ok", Grade.NOTE: "note", Grade.BAD: "PROBLEM"}


def add_parser(subparsers: Any) -> None:
    """Add `doctor` to the commands."""
    parser = subparsers.add_parser(
        "doctor",
        help="tell how this node is reached, and what to do for direct paths",
        description=(
            "Asks the running node what address others see, whether its port is open, what kind of router it is behind, "
            "which relays it has and by which path it reaches each peer, and says what to do. Exits with 0 if nothing "
            "is wrong, with 1 if something is."
        ),
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_node_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if one is a problem."""
    node = find_node(DataDir(data_dir(args)), args.console)
    findings = examine(node.get("/api/status"), clock_set())
    if args.json:
        say_json({"healthy": healthy(findings), "findings": [_as_json(finding) for finding in findings]})
    else:
        width = max(len(finding.topic) for finding in findings)
        for finding in findings:
            say(f"{_MARKS[finding.grade]:<8}{harmless(finding.topic):<{width}}  {harmless(finding.text)}")
            if finding.advice:
                say(f"{'':<8}{'':<{width}}  → {harmless(finding.advice)}")
    return 0 if healthy(findings) else 1


def clock_set() -> bool | None:
    """Whether the kernel believes that its clock is right (`adjtimex`); `None` where it cannot be asked."""
    try:
        adjtimex = ctypes.CDLL(None).adjtimex
    except (OSError, AttributeError):
        return None
    state = adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    return None if state < 0 else bool(state != _TIME_ERROR)


def _as_json(finding: Finding) -> dict[str, str]:
    return {
        "topic": finding.topic,
        "grade": finding.grade.value,
        "text": finding.text,
        "advice": finding.advice,
    }

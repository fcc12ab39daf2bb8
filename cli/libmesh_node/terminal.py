"""How commands print: answers on stdout, so that they can be piped; what is said about them on stderr."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_PIPE_WIDTH = 200
"""Columns when stdout is no terminal: wide enough that no table row is broken, as `grep` expects one."""

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """`text` with each control character replaced, so that a peer's words cannot move the cursor or forge a line.

    Removes C0 and C1 controls, and the marks that reorder text (Unicode TR 36, "Bidirectional Text Spoofing").
    """
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def say(text: str = "") -> None:
    """Write one line of an answer to stdout, now."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def say_part(text: str) -> None:
    """Write a part of a line to stdout, now."""
    sys.stdout.write(text)
    sys.stdout.flush()


def remark(text: str) -> None:
    """Write one line about an answer to stderr, now."""
    sys.stdout.flush()
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def say_json(value: Any, *, lines: bool = False) -> None:
    """Write `value` to stdout as JSON: indented for eyes, or with `lines` as one line for programs."""
    say(json.dumps(value, ensure_ascii=False, indent=None if lines else 2))


def stdout_console() -> Console:
    """A rich console on stdout, with the terminal's width and colours."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def show(tables: Callable[[int], RenderableType]) -> None:
    """Print what `tables` makes of a width in columns: with a terminal's colours, or into a pipe plain and wide."""
    from rich.console import Console

    if sys.stdout.isatty():
        console = stdout_console()
        console.print(tables(console.width))
        return
    paper = io.StringIO()
    console = Console(
        file=paper, width=_PIPE_WIDTH, color_system=None, highlight=False, markup=False, emoji=False
    )
    console.print(tables(_PIPE_WIDTH))
    say("\n".join(line.rstrip() for line in paper.getvalue().splitlines()))

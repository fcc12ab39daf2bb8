"""The command `libmesh-node`: parses, hands over to one file in `commands/`, and turns errors into exit codes.

Exit codes: 0 done, 1 it failed, 2 the command line makes no sense, 130 ended by Ctrl-C. A person never sees a
traceback: what nobody foresaw is said in one line, and `--verbose` adds where it happened.

The command line is parsed in two steps, because `--port` means one thing to a node and another to `tunnel connect`:
first a node's own flags, up to the first word that is no flag, then what that word's command makes of the rest.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn, cast

from libmesh_node.commands import run
from libmesh_node.errors import NodeError, UsageError, words

COMMANDS = {
    "demo": "two nodes on this machine, one serving a tiny model, one using it",
    "doctor": "tell how this node is reached, and what to do for direct paths",
    "drop": "serve a model no more, and want it no more",
    "engine": "find llama.cpp's programs, or build them",
    "invite": "make an invite for the next machine",
    "load": "serve a model from now on, on the running node",
    "peers": "show who is in the mesh, and who let whom in",
    "ping": "show the path to a peer, its round-trip time, and each change",
    "relay": "relay for nodes that cannot reach each other",
    "plan": "show who would serve a model, and how fast",
    "status": "show peers, paths, models and processes",
    "stop": "end the running node",
    "unload": "serve a model no more on this node",
    "tunnel": "forward TCP ports through the mesh",
    "rotate-key": "give up this node's identity and mesh for new ones",
}
"""Each lives in `commands/`, in a file of its name, as `add_parser(subparsers)` and `run(args) -> exit code`."""

_SHARED = ("data_dir", "console", "verbose")
"""Flags that mean the same in front of a command and behind it."""

_EPILOG = """\
examples:
  libmesh-node --model demo                     serve a tiny built-in model, and print an invite
  libmesh-node --client --join TOKEN            use that mesh's models from this machine
  libmesh-node --model ~/models/some.gguf       serve a model of yours
  libmesh-node invite --scope client --ttl 1d   another invite, from the running node

Without options a node starts idle: its console is on, and its API says what to do next.
"""


class CommandParser(argparse.ArgumentParser):
    """argparse, with the near names of what was mistyped, and without guessing at abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Like the original's, but what nobody knows is an error here, where the flags that exist are known."""
        found, extras = super().parse_known_args(args, namespace)
        if extras:
            word = extras[0].split("=")[0]
            known = re.findall(r"--[a-z][a-z-]*", self.format_help()) if word.startswith("-") else []
            self.error(f"unknown argument {word!r}{suggestion(word, known)}")
        return found, extras

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where to read on, and exit with 2."""
        self.exit(2, f"{self.prog}: {message}\nTry '{self.prog} --help'.\n")


def suggestion(word: str, known: Sequence[str]) -> str:
    """`; did you mean …?` with the names in `known` that come near `word`; empty if none does."""
    near = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def node_parser() -> CommandParser:
    """Parses a node's flags, and leaves the first word that is no flag, with all after it, in `command`."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = CommandParser(
        prog="libmesh-node",
        usage="%(prog)s [options]\n       %(prog)s COMMAND [options]",
        description=(
            "An OpenAI-compatible API on every machine of a mesh, whichever machine holds the model.\n\n"
            f"commands (COMMAND --help tells more; without one, a node runs until Ctrl-C):\n{listing}"
        ),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    run.add_options(parser)
    return parser


class _ShowVersion(argparse.Action):
    """Reads the installed version only when asked for it: that takes as long as all the rest."""

    def __call__(self, *_args: object, **_kwargs: object) -> NoReturn:
        from importlib.metadata import version

        sys.stdout.write(f"libmesh-node {version('libmesh')}\n")
        sys.exit(0)


def command_parser(name: str) -> CommandParser:
    """Parses `name` and what belongs to it. Loads that command's file and no other."""
    parser = CommandParser(prog="libmesh-node")
    subparsers = parser.add_subparsers(metavar="COMMAND", parser_class=CommandParser)
    _module(name).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, or the process's own; the exit code. Usage errors leave by `SystemExit(2)`."""
    args: argparse.Namespace | None = None
    try:
        action, args = _parse(argv)
        code = action(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has left, `| head` for one. Python flushes once more at exit; give it a place.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseExceptionGroup as group:
        if group.split(KeyboardInterrupt)[1] is None:  # Ctrl-C in the middle of a nursery
            return 130
        if not isinstance(group, Exception):
            raise
        return _fail(group, args or argparse.Namespace())
    except Exception as error:  # noqa: BLE001 - the process's last boundary: a person gets a line, not a traceback
        return _fail(error, args or argparse.Namespace())


def _parse(argv: Sequence[str] | None) -> tuple[Callable[[argparse.Namespace], int], argparse.Namespace]:
    parser = node_parser()
    args = parser.parse_args(argv)
    if not args.command:
        return run.run, args
    name = args.command[0]
    if name not in COMMANDS:
        parser.error(f"there is no command {name!r}{suggestion(name, list(COMMANDS))}")
    bare = vars(parser.parse_args([]))
    for flag, value in vars(args).items():
        if flag not in (*_SHARED, "command") and value != bare[flag]:
            dashed = flag.replace("_", "-")
            parser.error(f"--{dashed} in front of {name!r} does nothing: it is for starting a node")
    shared = argparse.Namespace(**{flag: getattr(args, flag) for flag in _SHARED})
    parsed = command_parser(name).parse_args(args.command, shared)
    return cast("Callable[[argparse.Namespace], int]", _module(name).run), parsed


def _module(name: str) -> Any:
    return import_module(f".commands.{name.replace('-', '_')}", __package__)


def _fail(error: Exception, args: argparse.Namespace) -> int:
    """Say why it failed. Foreseen errors carry their own words; all others are our fault and say so."""
    if getattr(args, "verbose", False):
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, NodeError | OSError) or _is_mesh_error(error):
        text = words(error)
    else:
        text = f"Internal error ({type(error).__name__}: {error}). Please report it; --verbose shows where it happened."
    text = " ".join(text.split())
    if getattr(args, "json_logs", False):
        line = {"time": round(time.time(), 3), "level": "error", "logger": "libmesh_node", "message": text}
        sys.stderr.write(f"{json.dumps(line)}\n")
        return error.exit_code if isinstance(error, NodeError) else 1
    sys.stderr.write(f"libmesh-node: {text}\n")
    if isinstance(error, UsageError):
        sys.stderr.write("Try 'libmesh-node --help'.\n")
    return error.exit_code if isinstance(error, NodeError) else 1


def _is_mesh_error(error: Exception) -> bool:
    """Whether libmesh raised it. It is not loaded for that: what is not loaded has raised nothing."""
    base = getattr(sys.modules.get("libmesh"), "MeshError", None)
    return base is not None and isinstance(error, base)

"""`libmesh-node engine status|install`: says which llama.cpp programs are used, and builds them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libmesh_node.errors import NodeError
from libmesh_node.terminal import remark, say, say_json

if TYPE_CHECKING:
    from libmesh_node.llama.build import BuildProgress
    from libmesh_node.llama.engine import Binary, Engine

_PLAIN_EVERY = 10
"""Where there is no terminal, one line for this many per cent of the compilation."""


def add_parser(subparsers: Any) -> None:
    """Add `engine` to the commands."""
    parser = subparsers.add_parser(
        "engine",
        help="find llama.cpp's programs, or build them",
        description=(
            "A node runs llama.cpp's own llama-server and rpc-server. They are looked for in --bin-dir, then on PATH, "
            "then where `engine install` puts them."
        ),
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    status = actions.add_parser(
        "status",
        help="say which programs are used",
        description="Says which programs are used, and what they are.",
    )
    status.add_argument("--bin-dir", type=Path, metavar="DIR", help="a folder to look in first")
    status.add_argument("--json", action="store_true", help="print it as JSON")
    install = actions.add_parser(
        "install",
        help="build both programs from source",
        description=(
            "Builds llama-server and rpc-server from the llama.cpp source that the llama-cpp-python package on PyPI "
            "carries, for this machine's processor. Needs a C and a C++ compiler; takes about 7 minutes on two cores. "
            "Goes on where an earlier attempt stopped, and does nothing if both are there."
        ),
    )
    install.add_argument("--force", action="store_true", help="build them anew, even if they are there")
    for action in (status, install):
        action.add_argument(
            "--verbose", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def run(args: argparse.Namespace) -> int:
    """Carry out the action. Exit code 1 if a program is missing, or could not be built."""
    return _status(args) if args.action == "status" else _install(args)


def _status(args: argparse.Namespace) -> int:
    from libmesh_node.llama.engine import find_engine

    engine = find_engine(args.bin_dir)
    devices = _devices(engine)
    if args.json:
        say_json({**_as_json(engine), "devices": devices})
    else:
        _print(engine)
        for device in devices or (["the processor only"] if engine.llama_server else []):
            say(f"{'computes on':<13} {device}")
        _remark_unused_gpus(devices)
    return 0 if engine.complete else 1


def _devices(engine: Engine) -> list[str]:
    """What the llama-server that was found can compute on, besides the processor."""
    from libmesh_node.llama.probe import Unusable, list_devices

    try:
        return list(list_devices(engine.llama_server.path)) if engine.llama_server is not None else []
    except Unusable:
        return []


def _remark_unused_gpus(devices: list[str]) -> None:
    from libmesh_node.hardware import detect

    if not devices:
        for gpu in detect().gpus:
            remark(
                f"{gpu.name} is not used: this llama-server was built without support for it. Build llama.cpp for it "
                "(see llama.cpp's docs/build.md), and name the folder of its programs with --bin-dir."
            )


def _print(engine: Engine) -> None:
    for name, binary in (("llama-server", engine.llama_server), ("rpc-server", engine.rpc_server)):
        say(f"{name:<13} {_describe(binary)}")
    for broken in engine.broken:
        say(f"{'broken':<13} {broken.path}: {broken.reason}")
    for note in engine.notes:
        remark(note)
    if not engine.complete:
        remark(
            "Build what is missing with `libmesh-node engine install`, or name your own build with --bin-dir."
        )


def _describe(binary: Binary | None) -> str:
    if binary is None:
        return "missing"
    facts = [
        f"version {binary.version}" if binary.version else "",
        f"RPC {binary.rpc_protocol}" if binary.rpc_protocol else "",
    ]
    return f"{binary.path}  ({', '.join([*filter(None, facts), f'from {binary.origin}'])})"


def _as_json(engine: Engine) -> dict[str, object]:
    def one(binary: Binary | None) -> dict[str, object] | None:
        if binary is None:
            return None
        return {
            "path": str(binary.path),
            "version": binary.version,
            "rpc_protocol": binary.rpc_protocol,
            "origin": binary.origin,
        }

    return {
        "complete": engine.complete,
        "llama_server": one(engine.llama_server),
        "rpc_server": one(engine.rpc_server),
        "broken": [{"path": str(broken.path), "reason": broken.reason} for broken in engine.broken],
        "notes": list(engine.notes),
    }


def _install(args: argparse.Namespace) -> int:
    import trio

    from libmesh_node.llama.build import install

    try:
        with _progress() as report:
            engine = trio.run(lambda: install(report=report, force=args.force))
    except OSError as exc:
        raise NodeError(
            f"llama.cpp could not be installed: {exc}. XDG_CACHE_HOME names another folder for it."
        ) from exc
    _print(engine)
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[BuildProgress], None]]:
    """Something to report to: a bar on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _plain()


@contextmanager
def _bar() -> Iterator[Callable[[BuildProgress], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, highlight=False)) as progress:
        task = progress.add_task("Looking", total=None)

        def report(now: BuildProgress) -> None:
            progress.update(task, description=now.message, completed=now.done, total=now.total or None)

        yield report


def _plain() -> Callable[[BuildProgress], None]:
    last: tuple[str, int] | None = None

    def report(now: BuildProgress) -> None:
        nonlocal last
        percent = now.done * 100 // now.total if now.total else 0
        mark = now.message, percent // _PLAIN_EVERY
        if mark != last:
            last = mark
            remark(f"{now.message}: step {now.done} of {now.total}" if now.total else f"{now.message}.")

    return report

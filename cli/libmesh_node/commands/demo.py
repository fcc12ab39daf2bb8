"""`libmesh-node demo`: two real nodes on this machine, one serving a tiny model, one using it through the mesh."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libmesh_node.client import stream_answer
from libmesh_node.errors import NodeError
from libmesh_node.options import DEFAULT_API_PORT, DEFAULT_CONSOLE_PORT
from libmesh_node.terminal import say, say_part

if TYPE_CHECKING:
    import trio

    from libmesh_node.demo_node import DemoNode

QUESTION = "Who are you, and what is a mesh?"
ANSWER_TOKENS = 60


def add_parser(subparsers: Any) -> None:
    """Add `demo` to the commands."""
    parser = subparsers.add_parser(
        "demo",
        help="two nodes on this machine, one serving a tiny model, one using it",
        description=(
            "Starts two real nodes on this machine: one serves the built-in demo model, the other joins it with an "
            "invite and has no model. Asks the second one over its API, then leaves both running until Ctrl-C. Keeps "
            "nothing but llama.cpp, which it builds first if it is not there."
        ),
    )
    parser.add_argument("--once", action="store_true", help="end after the answer")
    parser.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Run the demo. 0 when it is over or was ended by a signal; raises `NodeError` if a node fails."""
    from libmesh_node.llama.engine import find_engine

    if find_engine(None).llama_server is None:
        say("llama.cpp is not on this machine yet. Building it, once:")
        if code := subprocess.call([sys.executable, "-m", "libmesh_node", "engine", "install"]):
            return code
    import trio

    with tempfile.TemporaryDirectory(prefix="libmesh-demo-", ignore_cleanup_errors=True) as folder:
        trio.run(partial(_until_signal, Path(folder), once=args.once))
    return 0


async def _until_signal(folder: Path, *, once: bool) -> None:
    import trio

    from libmesh_node.ending import open_ending_signals

    failures: list[BaseException] = []
    with open_ending_signals() as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, signals, nursery.cancel_scope)
            try:
                await _play(folder, once=once)
            except* NodeError as group:
                failures += _leaves(group)
            nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]


async def _end_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        say("\nEnding both nodes ...")
        scope.cancel()


async def _play(folder: Path, *, once: bool) -> None:
    import trio

    from libmesh_node.demo_node import open_demo_node

    say("Starting a node that serves the demo model ...")
    invite = folder / "invite"
    flags = ["--model", "demo", "--port", "0", "--console", "0", "--invite-file", str(invite)]
    async with open_demo_node("serving node", folder / "serving", flags) as serving:
        await serving.until(lambda status: status.get("llama_ready") is True, "has no running llama-server")
        say("Starting a client node that joins it with its invite ...")
        started = time.monotonic()
        ports = ["--port", _port(DEFAULT_API_PORT), "--console", _port(DEFAULT_CONSOLE_PORT)]
        flags = ["--client", "--join", f"@{invite}", *ports]
        async with open_demo_node("client node", folder / "client", flags) as client:
            await client.until(_knows_a_model, "does not see the model")
            say(f"It sees the model {time.monotonic() - started:.1f} s after its start. Asking it:\n")
            # trio-typing's outdated stubs of trio, which libp2p brings along, do not know this argument.
            await trio.to_thread.run_sync(  # type: ignore[call-arg, unused-ignore]
                partial(_ask, client.info.api_port), abandon_on_cancel=True
            )
            _tell(serving, client)
            if not once:
                say(f"\nTry it: curl http://localhost:{client.info.api_port}/v1/models")
                say("Both go on until Ctrl-C.")
                await _first_end(serving, client)


def _ask(api_port: int) -> None:
    """Ask over the API and show each piece of the answer when it comes. Blocks."""
    say(f"  > {QUESTION}\n")
    say_part("  ")
    asked = time.monotonic()
    times: list[float] = []
    question = [{"role": "user", "content": QUESTION}]
    for piece in stream_answer(
        api_port, {"model": "demo", "messages": question, "max_tokens": ANSWER_TOKENS}
    ):
        times.append(time.monotonic() - asked)
        say_part(piece.replace("\n", "\n  "))
    if not times:
        raise NodeError("The client node's API answered without a word.")
    say(
        f"\n\n{len(times)} pieces, the first after {times[0] * 1000:.0f} ms, the last after {times[-1] * 1000:.0f} ms."
    )
    say("The text is nonsense: the demo model's weights are random. The way it came here is real.")


def _tell(*nodes: DemoNode) -> None:
    say()
    for node in nodes:
        say(f"{node.name:<13} API      http://localhost:{node.info.api_port}/v1")
        say(f"{'':<13} console  http://localhost:{node.info.console_port}")
        say(f"{'':<13} status   libmesh-node status --console {node.info.console_port}")


async def _first_end(*nodes: DemoNode) -> None:
    """Wait until one of the nodes ends by itself, and raise `NodeError` for it."""
    import trio

    async def watch(node: DemoNode) -> None:
        await node.ended.wait()
        raise node.failure("ended by itself")

    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(watch, node)


def _knows_a_model(status: dict[str, Any]) -> bool:
    return any(model.get("status") == "warm" for model in status.get("mesh_models", []))


def _port(preferred: int) -> str:
    """The usual port, where the README says to look, if it is free; else 0, any free one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            return "0"
    return str(preferred)


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    """The errors in a group, however deep they lie."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found

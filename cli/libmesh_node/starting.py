"""From the command line's options to a node that runs, and to its exit code: data folder, log and signals around it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from libmesh import MeshError
from libmesh_node.datadir import DataDir, ephemeral_data_dir, held_data_dir
from libmesh_node.ending import end_on_signal, open_ending_signals
from libmesh_node.errors import NodeError, sentence, words
from libmesh_node.logs import logging_to
from libmesh_node.node import Node
from libmesh_node.options import NodeOptions


async def run_node(options: NodeOptions) -> int:
    """Run a node until SIGINT, SIGTERM, SIGHUP or a `stop` command; the exit code.

    Raises `NodeError` for whatever keeps it from starting, with what to do about it. A second signal ends the process
    at once.
    """
    # Signals first: one that comes while the keys are being made must not be a KeyboardInterrupt somewhere in there.
    with open_ending_signals() as signals, _folder(options) as folder, _log(options, folder):
        outcome: list[NodeError] = []
        try:
            async with trio.open_nursery() as nursery:
                ending = trio.CancelScope(shield=True)
                node = Node(options, folder, nursery.cancel_scope)
                nursery.start_soon(end_on_signal, signals, node.end, nursery.cancel_scope, ending)
                nursery.start_soon(_run_and_end, node, ending, outcome)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)  # `end_for_sure` has done its duty
        if outcome:
            raise outcome[0]
    return 0


async def _run_and_end(node: Node, ending: trio.CancelScope, outcome: list[NodeError]) -> None:
    try:
        await node.run()
    except* (NodeError, MeshError, OSError) as group:
        first = _first(group)
        outcome.append(first if isinstance(first, NodeError) else NodeError(sentence(words(first))))
    finally:
        node.ended.cancel()
        ending.cancel()


def _first(group: BaseExceptionGroup[BaseException]) -> Exception:
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    assert isinstance(inner, Exception)
    return inner


@contextmanager
def _folder(options: NodeOptions) -> Iterator[DataDir]:
    with ephemeral_data_dir() if options.ephemeral else held_data_dir(options.data_dir) as folder:
        yield folder


@contextmanager
def _log(options: NodeOptions, folder: DataDir) -> Iterator[None]:
    with logging_to(file=folder.node_log, json_logs=options.json_logs, verbose=options.verbose):
        yield

"""A node as a child process, for `libmesh-node demo`: started, waited for, ended, and never left behind."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from libmesh_node.client import NodeClient
from libmesh_node.datadir import DataDir, NodeInfo
from libmesh_node.errors import NodeError
from libmesh_node.llama.process import GuardedProcess, open_guarded

START_PATIENCE = 120.0
"""Seconds for a node to come up with its model. Three are usual; a busy machine that first makes the model needs more."""

STOP_PATIENCE = 8.0
"""Seconds for a node to say goodbye; then it is killed."""

_LAST_WORDS = 2000
_POLL = 0.05


class DemoNode:
    """A running node. Made by `open_demo_node`.

    Attributes:
        name: what the demo calls it.
        ended: set when the process has ended.
    """

    def __init__(self, name: str, folder: DataDir, process: GuardedProcess) -> None:
        self.name = name
        self.ended = trio.Event()
        self._folder = folder
        self._process = process
        self._words: deque[bytes] = deque(maxlen=64)
        self._info: NodeInfo | None = None

    @property
    def info(self) -> NodeInfo:
        """Where it listens. Only after `until` has returned."""
        assert self._info is not None
        return self._info

    async def until(self, ready: Callable[[dict[str, Any]], bool], otherwise: str) -> None:
        """Wait until its status is `ready`.

        Raises `NodeError` if the node ends before that, or is not ready after `START_PATIENCE`; `otherwise` then says
        what it did not come to.
        """
        with trio.move_on_after(START_PATIENCE):
            while not self.ended.is_set():
                if ready(await self._status()):
                    return
                await trio.sleep(_POLL)
            raise self.failure("ended by itself")
        raise self.failure(f"{otherwise} after {START_PATIENCE:g} s")

    def failure(self, what: str) -> NodeError:
        """The error that says `what` happened to this node, and what it said last."""
        words = b"".join(self._words).decode("utf-8", "replace")[-_LAST_WORDS:].strip()
        return NodeError(f"The {self.name} {what}. It said last: {words or 'nothing'}")

    async def _status(self) -> dict[str, Any]:
        self._info = self._folder.read_info()
        if self._info is None:
            return {}
        try:
            return await trio.to_thread.run_sync(NodeClient(self._info.console_port).get, "/api/status")
        except NodeError:
            return {}

    async def listen(self) -> None:
        """Keep the newest of what it says, until it ends."""
        async for data in self._process.output:
            self._words.append(bytes(data))
        self.ended.set()

    async def end(self) -> None:
        """Ask it to end, and wait for that as long as is decent."""
        await self._process.send_signal(signal.SIGTERM)
        with trio.move_on_after(STOP_PATIENCE):
            await self._process.wait()


@asynccontextmanager
async def open_demo_node(name: str, folder: Path, flags: Sequence[str]) -> AsyncIterator[DemoNode]:
    """Run a node on the data folder `folder`. At the end it is asked to end, then made to.

    It dies with this process, however that ends. Raises `ProgramNotStarted`; errors from inside come out in an
    `ExceptionGroup`, as from a nursery.
    """
    argv = [sys.executable, "-m", "libmesh_node", "--data-dir", str(folder), *flags]
    async with open_guarded(argv, environment=os.environ) as process, trio.open_nursery() as nursery:
        node = DemoNode(name, DataDir(folder), process)
        nursery.start_soon(node.listen)
        try:
            yield node
        finally:
            with trio.CancelScope(shield=True):
                await node.end()
            nursery.cancel_scope.cancel()
